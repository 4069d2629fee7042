// The program is what runs in a sandbox that moves: it holds memory, an open file and a listening socket, and says what they
// hold.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"time"
)

func main() {
	mib, err := strconv.Atoi(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	file, err := os.Create("/tmp/held")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := file.WriteString("written before"); err != nil {
		log.Fatal(err)
	}
	if err := os.Remove("/tmp/held"); err != nil { // only this process still has it
		log.Fatal(err)
	}
	heap := pattern(mib << 20)
	var asked atomic.Int64
	// GET /held says what is in memory and in the file, and how often that was asked.
	http.HandleFunc("GET /held", func(w http.ResponseWriter, _ *http.Request) {
		text, err := io.ReadAll(io.NewSectionReader(file, 0, 1<<20))
		_, _ = fmt.Fprintf(w, "%x %q %v %d", sha256.Sum256(heap), text, err, asked.Add(1))
	})
	http.HandleFunc("GET /ok", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
	http.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
		_, _ = w.Write(body)
	})
	// GET /late answers after a time, and GET /open begins to answer and never ends.
	http.HandleFunc("GET /late", func(w http.ResponseWriter, r *http.Request) {
		d, _ := time.ParseDuration(r.FormValue("after"))
		time.Sleep(d)
		_, _ = io.WriteString(w, "late")
	})
	http.HandleFunc("GET /open", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	// GET /ticks counts, a line each time, for as long as somebody reads.
	http.HandleFunc("GET /ticks", func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for n := 1; r.Context().Err() == nil; n++ {
			_, _ = fmt.Fprintln(w, n)
			_ = http.NewResponseController(w).Flush()
			<-tick.C
		}
	})
	l, err := net.Listen("tcp", ":8000")
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal((&http.Server{ReadHeaderTimeout: time.Minute}).Serve(l))
}

// pattern fills memory with bytes that do not compress and are the same each time.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}
