package guest

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

func TestStat(t *testing.T) {
	a := newAgent(t)
	must(t, os.WriteFile(filepath.Join(a.home, "f"), []byte("hello"), 0o640))
	must(t, os.Symlink("f", filepath.Join(a.home, "link")))
	must(t, os.Symlink("nowhere", filepath.Join(a.home, "dangling")))
	res, err := a.fs.Stat(t.Context(), &filesystem.StatRequest{Path: "f"})
	must(t, err)
	e := res.GetEntry()
	if e.GetName() != "f" || e.GetPath() != a.home+"/f" || e.GetType() != filesystem.FileType_FILE_TYPE_FILE || e.GetSize() != 5 || e.GetMode() != 0o640 ||
		e.GetPermissions() != "-rw-r-----" || e.GetOwner() != "user" || e.GetGroup() != "user" || e.GetModifiedTime() == nil || e.SymlinkTarget != nil {
		t.Errorf("entry: %v", e)
	}
	res, err = a.fs.Stat(t.Context(), &filesystem.StatRequest{Path: "link"})
	must(t, err)
	if e := res.GetEntry(); e.GetType() != filesystem.FileType_FILE_TYPE_FILE || e.GetSymlinkTarget() != a.home+"/f" || e.GetPermissions()[0] != 'L' || e.GetName() != "link" {
		t.Errorf("link: %v", e)
	}
	res, err = a.fs.Stat(t.Context(), &filesystem.StatRequest{Path: "dangling"})
	must(t, err)
	if e := res.GetEntry(); e.GetType() != filesystem.FileType_FILE_TYPE_SYMLINK || e.GetSymlinkTarget() != "nowhere" {
		t.Errorf("dangling link: %v", e)
	}
	_, err = a.fs.Stat(t.Context(), &filesystem.StatRequest{Path: "missing"})
	wantCode(t, err, connect.CodeNotFound, "path '"+a.home+"/missing' does not exist")
	_, err = a.fs.Stat(as(t, "x"), &filesystem.StatRequest{Path: "f"})
	wantCode(t, err, connect.CodeUnauthenticated, "invalid username: 'x'")
	_, err = a.fs.Stat(t.Context(), &filesystem.StatRequest{Path: "~x/f"})
	wantCode(t, err, connect.CodeInvalidArgument, "~x/f")
}

func TestMakeMoveRemove(t *testing.T) {
	a := newAgent(t)
	ctx := t.Context()
	res, err := a.fs.MakeDir(ctx, &filesystem.MakeDirRequest{Path: "a/b/c"})
	must(t, err)
	if e := res.GetEntry(); e.GetType() != filesystem.FileType_FILE_TYPE_DIRECTORY || e.GetMode() != 0o755 || e.GetPath() != a.home+"/a/b/c" {
		t.Errorf("made %v", e)
	}
	_, err = a.fs.MakeDir(ctx, &filesystem.MakeDirRequest{Path: "a/b"})
	wantCode(t, err, connect.CodeAlreadyExists, a.home+"/a/b")
	must(t, os.WriteFile(filepath.Join(a.home, "f"), nil, 0o644))
	_, err = a.fs.MakeDir(ctx, &filesystem.MakeDirRequest{Path: "f"})
	wantCode(t, err, connect.CodeInvalidArgument, "not a directory")
	_, err = a.fs.MakeDir(ctx, &filesystem.MakeDirRequest{Path: "f/x"})
	wantCode(t, err, connect.CodeInvalidArgument, "not a directory")

	moved, err := a.fs.Move(ctx, &filesystem.MoveRequest{Source: "f", Destination: "new/dir/g"})
	must(t, err)
	if moved.GetEntry().GetPath() != a.home+"/new/dir/g" {
		t.Errorf("moved to %v", moved)
	}
	_, err = a.fs.Move(ctx, &filesystem.MoveRequest{Source: "f", Destination: "h"})
	wantCode(t, err, connect.CodeNotFound, a.home+"/f")
	_, err = a.fs.Move(ctx, &filesystem.MoveRequest{Source: "new", Destination: "a"})
	wantCode(t, err, connect.CodeAlreadyExists, "file exists")

	for range 2 { // what is missing is removed already
		_, err = a.fs.Remove(ctx, &filesystem.RemoveRequest{Path: "a"})
		must(t, err)
	}
	if _, err := os.Stat(filepath.Join(a.home, "a")); err == nil {
		t.Error("not removed")
	}
}

