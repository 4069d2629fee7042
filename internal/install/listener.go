package install

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// holder is the process that has a port.
type holder struct {
	pid  int
	name string
	// ours means that it runs this very program.
	ours bool
}

// listenerFacts says what became of an attempt to listen.
type listenerFacts struct {
	err    error
	holder holder // of a port in use; the zero value when unknown
}

func checkListeners(ctx context.Context, s Settings) []Finding {
	var out []Finding
	for _, l := range s.Listeners {
		out = append(out, judgeListener(l, gatherListener(ctx, l.Addr)))
	}
	return out
}

func gatherListener(ctx context.Context, addr string) listenerFacts {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", addr)
	if err == nil {
		return listenerFacts{err: ln.Close()}
	}
	f := listenerFacts{err: err}
	if _, port, split := net.SplitHostPort(addr); split == nil && errors.Is(err, unix.EADDRINUSE) {
		f.holder = findHolder(port)
	}
	return f
}

func judgeListener(l Listener, f listenerFacts) Finding {
	check := "address " + l.Setting
	change := "choose another one with --" + l.Setting
	var dns *net.DNSError
	var text *net.AddrError
	switch {
	case f.err == nil:
		return ok(check, l.Addr+" is free")
	case f.holder.ours:
		return ok(check, fmt.Sprintf("%s is held by Cloister itself, process %d", l.Addr, f.holder.pid))
	case errors.Is(f.err, unix.EADDRINUSE) && f.holder.pid != 0:
		return fail(check, fmt.Sprintf("%s is held by process %d (%s)", l.Addr, f.holder.pid, f.holder.name), "stop that process, or "+change)
	case errors.Is(f.err, unix.EADDRINUSE):
		return fail(check, l.Addr+" is in use, by a process that is not to be seen from here", change)
	case errors.Is(f.err, unix.EADDRNOTAVAIL):
		return fail(check, l.Addr+" is no address of this machine", change)
	case errors.Is(f.err, unix.EACCES):
		return fail(check, fmt.Sprintf("%s: %v", l.Addr, f.err), "run as root, or choose a port above 1023 with --"+l.Setting)
	case errors.As(f.err, &dns) || errors.As(f.err, &text):
		return fail(check, fmt.Sprintf("%q is no address: %v", l.Addr, f.err), "write it as host:port, such as 127.0.0.1:3000, in --"+l.Setting)
	}
	return fail(check, fmt.Sprintf("%s: %v", l.Addr, f.err), change)
}

// findHolder looks for the process that listens on a port.
func findHolder(port string) holder {
	inodes := make(map[string]bool)
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		for _, s := range parseSockets(readFile(file)) {
			if strconv.Itoa(int(s.addr.Port())) == port {
				inodes[fmt.Sprintf("socket:[%d]", s.inode)] = true
			}
		}
	}
	if len(inodes) == 0 {
		return holder{}
	}
	files, _ := filepath.Glob("/proc/[0-9]*/fd/[0-9]*") // the pattern is well-formed
	for _, f := range files {
		target, err := os.Readlink(f)
		if err != nil || !inodes[target] {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(f, "/")[2])
		if err == nil {
			return describeProcess(pid)
		}
	}
	return holder{}
}

func describeProcess(pid int) holder {
	h := holder{pid: pid, name: strings.TrimSpace(string(readFile(fmt.Sprintf("/proc/%d/comm", pid))))}
	theirs, err1 := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	ours, err2 := os.Stat("/proc/self/exe")
	h.ours = err1 == nil && err2 == nil && os.SameFile(theirs, ours)
	return h
}
