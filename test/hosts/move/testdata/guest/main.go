// The program is what runs in a sandbox that moves: it holds memory, an open file and a listening socket, and says what they
// hold. It answers as the agent inside does, so that nothing else is needed.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

func main() {
	file, err := os.Create("/held")
	if err != nil {
		log.Fatal(err)
	}
	var mu sync.Mutex
	var heap []byte
	var asked int
	http.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	http.HandleFunc("POST /init", func(w http.ResponseWriter, r *http.Request) {
		var settings struct{ EnvVars map[string]string }
		_ = json.NewDecoder(r.Body).Decode(&settings)
		mu.Lock()
		defer mu.Unlock()
		if n, err := strconv.Atoi(settings.EnvVars["HEAP"]); err == nil && heap == nil {
			heap = pattern(n << 20)
			_, _ = fmt.Fprintf(file, "written before, %d MiB\n", n)
		}
		w.WriteHeader(http.StatusNoContent)
	})
	http.HandleFunc("GET /held", func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked++
		_, _ = fmt.Fprintf(file, "asked %d\n", asked)
		text, _ := io.ReadAll(io.NewSectionReader(file, 0, 1<<20))
		_, _ = fmt.Fprintf(w, "%x %d %q", sha256.Sum256(heap), asked, text)
	})
	server := &http.Server{Addr: ":49983", ReadHeaderTimeout: time.Minute}
	log.Fatal(server.ListenAndServe())
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
