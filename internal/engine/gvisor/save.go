package gvisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/control"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"
	"gvisor.dev/gvisor/pkg/state/statefile"
	"gvisor.dev/gvisor/pkg/urpc"
	runscboot "gvisor.dev/gvisor/runsc/boot"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// thawTimeout bounds how long a save that failed tries to let its guest go on.
	thawTimeout = 30 * time.Second

	// minShared is how many bytes a guest must have written to its disk before cloning them is worth a process.
	minShared = 4 << 20
)

// saving is one guest's state on its way to a directory.
type saving struct {
	e    *Engine
	g    *guest
	spec engine.SaveSpec
	// names are what gVisor writes, and files where it goes; nil is nowhere.
	names []string
	files []*os.File
	// tree is the one of them that a layer is made from.
	tree *os.File
	// disk is the file that holds what the guest wrote.
	disk *os.File
	// diskBytes is what it occupied at the moment of the save.
	diskBytes int64
	// share says that the guest's disk is cloned, served that the sentry does not write the files itself.
	share, served bool
	// shared is how much of the files was cloned, not copied, in bytes.
	shared int64
}

// Save writes a guest's state. See engine.Engine.
func (e *Engine) Save(ctx context.Context, id sandbox.ID, spec engine.SaveSpec) (engine.Saved, error) {
	g, err := e.find(id)
	if err != nil {
		return engine.Saved{}, err
	}
	if !g.running() {
		return engine.Saved{}, notFound(id)
	}
	if kindFiles(spec.Kind) == nil {
		return engine.Saved{}, sandbox.Unsupportedf("save %s: no such kind as %.40q", id, spec.Kind)
	}
	s := &saving{e: e, g: g, spec: spec}
	defer s.close()
	saved, err := s.run(ctx)
	if err != nil {
		return engine.Saved{}, fmt.Errorf("save %s: %w", id, explainSave(err))
	}
	return saved, nil
}

// run saves the guest, which stands still before and after, if at all, only as the spec says.
func (s *saving) run(ctx context.Context) (engine.Saved, error) {
	write := s.stream
	if s.spec.Stream == nil {
		write = s.write
		if err := s.open(); err != nil {
			return engine.Saved{}, err
		}
	}
	stood, err := s.e.settle(ctx, s.g)
	if err != nil {
		return engine.Saved{}, err
	}
	saved, err := write(ctx)
	if err == nil && s.spec.Hold || err != nil && stood {
		return saved, err
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawTimeout)
	defer cancel()
	return saved, errors.Join(err, s.e.thaw(undo, s.g))
}