func TestListDir(t *testing.T) {
	a := newAgent(t)
	must(t, os.MkdirAll(filepath.Join(a.home, "d/sub/deep"), 0o755))
	must(t, os.WriteFile(filepath.Join(a.home, "d/sub/deep/f"), nil, 0o644))
	must(t, os.Symlink("sub", filepath.Join(a.home, "d/link")))
	must(t, os.Symlink("loop", filepath.Join(a.home, "d/loop")))
	must(t, os.Symlink(filepath.Join(a.home, "d"), filepath.Join(a.home, "way")))
	for _, test := range []struct {
		path  string
		depth uint32
		want  string
	}{
		{"d", 0, "d/link d/loop d/sub"},
		{"d", 1, "d/link d/loop d/sub"},
		{"d", 2, "d/link d/loop d/sub d/sub/deep"},
		{"d", 9, "d/link d/loop d/sub d/sub/deep d/sub/deep/f"},
		{"way", 1, "way/link way/loop way/sub"},
		{"d/sub/deep", 1, "d/sub/deep/f"},
	} {
		res, err := a.fs.ListDir(t.Context(), &filesystem.ListDirRequest{Path: test.path, Depth: test.depth})
		must(t, err)
		var got []string
		for _, e := range res.GetEntries() {
			got = append(got, strings.TrimPrefix(e.GetPath(), a.home+"/"))
			if e.GetName() != filepath.Base(e.GetPath()) {
				t.Errorf("%s is named %s", e.GetPath(), e.GetName())
			}
		}
		if diff := cmp.Diff(strings.Fields(test.want), got); diff != "" {
			t.Errorf("%s to depth %d (-want +got):\n%s", test.path, test.depth, diff)
		}
	}
	for path, code := range map[string]connect.Code{"none": connect.CodeNotFound, "d/sub/deep/f": connect.CodeInvalidArgument, "d/loop": connect.CodeFailedPrecondition} {
		_, err := a.fs.ListDir(t.Context(), &filesystem.ListDirRequest{Path: path})
		wantCode(t, err, code, a.home+"/"+path)
	}
	_, err := a.fs.ListDir(t.Context(), &filesystem.ListDirRequest{Path: "d/loop"})
	wantCode(t, err, connect.CodeFailedPrecondition, "cyclic symlink")
}

// watching is an open WatchDir.
type watching struct {
	t      *testing.T
	stream *connect.ServerStreamForClient[filesystem.WatchDirResponse]
	seen   []string
	last   *filesystem.FilesystemEvent
}

func (a *agent) watch(t *testing.T, req *filesystem.WatchDirRequest) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := a.fs.WatchDir(ctx, req)
	must(t, err)
	t.Cleanup(func() { _ = stream.Close() })
	t.Cleanup(cancel)
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("no start event: %v", stream.Err())
	}
	return &watching{t: t, stream: stream}
}

// until receives until an event, as "CREATE name", came.
func (w *watching) until(want ...string) {
	w.t.Helper()
	for _, event := range want {
		for !slices.Contains(w.seen, event) {
			if !w.stream.Receive() {
				w.t.Fatalf("waiting for %q: %v; seen %q", event, w.stream.Err(), w.seen)
			}
			if w.last = w.stream.Msg().GetFilesystem(); w.last != nil {
				w.seen = append(w.seen, describe(w.last))
			}
		}
	}
}

func describe(e *filesystem.FilesystemEvent) string {
	return strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_") + " " + e.GetName()
}

func TestWatchDir(t *testing.T) {
	a := newAgent(t)
	must(t, os.MkdirAll(filepath.Join(a.home, "w/sub"), 0o755))
	w := a.watch(t, &filesystem.WatchDirRequest{Path: "w", IncludeEntry: true})
	file := filepath.Join(a.home, "w/f")
	a.put(t, "w/f", "text")
	w.until("CREATE f", "WRITE f")
	if w.seen[0] != "CREATE f" || w.last.GetEntry().GetPath() != file {
		t.Errorf("seen %q; entry %v", w.seen, w.last.GetEntry())
	}
	must(t, os.Chmod(file, 0o600))
	w.until("CHMOD f")
	must(t, os.Rename(file, file+"2"))
	w.until("RENAME f", "CREATE f2")
	must(t, os.Remove(file+"2"))
	w.until("REMOVE f2")
	if w.last.GetEntry() != nil {
		t.Errorf("what is gone has an entry: %v", w.last)
	}
	must(t, os.WriteFile(filepath.Join(a.home, "w/sub/hidden"), nil, 0o644))
	must(t, os.Mkdir(filepath.Join(a.home, "w/end"), 0o755))
	w.until("CREATE end")
	if slices.ContainsFunc(w.seen, func(s string) bool { return strings.Contains(s, "hidden") }) {
		t.Errorf("a watch that is not recursive reported a subdirectory: %q", w.seen)
	}
}

