package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	recordFile   = "guest.json"
	panicFile    = "panic.log"
	maxRecord    = 64 << 10
	maxPanicText = 200
)

// record is what a later process must know of a guest that was started. It is written as the last step of a start.
type record struct {
	PID         int       `json:"pid"`
	StartTicks  uint64    `json:"start_ticks"`
	StartedAt   time.Time `json:"started_at"`
	MemoryBytes int64     `json:"memory_bytes"`
	// Limits and Hostname are what a checkpoint of the guest says of it.
	Limits   sandbox.Resources `json:"limits"`
	Hostname string            `json:"hostname"`
	// Device and Inode name the file that holds what the guest wrote.
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

// guest is what this process knows of a guest that was started completely.
type guest struct {
	id     sandbox.ID
	bundle string
	rec    record
	proc   *process // nil when it had ended before this process looked

	mu   sync.Mutex
	exit *engine.Exit // set once the end was seen
	// stopped means that Stop ended it.
	stopped bool
	// diskFD is the sentry's descriptor of the file that holds what the guest wrote; -1 until it was looked up.
	diskFD int
}

// bundle returns the directory of a guest.
func (e *Engine) bundle(id sandbox.ID) string { return filepath.Join(e.cfg.Root, string(id)) }

// socket returns the path of a guest's control socket.
func (e *Engine) socket(id sandbox.ID) string {
	return filepath.Join(e.cfg.Root, "runsc-"+string(id)+".sock")
}

// find returns a guest that was started, by this process or an earlier one. Guests without a record are ErrNotFound.
func (e *Engine) find(id sandbox.ID) (*guest, error) {
	if _, err := sandbox.ParseID(string(id)); err != nil {
		return nil, err
	}
	e.mu.Lock()
	g, known := e.guests[id]
	e.mu.Unlock()
	if known && g == nil { // its start has not returned
		return nil, notFound(id)
	}
	if known {
		return g, nil
	}
	g, err := e.adopt(id)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if first := e.guests[id]; first != nil { // somebody else adopted it meanwhile
		if g.proc != nil {
			g.proc.close()
		}
		return first, nil
	}
	e.guests[id] = g
	return g, nil
}

// adopt reads the record of a guest that an earlier process started.
func (e *Engine) adopt(id sandbox.ID) (*guest, error) {
	rec, err := readRecord(e.bundle(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, notFound(id)
	}
	if err != nil {
		return nil, fmt.Errorf("read record of %s: %w", id, err)
	}
	g := &guest{id: id, bundle: e.bundle(id), rec: rec, diskFD: -1}
	p, err := openProcess(rec.PID, rec.StartTicks)
	switch {
	case errors.Is(err, unix.ESRCH):
	case err != nil:
		return nil, fmt.Errorf("open sentry of %s: %w", id, err)
	default:
		g.proc = p
	}
	return g, nil
}

func notFound(id sandbox.ID) error { return sandbox.NotFoundf("sandbox %s does not run here", id) }

func readRecord(bundle string) (record, error) {
	f, err := os.Open(filepath.Join(bundle, recordFile)) //nolint:gosec // below our own directory
	if err != nil {
		return record{}, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	raw, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err != nil {
		return record{}, err
	}
	return parseRecord(raw)
}

func parseRecord(raw []byte) (record, error) {
	var r record
	if err := json.Unmarshal(raw, &r); err != nil {
		return record{}, fmt.Errorf("parse: %w", err)
	}
	if r.PID <= 1 || r.StartTicks == 0 {
		return record{}, fmt.Errorf("parse: process %d started at %d", r.PID, r.StartTicks)
	}
	return r, nil
}

// writeRecord makes a guest known to later processes, whole or not at all.
func writeRecord(bundle string, r record) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	path := filepath.Join(bundle, recordFile)
	if err := os.WriteFile(path+".new", raw, fileMode); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// running reports whether the guest's process has not ended.
func (g *guest) running() bool { return g.proc != nil && !g.proc.ended() }

// finish records how a guest ended, once, and returns it. The guest's process must have ended, and its control group must
// still exist.
func (g *guest) finish(groups *cgroups) engine.Exit {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.exit != nil {
		return *g.exit
	}
	var s status
	if g.proc != nil {
		s = g.proc.reap()
		g.proc.close()
	}
	end := describe(s, g.stopped, groups.oomKills(g.id) > 0, g.rec.MemoryBytes)
	if end.OOM && !groups.outgrew(g.id) {
		end.Reason = "out of memory: all sandboxes of the machine together used up what they may, and this one gave way within its limit of " +
			size(g.rec.MemoryBytes)
	}
	if !g.stopped && !end.OOM && (!s.known || s.wait.Signaled() || s.wait.ExitStatus() >= 2) {
		if text := panicText(g.bundle); text != "" {
			end.Code, end.Reason = -1, "the sentry failed: "+text
		}
	}
	end.At = time.Now()
	g.exit = &end
	return end
}

// describe turns what is known of a sentry's end into an Exit. A sentry exits with its first process's code; for one that
// a signal ended, with 128 and the signal's number.
func describe(s status, stopped, killed bool, limit int64) engine.Exit {
	clean := s.known && s.wait.Exited()
	switch {
	case stopped:
		return engine.Exit{Code: -1, Reason: "stopped"}
	case killed && !clean:
		return engine.Exit{Code: -1, OOM: true, Reason: "out of memory: the limit is " + size(limit)}
	case clean:
		code := s.wait.ExitStatus()
		return engine.Exit{Code: code, Reason: fmt.Sprintf("its first process exited with code %d", code)}
	case s.known && s.wait.Signaled():
		return engine.Exit{Code: -1, Reason: fmt.Sprintf("the sentry was killed by signal %d (%s)", s.wait.Signal(), s.wait.Signal())}
	}
	return engine.Exit{Code: -1, Reason: "it ended while nobody watched: how is not known"}
}

// size formats a memory limit in MiB, or in bytes where it is no whole number of these.
func size(n int64) string {
	if n%(1<<20) == 0 {
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d bytes", n)
}

// panicText returns the beginning of what a sentry's Go runtime said at its end, as one line.
func panicText(bundle string) string {
	f, err := os.Open(filepath.Join(bundle, panicFile)) //nolint:gosec // below our own directory
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()                      // opened for reading
	raw, _ := io.ReadAll(io.LimitReader(f, maxPanicText)) // what was read is what we show
	return oneLine(raw)
}

// oneLine returns the first line's printable characters.
func oneLine(raw []byte) string {
	out := make([]rune, 0, len(raw))
	for _, r := range string(raw) {
		if r == '\n' {
			break
		}
		if r >= ' ' && r != 0x7f && r != '\uFFFD' {
			out = append(out, r)
		}
	}
	return string(out)
}
