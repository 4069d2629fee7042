package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

const (
	watchMask = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE | unix.IN_DELETE_SELF |
		unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_MOVE_SELF | unix.IN_EXCL_UNLINK
	// watchBuffer holds one read of events, each of at most 16 bytes and a name.
	watchBuffer = 8 << 10
	// maxWatched bounds how many directories one recursive watch covers.
	maxWatched = 65_536
	// maxAnnounced bounds how many entries found by looking are remembered until the kernel reports them, too.
	maxAnnounced = 4096
)

// File systems on which changes made elsewhere are not reported; the numbers are in statfs(2).
const (
	magicNFS  = 0x6969
	magicSMB  = 0x517b
	magicSMB2 = 0xfe534d42
	magicCIFS = 0xff534d42
	magicFUSE = 0x65735546
)

// watcher reports what happens in a directory, and if recursive below it. The kernel's queue is the only one: a client
// that does not keep up loses the watch with an error once that is full. It is used by one goroutine, but for stop.
type watcher struct {
	server    *Server
	file      *os.File
	root      string
	recursive bool
	withEntry bool

	dirs map[int32]string // watch descriptor to path relative to root, "" for the root
	// moved is a directory that left its place in the last event: the next one tells where to.
	moved struct {
		cookie uint32
		path   string
	}
	announced map[string]struct{}
	emit      func(*filesystem.FilesystemEvent) error
}

// watchRequest is what the two ways of watching have in common.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

// newWatcher checks the request and watches from here on.
func (s *filesystemService) newWatcher(ctx context.Context, req watchRequest) (*watcher, error) {
	_, path, err := s.locate(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	root, err := directory(path)
	if err != nil {
		return nil, err
	}
	if !req.GetAllowNetworkMounts() && onNetwork(root) {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(
			"path '%s' is on a network file system, which does not report changes made elsewhere: set allow_network_mounts to watch it all the same", path))
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("watch '%s': %w", path, err))
	}
	w := &watcher{
		server: s.Server, root: root, recursive: req.GetRecursive(), withEntry: req.GetIncludeEntry(),
		file: os.NewFile(uintptr(fd), "inotify"), dirs: map[int32]string{}, announced: map[string]struct{}{},
	}
	if err := w.add("", nil); err != nil {
		w.stop()
		return nil, rpcError(fmt.Errorf("watch '%s': %w", path, err))
	}
	return w, nil
}

func onNetwork(path string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false
	}
	switch uint32(st.Type) { //nolint:gosec // Magic numbers have 32 bits.
	case magicNFS, magicSMB, magicSMB2, magicCIFS, magicFUSE:
		return true
	}
	return false
}

// stop ends a running watch; it may be called from anywhere, more than once.
func (w *watcher) stop() { _ = w.file.Close() }

// add watches the directory at rel, and if recursive those below it. With found, it is called for each entry there.
func (w *watcher) add(rel string, found func(rel string, d fs.DirEntry) error) error {
	if len(w.dirs) >= maxWatched {
		return fmt.Errorf("more than %d directories to watch: %w", maxWatched, unix.ENOSPC)
	}
	path := filepath.Join(w.root, rel)
	wd, err := w.watch(path)
	if err != nil {
		return &fs.PathError{Op: "watch", Path: path, Err: err}
	}
	w.dirs[wd] = rel
	if !w.recursive {
		return nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, d := range entries {
		name := filepath.Join(rel, d.Name())
		if found != nil {
			if err := found(name, d); err != nil {
				return err
			}
		}
		if !d.IsDir() {
			continue
		}
		if err := w.add(name, found); err != nil && !isGone(err) {
			return err
		}
	}
	return nil
}

// watch and unwatch go through the file so that a stop meanwhile cannot hand the descriptor to somebody else.
func (w *watcher) watch(path string) (wd int32, err error) {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := conn.Control(func(fd uintptr) {
		var n int
		n, err = unix.InotifyAddWatch(int(fd), path, watchMask|unix.IN_ONLYDIR|unix.IN_DONT_FOLLOW)
		wd = int32(n) //nolint:gosec // Watch descriptors have 32 bits.
	})
	return wd, errors.Join(controlErr, err)
}

func (w *watcher) unwatch(wd int32) {
	delete(w.dirs, wd)
	conn, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) {
		_, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) //nolint:gosec // Back to the kernel's own type; it may have removed it.
	})
}

// isGone says that a directory went away, or became unreadable, before it could be watched.
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ELOOP)
}

// run passes events to emit until ctx ends, stop is called, or emit fails. After each period of silence of the given
// length it calls idle.
func (w *watcher) run(ctx context.Context, silence time.Duration, emit func(*filesystem.FilesystemEvent) error, idle func() error) error {
	w.emit = emit
	defer context.AfterFunc(ctx, w.stop)()
	buf := make([]byte, watchBuffer)
	for {
		if idle != nil {
			_ = w.file.SetReadDeadline(time.Now().Add(silence)) // fails only on a closed file, as the read then does
		}
		n, err := w.file.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = idle()
		case err == nil:
			err = w.handle(buf[:n])
		case ctx.Err() != nil:
			return endOfStream(ctx)
		}
		if err != nil {
			return rpcError(err)
		}
	}
}