func TestWatchRecursive(t *testing.T) {
	a := newAgent(t)
	in := func(name string) string { return filepath.Join(a.home, "w", name) }
	must(t, os.MkdirAll(in("old/er"), 0o755))
	w := a.watch(t, &filesystem.WatchDirRequest{Path: "w", Recursive: true})
	must(t, os.WriteFile(in("old/er/f"), []byte("1"), 0o644))
	w.until("CREATE old/er/f", "WRITE old/er/f")
	// Whole trees that appear at once: by being made, and by being moved here.
	must(t, os.MkdirAll(in("made/a/b/c"), 0o755))
	must(t, os.WriteFile(in("made/a/b/c/f"), []byte("1"), 0o644))
	w.until("CREATE made", "CREATE made/a", "CREATE made/a/b", "CREATE made/a/b/c", "CREATE made/a/b/c/f", "WRITE made/a/b/c/f")
	must(t, os.MkdirAll(filepath.Join(a.home, "out/x"), 0o755))
	must(t, os.WriteFile(filepath.Join(a.home, "out/x/f"), []byte("1"), 0o644))
	must(t, os.Rename(filepath.Join(a.home, "out"), in("in")))
	w.until("CREATE in", "CREATE in/x", "CREATE in/x/f", "WRITE in/x/f")
	// A directory that moves within keeps being watched, under its new name.
	must(t, os.Rename(in("made/a"), in("renamed")))
	w.until("RENAME made/a", "CREATE renamed")
	must(t, os.WriteFile(in("renamed/b/c/g"), []byte("1"), 0o644))
	w.until("CREATE renamed/b/c/g", "WRITE renamed/b/c/g")
	// One that moves away is no longer watched; its name can come back.
	must(t, os.Rename(in("in"), filepath.Join(a.home, "away")))
	must(t, os.WriteFile(filepath.Join(a.home, "away/x/unseen"), []byte("1"), 0o644))
	must(t, os.MkdirAll(in("in/y"), 0o755))
	w.until("RENAME in", "CREATE in/y")
	must(t, os.WriteFile(in("in/y/end"), nil, 0o644))
	w.until("CREATE in/y/end")
	for _, event := range []string{"CREATE made/a/b/c/f", "CREATE made", "CREATE made/a"} {
		if n := len(slices.DeleteFunc(slices.Clone(w.seen), func(s string) bool { return s != event })); n != 1 {
			t.Errorf("%q came %d times", event, n)
		}
	}
	if slices.ContainsFunc(w.seen, func(s string) bool { return strings.Contains(s, "unseen") }) {
		t.Errorf("what moved away was reported: %q", w.seen)
	}
}

