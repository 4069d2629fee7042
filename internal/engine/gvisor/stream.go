package gvisor

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"
	runscboot "gvisor.dev/gvisor/runsc/boot"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// A stream is a checkpoint of memory on its way from a sentry to another one: the manifest with its length before it (4 bytes,
// big endian), the files that are small, and the guest's pages up to the end. No page is ever in a file. The sentry writes them
// from its memory to a file server, this process takes them through a pipe, and on the other side they take the same way into
// the memory of the sentry that goes on.

const (
	// pipeBytes is how much of the pages may be under way in one pipe.
	pipeBytes = 1 << 20
	// maxStreamed bounds a file of a stream that is no pages, in bytes.
	maxStreamed = 4 << 30
	// loadTick is how often a sentry is asked whether it has loaded everything.
	loadTick = time.Millisecond
)

// streamedFiles are those that come before the pages.
func streamedFiles() []string {
	return []string{checkpointfiles.StateFileName, checkpointfiles.PagesMetadataFileName}
}

// newPipe makes a pipe of which the first end is for reading.
func newPipe() (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeBytes) // a smaller one is slower, and no more
	return os.NewFile(uintptr(fds[0]), "pages"), os.NewFile(uintptr(fds[1]), "pages"), nil
}

// newMemory makes a file that is only in memory.
func newMemory(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// memories makes the files that come before the pages.
func memories() (map[string]*os.File, error) {
	files := map[string]*os.File{}
	for _, name := range streamedFiles() {
		f, err := newMemory(name)
		if err != nil {
			closeFiles(files)
			return nil, err
		}
		files[name] = f
	}
	return files, nil
}

func closeFiles(files map[string]*os.File) {
	for _, f := range files {
		_ = f.Close() // what was written is read elsewhere, or not at all
	}
}

// stream saves the guest into spec.Stream.
func (s *saving) stream(ctx context.Context) (engine.Saved, error) {
	if s.spec.Kind != engine.SaveMemory {
		return engine.Saved{}, sandbox.Unsupportedf("a guest is streamed with its memory: got kind %q", s.spec.Kind)
	}
	if s.spec.Hold {
		if err := s.e.freeze(ctx, s.g); err != nil {
			return engine.Saved{}, err
		}
	}
	files, err := memories()
	if err != nil {
		return engine.Saved{}, err
	}
	defer closeFiles(files)
	pages, in, err := newPipe()
	if err != nil {
		return engine.Saved{}, err
	}
	defer func() { _ = pages.Close() }() // read to its end, or given up
	files[checkpointfiles.PagesFileName] = in
	server, err := startFileServer(ctx, files, true, room{})
	_ = in.Close() // the server has its own
	delete(files, checkpointfiles.PagesFileName)
	if err != nil {
		return engine.Saved{}, err
	}
	var saved engine.Saved
	sent := make(chan error, 1)
	go func() {
		saved, err = s.send(files, pages)
		if err != nil {
			_ = pages.Close() // ends the save
		}
		sent <- err
	}()
	s.served = true
	askErr := s.askWith(ctx, []*os.File{server.sock})
	_, serverErr := server.wait()
	if sendErr := <-sent; sendErr != nil { // the others follow from it
		return engine.Saved{}, fmt.Errorf("send: %w", sendErr)
	}
	return saved, errors.Join(askErr, serverErr)
}

// send writes the stream. With the first page, the files are whole.
func (s *saving) send(files map[string]*os.File, pages *os.File) (engine.Saved, error) {
	buf := make([]byte, pipeBytes)
	n, err := pages.Read(buf)
	if err != nil && !errors.Is(err, io.EOF) {
		return engine.Saved{}, err
	}
	saved, err := s.sendHead(files)
	if err != nil {
		return engine.Saved{}, err
	}
	if _, err := s.spec.Stream.Write(buf[:n]); err != nil {
		return engine.Saved{}, err
	}
	rest, err := io.CopyBuffer(onlyWriter{s.spec.Stream}, onlyReader{pages}, buf)
	saved.MemoryBytes = int64(n) + rest
	saved.Bytes += saved.MemoryBytes
	return saved, err
}

// onlyWriter and onlyReader hide what would copy in smaller pieces.
type (
	onlyWriter struct{ io.Writer }
	onlyReader struct{ io.Reader }
)

// sendHead writes what comes before the pages.
func (s *saving) sendHead(files map[string]*os.File) (saved engine.Saved, err error) {
	m := manifest{
		Format: manifestFormat, Engine: engineName, Version: moduleVersion(), Arch: runtime.GOARCH,
		Kind: s.spec.Kind, Limits: s.g.rec.Limits, Hostname: s.g.rec.Hostname, DiskBytes: s.g.diskBytes(),
		Files: map[string]savedFile{checkpointfiles.PagesFileName: {}},
	}
	for name, f := range files {
		info, err := f.Stat()
		if err != nil {
			return saved, err
		}
		m.Files[name] = savedFile{Bytes: info.Size()}
		saved.Bytes += info.Size()
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return saved, err
	}
	if _, err := s.spec.Stream.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(raw))), raw...)); err != nil { //nolint:gosec // small
		return saved, err
	}
	for _, name := range streamedFiles() {
		if _, err := io.Copy(s.spec.Stream, io.NewSectionReader(files[name], 0, m.Files[name].Bytes)); err != nil {
			return saved, err
		}
	}
	return saved, nil
}