// handle takes one read's worth of events.
func (w *watcher) handle(events []byte) error {
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events)) //nolint:gosec // The kernel wrote a signed number.
		mask, cookie := binary.NativeEndian.Uint32(events[4:]), binary.NativeEndian.Uint32(events[8:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		if end > len(events) {
			return errors.New("inotify: an event is longer than what was read")
		}
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00")
		events = events[end:]
		if err := w.event(wd, mask, cookie, name); err != nil {
			return err
		}
	}
	return nil
}

func (w *watcher) event(wd int32, mask, cookie uint32, name string) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		return connect.NewError(connect.CodeDataLoss, errors.New("events came faster than they were read, and some were lost: start a new watch"))
	}
	w.settleMove(mask, cookie)
	dir, known := w.dirs[wd]
	if !known {
		return nil
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(w.dirs, wd)
		return nil
	}
	if name == "" && dir != "" {
		return nil // a subdirectory about itself: its parent reports the same
	}
	rel := filepath.Join(dir, name)
	isDir := mask&unix.IN_ISDIR != 0
	switch {
	case mask&unix.IN_MOVED_FROM != 0 && isDir:
		w.moved.cookie, w.moved.path = cookie, rel
	case mask&unix.IN_MOVED_TO != 0 && isDir && w.moved.path != "":
		w.renameDirs(w.moved.path, rel)
		w.moved.path = ""
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0 && isDir && w.recursive:
		if _, twice := w.announced[rel]; twice {
			delete(w.announced, rel)
			return nil
		}
		return w.newDirectory(rel)
	}
	return w.report(rel, mask)
}

// settleMove forgets a directory that was moved out of sight: anything but its arrival is no longer about it.
func (w *watcher) settleMove(mask, cookie uint32) {
	if w.moved.path == "" || (mask&unix.IN_MOVED_TO != 0 && cookie == w.moved.cookie) {
		return
	}
	for wd, dir := range w.dirs {
		if within(dir, w.moved.path) {
			w.unwatch(wd)
		}
	}
	w.moved.path = ""
}

// renameDirs follows a directory that moved within the watched tree.
func (w *watcher) renameDirs(from, to string) {
	for wd, dir := range w.dirs {
		if within(dir, from) {
			w.dirs[wd] = to + dir[len(from):]
		}
	}
}

func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// newDirectory watches a directory that appeared, and reports what was put into it before the watch was in place. The
// kernel may report some of that, too; the first such report is dropped.
func (w *watcher) newDirectory(rel string) error {
	if err := w.report(rel, unix.IN_CREATE); err != nil {
		return err
	}
	err := w.add(rel, func(name string, d fs.DirEntry) error {
		if len(w.announced) >= maxAnnounced {
			clear(w.announced)
		}
		delete(w.announced, name)
		if err := w.report(name, unix.IN_CREATE); err != nil {
			return err
		}
		w.announced[name] = struct{}{}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
			return w.report(name, unix.IN_MODIFY)
		}
		return nil
	})
	if isGone(err) {
		return nil
	}
	return err
}

// report emits the events of one mask.
func (w *watcher) report(rel string, mask uint32) error {
	if mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0 {
		if _, twice := w.announced[rel]; twice {
			delete(w.announced, rel)
			return nil
		}
	}
	if mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0 {
		delete(w.announced, rel)
	}
	for _, kind := range eventTypes(mask) {
		e := &filesystem.FilesystemEvent{Name: rel, Type: kind}
		if rel == "" {
			e.Name = "."
		}
		if w.withEntry {
			e.Entry, _ = w.server.entry(filepath.Join(w.root, rel)) // nil for what is gone
		}
		if err := w.emit(e); err != nil {
			return err
		}
	}
	return nil
}

func eventTypes(mask uint32) (types []filesystem.EventType) {
	for _, m := range []struct {
		bits uint32
		kind filesystem.EventType
	}{
		{unix.IN_CREATE | unix.IN_MOVED_TO, filesystem.EventType_EVENT_TYPE_CREATE},
		{unix.IN_MODIFY, filesystem.EventType_EVENT_TYPE_WRITE},
		{unix.IN_DELETE | unix.IN_DELETE_SELF, filesystem.EventType_EVENT_TYPE_REMOVE},
		{unix.IN_MOVED_FROM | unix.IN_MOVE_SELF, filesystem.EventType_EVENT_TYPE_RENAME},
		{unix.IN_ATTRIB, filesystem.EventType_EVENT_TYPE_CHMOD},
	} {
		if mask&m.bits != 0 {
			types = append(types, m.kind)
		}
	}
	return types
}
