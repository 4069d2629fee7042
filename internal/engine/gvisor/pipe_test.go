package gvisor

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/memmap"
	"gvisor.dev/gvisor/pkg/sentry/state/stateio"
)

// TestIncomingInAnyOrder reads a pipe's parts as a sentry that is in a hurry for some of them would.
func TestIncomingInAnyOrder(t *testing.T) {
	const part, parts = 5000, 40
	want := make([]byte, part*parts)
	for i := range want {
		want[i] = byte(rand.Int())
	}
	r, w, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	go func() {
		_, _ = w.Write(want) // read to its end
		_ = w.Close()
	}()
	in := incoming{pipe: r, kept: tempFile(t, nil)}
	got := make([]byte, len(want))
	for _, i := range rand.Perm(parts) {
		if n, err := in.readAt(got[i*part:(i+1)*part], int64(i*part)); n != part || err != nil {
			t.Fatalf("part %d: got %d bytes, %v", i, n, err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("the parts differ from what was written")
	}
	if n, err := in.readAt(make([]byte, 1), int64(len(want))); !errors.Is(err, errShort) || n != 0 {
		t.Errorf("behind the end: got %d bytes, %v", n, err)
	}
	if _, err := in.readAt(make([]byte, 1), int64(len(want)+1)); !errors.Is(err, errShort) {
		t.Errorf("far behind the end: got %v", err)
	}
}

// TestReleased lets a guest go only where the pipe says so, and not where its writer has died.
func TestReleased(t *testing.T) {
	for text, want := range map[string]bool{"": false, "page": false, "page" + goMark: true, "page" + goMark + "x": false, "pag" + goMark: false} {
		r, w, err := newPipe()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString(text); err != nil {
			t.Fatal(err)
		}
		_ = w.Close() // written
		in := incoming{pipe: r, kept: tempFile(t, nil)}
		_, _ = in.readAt(make([]byte, len("page")), 0) // too short in some cases
		if got := in.released(); got != want {
			t.Errorf("%q: got %t", text, got)
		}
		_ = r.Close() // read
	}
}

// TestPipeWaitsForFiles writes to a pipe before the other file is whole, with gVisor's own client.
func TestPipeWaitsForFiles(t *testing.T) {
	r, w, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	small := tempFile(t, nil)
	c := connect(t, map[string]*os.File{"small": small, "pages": w}, true)
	pages, err := c.OpenWrite("pages")
	if err != nil {
		t.Fatal(err)
	}
	other, err := c.OpenWrite("small")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	if _, err := source.Write(bytes.Repeat([]byte("x"), 4096)); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		sf, err := pages.RegisterSourceFD(int32(source.Fd()), 4096, nil)
		if err == nil {
			pages.AddWrite(0, sf, memmap.FileRange{End: 4096}, nil)
			var done []stateio.Completion
			done, err = pages.Wait(nil, 1)
			for _, d := range done {
				err = errors.Join(err, d.Err)
			}
		}
		written <- err
	}()
	poll := []unix.PollFd{{Fd: int32(r.Fd()), Events: unix.POLLIN}}
	if n, err := unix.Poll(poll, int((20 * time.Millisecond).Milliseconds())); n != 0 || err != nil {
		t.Errorf("before the file is whole: got %d, %v, want that nothing has come", n, err)
	}
	if err := other.Finalize(); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]byte, 8192)); n != 4096 || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
	if err := errors.Join(pages.Close(), other.Close(), w.Close()); err != nil {
		t.Error(err)
	}
}
