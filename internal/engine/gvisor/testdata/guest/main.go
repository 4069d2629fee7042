// Command guest is the first process of the guests that the tests start.
package main

import (
	"bufio"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	switch cmd, arg := os.Args[1], strings.Join(os.Args[2:], " "); cmd {
	case "sleep":
		rest()
	case "exit":
		n, _ := strconv.Atoi(arg)
		os.Exit(n)
	case "alloc":
		alloc(arg)
		rest()
	case "fault":
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL) // the first process ignores it
		os.Exit(9)
	case "serve":
		serve(arg)
	}
}

func alloc(arg string) []byte {
	n, _ := strconv.Atoi(arg)
	b := make([]byte, n)
	for i := 0; i < n; i += 4096 {
		b[i] = 1
	}
	return b
}

// serve answers one command per line: the answer's lines, then an empty one.
func serve(addr string) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		os.Exit(3)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			os.Exit(4)
		}
		go func() {
			defer c.Close()
			for sc := bufio.NewScanner(c); sc.Scan(); {
				cmd, arg, _ := strings.Cut(sc.Text(), " ")
				if cmd == "hold" {
					fmt.Fprint(c, "ok\n\n")
					hold(c, "in")
					return
				}
				fmt.Fprintf(c, "%s\n\n", strings.TrimSpace(answer(cmd, arg)))
			}
		}()
	}
}

var (
	kept     [][]byte
	keptText string
)

func answer(cmd, arg string) string {
	switch cmd {
	case "cat":
		b, err := os.ReadFile(arg)
		if err != nil {
			return "error: " + err.Error()
		}
		return string(b)
	case "cpus":
		return strconv.Itoa(runtime.NumCPU())
	case "host":
		h, _ := os.Hostname()
		return h
	case "df":
		var st syscall.Statfs_t
		if err := syscall.Statfs(arg, &st); err != nil {
			return err.Error()
		}
		return fmt.Sprint(st.Blocks*uint64(st.Bsize), st.Bavail*uint64(st.Bsize))
	case "ls":
		list, err := os.ReadDir(arg)
		if err != nil {
			return err.Error()
		}
		var names []string
		for _, e := range list {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	case "sum":
		b, err := os.ReadFile(arg)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("%d %x", len(b), sha256.Sum256(b))
	case "write": // path bytes
		return write(strings.Fields(arg))
	case "rm":
		return fmt.Sprint(os.Remove(arg))
	case "mkdir", "symlink", "link", "chmod", "chown", "times", "fifo", "xattr", "sparse", "rmall":
		return fmt.Sprint(change(cmd, strings.Fields(arg)))
	case "keep":
		keptText = arg
		return "ok"
	case "kept":
		return keptText
	case "put":
		path, text, _ := strings.Cut(arg, " ")
		return fmt.Sprint(os.WriteFile(path, []byte(text), 0o600))
	case "now":
		return strconv.FormatInt(time.Now().UnixNano(), 10)
	case "random":
		b := make([]byte, 16)
		_, err := rand.Read(b)
		return fmt.Sprintf("%x %v", b, err)
	case "tick": // writes to the file every few milliseconds
		go tick(arg)
		return "ok"
	case "dial":
		c, err := net.Dial("tcp", arg)
		if err == nil {
			go hold(c, "out")
		}
		return fmt.Sprint(err)
	case "held":
		heldMu.Lock()
		defer heldMu.Unlock()
		return held[arg]
	case "alloc":
		kept = append(kept, alloc(arg))
		return "ok"
	case "fill": // half of the bytes as text would be, half random
		n, _ := strconv.Atoi(arg)
		b := make([]byte, n)
		_, _ = rand.Read(b)
		for i, line := 0, 0; i < n/2; line++ {
			i += copy(b[i:n/2], fmt.Sprintf("%08x INFO request %d served: path=/v1/items/%x status=200 took %d us\n", line*7919, line, line*line, line%997))
		}
		kept = append(kept, b)
		return "ok"
	case "burn":
		for i := 0; i < 2e8; i++ {
			_ = i * i
		}
		return "ok"
	case "mount":
		_ = os.MkdirAll("/mnt/t", 0o755)
		return fmt.Sprint(syscall.Mount("t", "/mnt/t", "tmpfs", 0, ""))
	case "exit":
		n, _ := strconv.Atoi(arg)
		os.Exit(n)
	}
	return "unknown command"
}

func write(args []string) string {
	f, err := os.Create(args[0])
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	want, _ := strconv.Atoi(args[1])
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	done := 0
	for done < want {
		n, err := f.Write(buf[:min(len(buf), want-done)])
		done += n
		if errors.Is(err, syscall.ENOSPC) {
			return fmt.Sprint(done, " ENOSPC")
		}
		if err != nil {
			return fmt.Sprint(done, " ", err)
		}
	}
	return fmt.Sprint(done, " ok")
}

// rest does nothing, for ever.
func rest() {
	for {
		_ = syscall.Pause()
	}
}

var (
	heldMu sync.Mutex
	held   = map[string]string{}
)

// hold waits for more from a connection that nobody writes to, and notes how that ends.
func hold(c net.Conn, name string) {
	note := func(s string) {
		heldMu.Lock()
		defer heldMu.Unlock()
		held[name] = s
	}
	note("open")
	_, err := c.Read(make([]byte, 1))
	note("ended: " + fmt.Sprint(err))
	_ = c.Close()
}

func tick(path string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	for {
		if _, err := f.WriteString("."); err != nil {
			return
		}
		time.Sleep(3 * time.Millisecond)
	}
}

func change(cmd string, a []string) error {
	number := func(i int) int {
		n, _ := strconv.ParseInt(a[i], 0, 64)
		return int(n)
	}
	switch cmd {
	case "mkdir":
		return os.Mkdir(a[0], 0o755)
	case "symlink":
		return os.Symlink(a[0], a[1])
	case "link":
		return os.Link(a[0], a[1])
	case "chmod":
		return syscall.Chmod(a[1], uint32(number(0)))
	case "chown":
		return os.Lchown(a[2], number(0), number(1))
	case "times":
		at := time.Unix(int64(number(0)), 0)
		return os.Chtimes(a[1], at, at)
	case "fifo":
		return syscall.Mkfifo(a[0], 0o644)
	case "xattr":
		return syscall.Setxattr(a[2], a[0], []byte(a[1]), 0)
	case "sparse": // one byte at the end
		f, err := os.Create(a[1])
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte("x"), int64(number(0)-1))
		return err
	case "rmall":
		return os.RemoveAll(a[0])
	}
	return errors.ErrUnsupported
}