func TestWatchErrors(t *testing.T) {
	a := newAgent(t)
	must(t, os.WriteFile(filepath.Join(a.home, "f"), nil, 0o644))
	for path, code := range map[string]connect.Code{"none": connect.CodeNotFound, "f": connect.CodeInvalidArgument} {
		stream, err := a.fs.WatchDir(t.Context(), &filesystem.WatchDirRequest{Path: path})
		must(t, err)
		if stream.Receive() {
			t.Errorf("%s is watched", path)
		}
		wantCode(t, stream.Err(), code, path)
		_ = stream.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	stream, err := a.fs.WatchDir(ctx, &filesystem.WatchDirRequest{Path: "."})
	must(t, err)
	for stream.Receive() {
	}
	wantCode(t, stream.Err(), connect.CodeDeadlineExceeded, "")
	_ = stream.Close()
}

func TestWatchKeepalive(t *testing.T) {
	a := newAgent(t)
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set(keepaliveHeader, "1")
	stream, err := a.fs.WatchDir(ctx, &filesystem.WatchDirRequest{Path: "."})
	must(t, err)
	defer stream.Close() //nolint:errcheck // It was only read.
	for stream.Receive() && stream.Msg().GetKeepalive() == nil {
	}
	if stream.Msg().GetKeepalive() == nil {
		t.Error(stream.Err())
	}
}

func TestPolledWatch(t *testing.T) {
	a := newAgent(t)
	ctx := t.Context()
	created, err := a.fs.CreateWatcher(ctx, &filesystem.CreateWatcherRequest{Path: ".", Recursive: true})
	must(t, err)
	id := created.GetWatcherId()
	res, err := a.fs.GetWatcherEvents(ctx, &filesystem.GetWatcherEventsRequest{WatcherId: id})
	if err != nil || len(res.GetEvents()) != 0 {
		t.Errorf("before anything happened: %v, %v", res, err)
	}
	a.put(t, "new/f", "x")
	var seen []string
	for !slices.Contains(seen, "WRITE new/f") {
		res, err := a.fs.GetWatcherEvents(ctx, &filesystem.GetWatcherEventsRequest{WatcherId: id})
		must(t, err)
		for _, e := range res.GetEvents() {
			seen = append(seen, describe(e))
		}
	}
	if seen[0] != "CREATE new" {
		t.Errorf("seen %q", seen)
	}
	_, err = a.fs.RemoveWatcher(ctx, &filesystem.RemoveWatcherRequest{WatcherId: id})
	must(t, err)
	_, err = a.fs.RemoveWatcher(ctx, &filesystem.RemoveWatcherRequest{WatcherId: id})
	wantCode(t, err, connect.CodeNotFound, id)
	_, err = a.fs.GetWatcherEvents(ctx, &filesystem.GetWatcherEventsRequest{WatcherId: id})
	wantCode(t, err, connect.CodeNotFound, id)
	for range maxPollWatchers {
		_, err = a.fs.CreateWatcher(ctx, &filesystem.CreateWatcherRequest{Path: "."})
		must(t, err)
	}
	_, err = a.fs.CreateWatcher(ctx, &filesystem.CreateWatcherRequest{Path: "."})
	wantCode(t, err, connect.CodeResourceExhausted, strconv.Itoa(maxPollWatchers))
}

func TestPolledWatchOverflow(t *testing.T) {
	s := New(Config{Root: t.TempDir()})
	dir := t.TempDir()
	service := &filesystemService{s}
	must(t, os.MkdirAll(filepath.Join(s.cfg.Root, "etc"), 0o755))
	must(t, os.WriteFile(filepath.Join(s.cfg.Root, "etc/passwd"), []byte("user:x:0:0::/:/bin/sh\n"), 0o644))
	w, err := service.newWatcher(t.Context(), &filesystem.CreateWatcherRequest{Path: dir})
	must(t, err)
	p := &pollWatcher{watcher: w, events: make([]*filesystem.FilesystemEvent, maxPolled)}
	done := make(chan struct{})
	go func() { defer close(done); p.collect() }()
	must(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
	<-done
	if events, err := p.poll(); len(events) != maxPolled || err != nil {
		t.Errorf("%d events, %v", len(events), err)
	}
	_, err = p.poll()
	wantCode(t, err, connect.CodeDataLoss, "create a new watcher")
	err = w.event(0, unix.IN_Q_OVERFLOW, 0, "")
	wantCode(t, err, connect.CodeDataLoss, "new watch")
}

func TestCodes(t *testing.T) {
	for errno, want := range map[error]connect.Code{
		syscall.ENOENT: connect.CodeNotFound, syscall.ENOTEMPTY: connect.CodeFailedPrecondition, syscall.EEXIST: connect.CodeAlreadyExists,
		syscall.EACCES: connect.CodePermissionDenied, syscall.EROFS: connect.CodePermissionDenied, syscall.ENAMETOOLONG: connect.CodeInvalidArgument,
		syscall.EXDEV: connect.CodeFailedPrecondition, syscall.ENOSPC: connect.CodeResourceExhausted, syscall.EIO: connect.CodeInternal,
	} {
		if got := connect.CodeOf(rpcError(fmt.Errorf("x: %w", errno))); got != want {
			t.Errorf("%v: %v, want %v", errno, got, want)
		}
	}
}

func FuzzInotify(f *testing.F) {
	event := func(wd int32, mask, cookie uint32, name string) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(wd))
		b = binary.NativeEndian.AppendUint32(b, mask)
		b = binary.NativeEndian.AppendUint32(b, cookie)
		b = binary.NativeEndian.AppendUint32(b, uint32(len(name)))
		return append(b, name...)
	}
	f.Add(slices.Concat(event(1, unix.IN_MOVED_FROM|unix.IN_ISDIR, 7, "a\x00"), event(1, unix.IN_MOVED_TO|unix.IN_ISDIR, 7, "b\x00"), event(2, unix.IN_CREATE, 0, "c")))
	f.Fuzz(func(_ *testing.T, events []byte) {
		w := &watcher{server: New(Config{}), root: "/nonexistent", dirs: map[int32]string{1: "", 2: "a"}, announced: map[string]struct{}{}, file: os.NewFile(^uintptr(0), "none")}
		w.emit = func(*filesystem.FilesystemEvent) error { return nil }
		_ = w.handle(events) // must neither panic nor read past the end
	})
}
