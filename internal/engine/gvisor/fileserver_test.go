package gvisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/memmap"
	"gvisor.dev/gvisor/pkg/sentry/state/stateio"
	"gvisor.dev/gvisor/pkg/sentry/state/stateipc"
	"gvisor.dev/gvisor/pkg/unet"
	"gvisor.dev/gvisor/pkg/urpc"
)

// connect serves files to gVisor's own client. The server has ended, without an error, when the test does.
func connect(t *testing.T, files map[string]*os.File, write bool) *stateipc.AsyncFileClient {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- (&fileServer{sock: pair[0], write: write, files: files}).serve() }()
	sock, err := unet.NewSocket(pair[1])
	if err != nil {
		t.Fatal(err)
	}
	c, err := stateipc.NewAsyncFileClient(urpc.NewClient(sock))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.DecRef()
		if err := <-ended; err != nil {
			t.Errorf("the server ended with %v", err)
		}
		_ = unix.Close(pair[0])
	})
	return c
}

func tempFile(t *testing.T, content []byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestServedFiles writes and reads over the protocol with gVisor's own client.
func TestServedFiles(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 1024)
	target := tempFile(t, nil)
	t.Run("write", func(t *testing.T) {
		w, err := connect(t, map[string]*os.File{"pages.img": target}, true).OpenWrite("pages.img")
		if err != nil {
			t.Fatal(err)
		}
		source := tempFile(t, content)
		h, err := w.RegisterSourceFD(int32(source.Fd()), uint64(len(content)), nil)
		if err != nil {
			t.Fatal(err)
		}
		w.AddWrite(0, h, memmap.FileRange{Start: 0, End: 4096}, nil)
		w.AddWritev(1, 8192, h, []memmap.FileRange{{Start: 8192, End: 12288}, {Start: 12288, End: 16384}}, nil)
		done, err := w.Wait(nil, 2)
		want := []stateio.Completion{{ID: 0, N: 4096}, {ID: 1, N: 8192}}
		if diff := cmp.Diff(want, done); err != nil || diff != "" {
			t.Errorf("%v: %s", err, diff)
		}
		if err := errors.Join(w.Finalize(), w.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Run("read", func(t *testing.T) {
		r, err := connect(t, map[string]*os.File{"pages.img": target}, false).OpenRead("pages.img")
		if err != nil {
			t.Fatal(err)
		}
		dest := tempFile(t, make([]byte, 16384))
		h, err := r.RegisterDestinationFD(int32(dest.Fd()), 16384, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.AddRead(3, 0, h, memmap.FileRange{Start: 0, End: 4096}, nil)
		r.AddRead(4, 4096, h, memmap.FileRange{Start: 8192, End: 16384}, nil)
		r.AddRead(5, 8192, h, memmap.FileRange{Start: 0, End: 8192}, nil) // half of it is beyond the end
		done, err := r.Wait(nil, 3)
		want := []stateio.Completion{{ID: 3, N: 4096}, {ID: 4, N: 8192}, {ID: 5, N: 4096, Err: io.EOF}}
		if diff := cmp.Diff(want, done, cmp.Comparer(func(a, b error) bool { return errors.Is(a, b) })); err != nil || diff != "" {
			t.Errorf("%v: %s", err, diff)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		got := make([]byte, 8192)
		if _, err := dest.ReadAt(got, 8192); err != nil || !bytes.Equal(got, content[:8192]) {
			t.Errorf("%v: other bytes than were written", err)
		}
	})
}

// TestServedFilesRefused asks for what a sentry has no right to.
func TestServedFilesRefused(t *testing.T) {
	c := connect(t, map[string]*os.File{"pages.img": tempFile(t, nil)}, true)
	for _, name := range []string{"", "other", "../pages.img", "/etc/passwd", "pages.img/"} {
		if _, err := c.OpenWrite(name); err == nil {
			t.Errorf("open %q: no error", name)
		}
	}
	if _, err := c.OpenRead("pages.img"); err == nil {
		t.Error("read of what is to be written: no error")
	}
	w, err := c.OpenWrite("pages.img")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.OpenWrite("pages.img"); err == nil {
		t.Error("second open: no error")
	}
	source := tempFile(t, make([]byte, 8192))
	if _, err := w.RegisterSourceFD(int32(source.Fd()), 8193, nil); err == nil {
		t.Error("a file said to be larger than it is: no error")
	}
	h, err := w.RegisterSourceFD(int32(source.Fd()), 8192, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.AddWrite(0, h, memmap.FileRange{Start: 4096, End: 12288}, nil) // beyond its end
	if done, err := w.Wait(nil, 1); err != nil || len(done) != 1 || !errors.Is(done[0].Err, unix.EINVAL) {
		t.Errorf("got %+v, %v, want EINVAL", done, err)
	}
	if err := source.Truncate(0); err != nil {
		t.Fatal(err)
	}
	w.AddWrite(1, h, memmap.FileRange{Start: 0, End: 8192}, nil)
	if done, err := w.Wait(nil, 1); err != nil || len(done) != 1 || !errors.Is(done[0].Err, unix.EFAULT) {
		t.Errorf("a file that was cut off: got %+v, %v, want EFAULT", done, err)
	}
	if err := w.Finalize(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("finalize: got %v, want the first error", err)
	}
	_ = w.Close()
}

// FuzzServedCalls sends anything to a server, with a file.
func FuzzServedCalls(f *testing.F) {
	for _, seed := range []string{
		`{"method":"AsyncFileServer.Open","arg":{"path":"pages.img","mode":2}}`,
		`{"method":"AsyncFileServer.Open","arg":{"path":"pages.img","mode":2}}{"method":"AsyncFileServer.RegisterClientFile","arg":{"handle":0,"size":4096}}`,
		`{"method":"AsyncFileServer.Open","arg":{"path":"pages.img","mode":2}}{"method":"AsyncFileServer.Close","arg":{"handle":0}}{"method":"AsyncFileServer.Close","arg":{"handle":0}}`,
		`{"method":"AsyncFileServer.RegisterClientFile","arg":{"handle":4294967295,"size":18446744073709551615,"writable":true}}`,
		`{"method":"AsyncFileServer.Stop","arg":null}`, `{`, `[]`, `null`, "\x00",
	} {
		f.Add([]byte(seed), seed[0] == '{')
	}
	f.Fuzz(func(t *testing.T, raw []byte, withFile bool) {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		target, source := tempFile(t, nil), tempFile(t, make([]byte, 4096))
		s := &fileServer{sock: pair[0], write: true, files: map[string]*os.File{"pages.img": target, "none": nil}}
		ended := make(chan struct{})
		go func() { defer close(ended); _ = s.serve(); _ = unix.Shutdown(pair[0], unix.SHUT_RDWR) }()
		var oob []byte
		if withFile {
			oob = unix.UnixRights(int(source.Fd()))
		}
		if len(raw) > 0 {
			_ = unix.Sendmsg(pair[1], raw, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		}
		_ = unix.Shutdown(pair[1], unix.SHUT_WR)
		_ = unix.SetNonblock(pair[1], false)
		buf := make([]byte, 4096)
		for n := 1; n > 0; {
			n, _ = unix.Read(pair[1], buf)
		}
		<-ended
		_ = unix.Close(pair[0])
		_ = unix.Close(pair[1])
	})
}

// FuzzTransfers gives a served file any request. Whatever it says, nothing outside of the two files is touched.
func FuzzTransfers(f *testing.F) {
	f.Add(make([]byte, 64), uint32(1), true)
	f.Add(append(make([]byte, writeHeader), 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0), uint32(1), true)
	f.Add(append(make([]byte, readHeader), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0,
		0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0), uint32(1), false)
	f.Fuzz(func(t *testing.T, raw []byte, count uint32, write bool) {
		const size = 8192
		s := &fileServer{write: write}
		client := &clientFile{file: tempFile(t, make([]byte, size)), size: size, clone: true}
		served := &servedFile{server: s, file: tempFile(t, make([]byte, size)), clients: []*clientFile{client}}
		window := make([]byte, windowBytes)
		copy(window, raw)
		for range 2 {
			if n, _ := served.answer(window, count); n > maxTransfers {
				t.Errorf("%d answers", n)
			}
		}
		if client.mapping != nil {
			_ = unix.Munmap(client.mapping)
		}
		if st, err := client.file.Stat(); err != nil || st.Size() != size {
			t.Errorf("the client's file has %d bytes, %v", st.Size(), err)
		}
		if st, err := served.file.Stat(); err != nil || st.Size() > 2*maxTransfers*maxTransfer {
			t.Errorf("the served file has %d bytes, %v", st.Size(), err)
		}
	})
}

// FuzzManifest gives a start any checkpoint.json.
func FuzzManifest(f *testing.F) {
	good, err := json.Marshal(manifest{
		Format: manifestFormat, Engine: engineName, Version: "v1", Arch: "amd64", Kind: "memory",
		Files: map[string]savedFile{"checkpoint.img": {Bytes: 1, CRC32C: 1 << 31}, "pages.img": {Bytes: 2}, "pages_meta.img": {Bytes: 3}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"engine":"gvisor","format":1,"files":{"../../etc/passwd":{"bytes":1}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parseManifest(raw, "v1")
		if err != nil {
			return
		}
		for name := range m.Files {
			if filepath.Base(name) != name {
				t.Errorf("it names %q", name)
			}
		}
	})
}

// FuzzLayer gives the layer's writer any archive as the sentry's.
func FuzzLayer(f *testing.F) {
	for i := range 3 {
		f.Add(sampleTree(f, i))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		out, disk := tempFile(t, nil), tempFile(t, make([]byte, 8192))
		if err := writeLayer(out, bytes.NewReader(raw), disk); err != nil {
			return
		}
		if st, err := out.Stat(); err != nil || st.Size()%tarBlock != 0 {
			t.Errorf("a layer of %d bytes, %v", st.Size(), err)
		}
		for name := range readLayerNames(t, out) {
			if filepath.IsAbs(name) || name != "./" && !filepath.IsLocal(name) {
				t.Errorf("the layer names %q", name)
			}
		}
	})
}

func TestAllStopped(t *testing.T) {
	const (
		stopped = "goroutine 1 [sync.Cond.Wait, 2 minutes]:\nx/kernel.(*Task).doStop(0x1)\nx/kernel.(*Task).run(0x1, 0x2)\n"
		running = "goroutine 2 [chan receive]:\nx/kernel.(*Task).block(0x1)\nx/kernel.(*Task).run(0x1, 0x2)\n"
		woken   = "goroutine 2 [runnable]:\nsync.runtime_notifyListWait(0x1)\nx/kernel.(*Task).doStop(0x1)\nx/kernel.(*Task).run(0x1, 0x2)\n"
		other   = "goroutine 3 [running]:\nmain.main()\n"
	)
	for _, tt := range []struct {
		stacks string
		want   bool
	}{
		{stopped, true},
		{running, false},
		{woken, false},
		{other, false},
		{other + "\n" + stopped, true},
		{stopped + "\n" + running, false},
		{stopped + "\n" + woken, false},
		{"", false},
	} {
		if got := allStopped([]byte(tt.stacks)); got != tt.want {
			t.Errorf("got %t, want %t: %s", got, tt.want, fmt.Sprintf("%.200q", tt.stacks))
		}
	}
}