// inflow is a stream that a guest comes from.
type inflow struct {
	from io.Reader
	// files are for the server; with them is the end of the pages' pipe that it reads. They are the start's until take.
	files map[string]*os.File
	pages *os.File
}

// receiveHead reads what comes before the pages.
func (in *inflow) receiveHead(spec *engine.Spec) error {
	var length [4]byte
	if _, err := io.ReadFull(in.from, length[:]); err != nil {
		return broken(err)
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxManifest {
		return sandbox.Invalidf("stream with a manifest of %d bytes: want at most %d", n, maxManifest)
	}
	raw := make([]byte, n)
	if _, err := io.ReadFull(in.from, raw); err != nil {
		return broken(err)
	}
	m, err := parseManifest(raw, moduleVersion())
	switch {
	case err != nil:
		return fmt.Errorf("stream: %w", err)
	case m.Kind != engine.SaveMemory || m.Limits != spec.Limits:
		return sandbox.Invalidf("stream of kind %q with limits %+v: a guest can only go on with them: got %+v", m.Kind, m.Limits, spec.Limits)
	}
	for _, name := range streamedFiles() {
		size := m.Files[name].Bytes
		if size > maxStreamed {
			return sandbox.Invalidf("stream with %d bytes of %s: want at most %d", size, name, int64(maxStreamed))
		}
		if _, err := io.CopyN(in.files[name], in.from, size); err != nil {
			return broken(err)
		}
	}
	return nil
}

// broken gives the end of a stream before its time a kind.
func broken(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%w: the stream broke off: %w", sandbox.ErrUnavailable, err)
}

// openInflow makes what a stream goes through on its way to the sentry.
func (s *starting) openInflow() error {
	files, err := memories()
	if err != nil {
		return err
	}
	in := &inflow{from: s.spec.Stream, files: files}
	s.inflow = in
	if files[keptFile], err = os.OpenFile(s.spec.ScratchDir, os.O_RDWR|unix.O_TMPFILE, fileMode); err != nil {
		delete(files, keptFile)
		return fmt.Errorf("make a file: %w", err)
	}
	files[checkpointfiles.PagesFileName], in.pages, err = newPipe()
	if err != nil {
		delete(files, checkpointfiles.PagesFileName)
	}
	return err
}

// take gives the files to the caller.
func (in *inflow) take() map[string]*os.File {
	files := in.files
	in.files = nil
	return files
}

// close gives up what is left.
func (in *inflow) close() {
	closeFiles(in.take())
	if in.pages != nil {
		_ = in.pages.Close() // closed already where all went well
	}
}

// feed hands the pages over as they come. Until their pipe ends with a mark, the sentry does not let the guest run: it is held
// before, where that is wanted. Should this process end first, the sentry waits until it is ended.
func (s *starting) feed(ctx context.Context) error {
	if _, err := io.CopyBuffer(onlyWriter{s.inflow.pages}, onlyReader{s.inflow.from}, make([]byte, pipeBytes)); err != nil {
		return broken(err)
	}
	if s.spec.Hold {
		if err := s.hold(ctx); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(s.inflow.pages, goMark); err != nil {
		return err
	}
	return s.inflow.pages.Close()
}

// hold stops a guest that is loaded and has not begun to run.
func (s *starting) hold(ctx context.Context) error {
	g := &guest{id: s.spec.ID, bundle: s.bundle}
	tick := time.NewTicker(loadTick)
	defer tick.Stop()
	for {
		var stacks string
		if err := s.e.call(ctx, g, runscboot.DebugStacks, &stacks); err != nil {
			return err
		}
		if isLoaded(stacks) {
			return s.e.freeze(ctx, g)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// isLoaded reports whether a sentry, as its goroutines say, has a whole kernel again and waits for its pages alone.
func isLoaded(stacks string) bool {
	for goroutine := range strings.SplitSeq(stacks, "\n\n") {
		if strings.Contains(goroutine, "kernel.(*AsyncMFLoader).Wait(") && strings.Contains(goroutine, "boot.(*restorer).restore(") {
			return true
		}
	}
	return false
}

// feeding begins to feed a start from its stream, if it has one. The context ends when that fails. Done takes what became of the
// start, ends the feeding, and returns what became of both.
func (s *starting) feeding(ctx context.Context) (inner context.Context, done func(error) error) {
	if s.inflow == nil {
		return ctx, func(err error) error { return err }
	}
	ctx, cancel := context.WithCancelCause(ctx)
	fed := make(chan error, 1)
	go func() {
		err := s.feed(ctx)
		if err != nil {
			cancel(err)
		}
		fed <- err
	}()
	return ctx, func(err error) error {
		if err != nil {
			cause := context.Cause(ctx)
			cancel(err)
			s.inflow.close()
			if s.files != nil {
				_ = s.files.cmd.Process.Kill() // feed sees that nobody reads any more
			}
			<-fed
			return cmp.Or(cause, err)
		}
		return <-fed
	}
}
