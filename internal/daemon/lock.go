package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Holder is who holds a data directory.
type Holder struct {
	PID     int       `json:"pid"`
	Since   time.Time `json:"since"`
	Version string    `json:"version"`
	// Node is the id of the node that the process runs; empty until it is known. It outlives the process: should the node's
	// journal be lost, this is where it stays known what on the machine is the node's.
	Node sandbox.NodeID `json:"node,omitempty"`
}

// lock is a held data directory; the kernel frees it when the process ends, however it ends.
type lock struct {
	file   *os.File
	holder Holder
}

func lockPath(dir string) string { return filepath.Join(dir, "lock") }

// acquire takes the data directory for this process. When another holds it, the error is ErrConflict and says who.
func acquire(ctx context.Context, dir, version string) (*lock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	f, err := os.OpenFile(lockPath(dir), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := flock(ctx, f, dir); err != nil {
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		h := readHolder(dir)
		return nil, sandbox.Conflictf("data directory %s is in use by process %d since %s; `cloister down --data-dir %s` stops it",
			dir, h.PID, h.Since.Local().Format(time.DateTime), dir)
	}
	l := &lock{file: f, holder: Holder{
		PID: os.Getpid(), Since: time.Now().UTC().Truncate(time.Second), Version: version, Node: readHolder(dir).Node,
	}}
	if err := l.write(); err != nil {
		_ = f.Close()
		return nil, err
	}
	return l, nil
}

// leftoverTime is how long a child that a killed daemon was about to start may hold the lock before it lets go.
const leftoverTime = 5 * time.Second

// flock takes the lock. It waits only while the holder that the file names is dead: then a process that it had just forked
// still holds its files, which ends when that one becomes another program.
func flock(ctx context.Context, f *os.File, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, leftoverTime)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) || alive(readHolder(dir).PID) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// alive reports whether a process exists.
func alive(pid int) bool { return pid > 0 && !errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

// nameNode adds the node's id to what the lock says of its holder.
func (l *lock) nameNode(id sandbox.NodeID) error {
	l.holder.Node = id
	return l.write()
}

func (l *lock) write() error {
	text, err := json.Marshal(l.holder)
	if err == nil {
		_, err = l.file.WriteAt(text, 0) // over what is there: on a full disk nothing new could be had
	}
	if err == nil {
		err = l.file.Truncate(int64(len(text)))
	}
	if err != nil {
		return fmt.Errorf("write lock %s: %w", l.file.Name(), err)
	}
	return nil
}

func (l *lock) release() { _ = l.file.Close() } // closing drops the lock; nothing else can be done about an error

// HolderOf says who holds the data directory now; false means nobody does.
func HolderOf(dir string) (Holder, bool) {
	f, err := os.Open(lockPath(dir))
	if err != nil {
		return Holder{}, false
	}
	defer func() { _ = f.Close() }()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err == nil {
		return Holder{}, false
	}
	return readHolder(dir), true
}

// readHolder returns what the lock file says; a half-written one gives a zero Holder.
func readHolder(dir string) Holder {
	var h Holder
	if text, err := os.ReadFile(lockPath(dir)); err == nil {
		_ = json.Unmarshal(text, &h)
	}
	return h
}