// open makes the files, and opens the guest's disk.
func (s *saving) open() error {
	entries, err := os.ReadDir(s.spec.Dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return sandbox.Invalidf("directory %s does not exist", s.spec.Dir)
	case err != nil:
		return err
	case len(entries) > 0:
		return sandbox.Invalidf("directory %s is not empty: it has %.80q", s.spec.Dir, entries[0].Name())
	}
	if err := s.create(); err != nil {
		return err
	}
	s.g.diskBytes() // finds the descriptor
	s.g.mu.Lock()
	fd := s.g.diskFD
	s.g.mu.Unlock()
	if s.disk, err = os.Open(filepath.Join("/proc", strconv.Itoa(s.g.proc.pid), "fd", strconv.Itoa(fd))); err != nil {
		return fmt.Errorf("open the guest's disk: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(s.disk.Fd()), &st); err != nil {
		return fmt.Errorf("read the guest's disk: %w", err)
	}
	if st.Dev != s.g.rec.Device || st.Ino != s.g.rec.Inode {
		return sandbox.Unavailablef("the guest's disk is not where it was")
	}
	return nil
}

// create makes the files. Of a layer gVisor's files are only the way to it: the names, which go into a nameless file, are
// all that is kept.
func (s *saving) create() error {
	s.names = kindFiles(s.spec.Kind)
	s.files = make([]*os.File, len(s.names))
	var err error
	for i, name := range s.names {
		switch {
		case s.spec.Kind != engine.SaveLayer:
			s.files[i], err = os.OpenFile(filepath.Join(s.spec.Dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, fileMode) //nolint:gosec // the caller's directory
		case name == checkpointfiles.FSCheckpointMultiTarFileName:
			s.files[i], err = os.OpenFile(s.spec.Dir, os.O_RDWR|unix.O_TMPFILE, fileMode)
			s.tree = s.files[i]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// write saves everything and flushes it.
func (s *saving) write(ctx context.Context) (engine.Saved, error) {
	layer := s.spec.Kind == engine.SaveLayer
	if !layer && s.g.diskBytes() >= minShared && clonable(s.disk, s.pages()) {
		// Cloning flushes what it clones. Done before, that does not prolong the time that the guest stands still.
		if err := s.disk.Sync(); err != nil {
			return engine.Saved{}, fmt.Errorf("flush the guest's disk: %w", err)
		}
		s.share = true
	}
	if s.spec.Hold || layer { // a layer is written after the sentry is done
		if err := s.e.freeze(ctx, s.g); err != nil {
			return engine.Saved{}, err
		}
	}
	if err := s.ask(ctx); err != nil {
		return engine.Saved{}, err
	}
	s.diskBytes = s.g.diskBytes()
	if layer {
		return s.layer()
	}
	return s.complete()
}

// layer writes the layer from the names that the sentry has written and the contents on the guest's disk.
func (s *saving) layer() (engine.Saved, error) {
	out, err := os.OpenFile(filepath.Join(s.spec.Dir, engine.LayerFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, fileMode)
	if err != nil {
		return engine.Saved{}, err
	}
	defer func() { _ = out.Close() }() // flushed below
	if _, err := s.tree.Seek(0, io.SeekStart); err != nil {
		return engine.Saved{}, err
	}
	if err := writeLayer(out, bufio.NewReaderSize(s.tree, 1<<20), s.disk); err != nil {
		return engine.Saved{}, err
	}
	if err := out.Sync(); err != nil {
		return engine.Saved{}, fmt.Errorf("flush: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(out.Fd()), &st); err != nil {
		return engine.Saved{}, err
	}
	return engine.Saved{Bytes: st.Blocks * blockSize}, syncDir(s.spec.Dir)
}

// pages is the file that takes the guest's pages.
func (s *saving) pages() *os.File { return s.files[len(s.files)-1] }

// ask has the sentry write its files, by itself or through a server that can share.
func (s *saving) ask(ctx context.Context) error {
	s.served = s.share || s.spec.Kind == engine.SaveLayer
	if !s.served {
		return s.askWith(ctx, s.files)
	}
	names := map[string]*os.File{}
	for i, name := range s.names {
		names[name] = s.files[i]
	}
	server, err := startFileServer(ctx, names, true, room{})
	if err != nil {
		return err
	}
	err = s.askWith(ctx, []*os.File{server.sock})
	said, serverErr := server.wait()
	s.shared = said.Shared
	return errors.Join(serverErr, err)
}

// askWith has the sentry write to files, or to the socket of a server of them.
func (s *saving) askWith(ctx context.Context, files []*os.File) error {
	payload := urpc.FilePayload{Files: files}
	if s.spec.Kind != engine.SaveMemory {
		args := &runscboot.FSSaveArgs{FilePayload: payload, UseCheckpointGofer: s.served}
		return s.e.callWith(ctx, s.g, runscboot.ContMgrFSSave, args, nil)
	}
	return s.e.callWith(ctx, s.g, runscboot.ContMgrCheckpoint, &control.SaveOpts{
		Metadata:                       statefile.CompressionLevelNone.ToMetadata(),
		AppMFExcludeCommittedZeroPages: true,
		HavePagesFile:                  true,
		Resume:                         true, // never the other: with it the sentry ends by itself
		FilePayload:                    payload,
		UseCheckpointGofer:             s.served,
	}, nil)
}

// complete flushes the files, and writes the manifest as the last one.
func (s *saving) complete() (engine.Saved, error) {
	sums, err := s.flush()
	if err != nil {
		return engine.Saved{}, err
	}
	m := manifest{
		Format: manifestFormat, Engine: engineName, Version: moduleVersion(), Arch: runtime.GOARCH,
		Kind: s.spec.Kind, Limits: s.g.rec.Limits, Hostname: s.g.rec.Hostname, DiskBytes: s.diskBytes, Files: map[string]savedFile{},
	}
	saved := engine.Saved{SharedBytes: s.shared}
	for i, name := range s.names {
		var st unix.Stat_t
		if err := unix.Fstat(int(s.files[i].Fd()), &st); err != nil {
			return engine.Saved{}, fmt.Errorf("read %s: %w", name, err)
		}
		m.Files[name] = savedFile{Bytes: st.Size, CRC32C: sums[i]}
		saved.Bytes += st.Blocks * blockSize
		if name == checkpointfiles.PagesFileName {
			saved.MemoryBytes = max(st.Size-s.diskBytes, 0)
		}
	}
	saved.Bytes = max(saved.Bytes-s.shared, 0)
	if s.spec.Kind != engine.SaveMemory {
		saved.MemoryBytes = 0
	}
	if err := writeManifest(s.spec.Dir, m); err != nil {
		return engine.Saved{}, err
	}
	return saved, syncDir(s.spec.Dir)
}

// flush brings the files to the disk, and meanwhile returns their checksums.
func (s *saving) flush() ([]uint32, error) {
	var wg sync.WaitGroup
	errs := make([]error, len(s.files))
	for i, f := range s.files {
		wg.Go(func() { errs[i] = f.Sync() })
	}
	sums := make([]uint32, len(s.files))
	sumErrs := make([]error, len(s.files))
	for i, f := range s.files {
		sums[i], sumErrs[i] = sum(f, s.names[i])
	}
	wg.Wait()
	if err := errors.Join(errors.Join(errs...), errors.Join(sumErrs...)); err != nil {
		return nil, fmt.Errorf("flush: %w", err)
	}
	return sums, nil
}

func (s *saving) close() {
	for _, f := range s.files {
		_ = f.Close() // flushed where it matters; nil is fine
	}
	if s.disk != nil {
		_ = s.disk.Close() // opened for reading
	}
}

// clonable reports whether the file system lets the empty file to share the blocks of from.
func clonable(from, to *os.File) bool {
	r := unix.FileCloneRange{Src_fd: int64(from.Fd()), Src_length: cloneAlign} //nolint:gosec // a descriptor
	if unix.IoctlFileCloneRange(int(to.Fd()), &r) != nil {
		return false
	}
	return to.Truncate(0) == nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // the caller's directory
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

func diskFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// explainSave gives a failed save its kind.
func explainSave(err error) error {
	if diskFull(err) {
		return fmt.Errorf("%w: the disk is full: %w", sandbox.ErrUnavailable, err)
	}
	for _, kind := range []error{sandbox.ErrInvalid, sandbox.ErrUnsupported, sandbox.ErrNotFound, sandbox.ErrUnavailable} {
		if errors.Is(err, kind) {
			return err
		}
	}
	return fmt.Errorf("%w: %w", sandbox.ErrUnavailable, err)
}
