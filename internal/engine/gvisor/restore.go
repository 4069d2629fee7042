package gvisor

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"
	"gvisor.dev/gvisor/runsc/gvisorbinaries"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// checkpointOf reads what spec.Checkpoint holds, checks that it fits the spec, and gives the spec what a checkpoint decides.
// Without a checkpoint it returns the zero manifest.
func checkpointOf(spec *engine.Spec) (manifest, error) {
	if spec.Stream != nil { // its head comes with it
		spec.Args, spec.Env = []string{"checkpoint"}, nil // gVisor wants a name, and does not run it
		return manifest{Kind: engine.SaveMemory, Limits: spec.Limits}, nil
	}
	if spec.Checkpoint == "" {
		return manifest{}, nil
	}
	m, err := readManifest(spec.Checkpoint)
	if err != nil {
		return m, err
	}
	if m.Kind == engine.SaveFiles {
		if len(spec.Args) == 0 {
			return m, sandbox.Invalidf("checkpoint %s holds files alone: want a program to run", spec.Checkpoint)
		}
		return m, nil
	}
	if m.Limits != spec.Limits {
		return manifest{}, sandbox.Invalidf("checkpoint %s: it was made with limits %+v, and can only go on with them: got %+v",
			spec.Checkpoint, m.Limits, spec.Limits)
	}
	spec.Args, spec.Env, spec.Hostname = []string{"checkpoint"}, nil, m.Hostname // gVisor wants a name, and does not run it
	return m, nil
}

// gVisor starts a server of a checkpoint's files where the directory holds this file, and leaves it to us what is in it.
const (
	serverFile    = "gcs_opts.json"
	serverSock    = 3 // where gVisor's list of the server's files has the socket
	serverOpts    = 4 // and serverFile
	maxServerFile = 4 << 10
)

// starts are those that gVisor may ask a server for, by their bundle.
//
//nolint:gochecknoglobals // gVisor's hook is global
var starts sync.Map

// hookFileServer makes gVisor ask us for servers.
//
//nolint:gochecknoglobals // as above
var hookFileServer = sync.OnceFunc(func() {
	gvisorbinaries.CheckpointGofer.DeclareEmbedded(nil, func(o gvisorbinaries.Options) (int, error) {
		s, err := askingStart(o.Files)
		if err != nil {
			return 0, err
		}
		return 0, s.serve(o.Files[serverSock])
	})
})

// askingStart returns the start that a server is asked for.
func askingStart(files []uintptr) (*starting, error) {
	if len(files) <= serverOpts {
		return nil, fmt.Errorf("a server with %d files", len(files))
	}
	raw := make([]byte, maxServerFile)
	n, err := unix.Pread(int(files[serverOpts]), raw, 0)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", serverFile, err)
	}
	var bundle string
	if err := json.Unmarshal(raw[:n], &bundle); err != nil {
		return nil, fmt.Errorf("parse %s: %w", serverFile, err)
	}
	s, ok := starts.Load(bundle)
	if !ok {
		return nil, fmt.Errorf("no start in %s", bundle)
	}
	return s.(*starting), nil //nolint:errcheck // nothing else is stored
}

// image is where gVisor looks for the checkpoint.
func (s *starting) image() string {
	if s.share {
		return s.bundle
	}
	return s.spec.Checkpoint
}

// prepareShare decides whether a server shall provide the checkpoint's files. It is worth it where blocks can be shared with
// the guest's new disk. Files alone always come that way, since a sentry that opens them never closes them again.
func (s *starting) prepareShare(disk *os.File) error {
	switch {
	case s.from.Kind == engine.SaveFiles, s.inflow != nil:
		s.share = true
	case s.from.Kind == engine.SaveMemory && s.from.DiskBytes >= minShared:
		pages, err := os.Open(filepath.Join(s.spec.Checkpoint, checkpointfiles.PagesFileName))
		if err != nil {
			return fmt.Errorf("open checkpoint: %w", err)
		}
		s.share = clonable(pages, disk)
		_ = pages.Close() // opened for reading
	}
	if !s.share {
		return nil
	}
	raw, err := json.Marshal(s.bundle)
	if err != nil {
		return fmt.Errorf("encode %s: %w", serverFile, err)
	}
	hookFileServer()
	starts.Store(s.bundle, s)
	if err := os.WriteFile(filepath.Join(s.bundle, serverFile), raw, fileMode); err != nil {
		return fmt.Errorf("write %s: %w", serverFile, err)
	}
	return nil
}

// serve starts the server of the checkpoint's files, in the guest's control group: who reads a page into memory is charged
// for it.
func (s *starting) serve(sock uintptr) error {
	files, err := s.checkpointFiles()
	defer func() {
		for _, f := range files {
			_ = f.Close() // the server has its own
		}
	}()
	if err != nil {
		return fmt.Errorf("open checkpoint: %w", err)
	}
	dir, tasks, err := s.e.cgroups.entrance(s.spec.ID)
	if err != nil {
		return err
	}
	defer closeAll(tasks)
	defer func() { _ = dir.Close() }() // nil is fine
	dup, err := unix.FcntlInt(sock, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	server := os.NewFile(uintptr(dup), "server")
	defer func() { _ = server.Close() }() // as above
	p := &fileProcess{}
	if err := p.start(context.Background(), server, files, servingArgs{Files: map[string]int{}}, room{dir, tasks}); err != nil {
		return err
	}
	s.files = p
	return nil
}

// checkpointFiles opens what the server is to serve.
func (s *starting) checkpointFiles() (map[string]*os.File, error) {
	if s.inflow != nil {
		return s.inflow.take(), nil
	}
	files := map[string]*os.File{}
	for _, name := range kindFiles(s.from.Kind) {
		f, err := os.Open(filepath.Join(s.spec.Checkpoint, name)) //nolint:gosec // the node chose the path
		if err != nil {
			return files, err
		}
		files[name] = f
	}
	return files, nil
}

// hangUp ends the server, if there is one.
func (s *starting) hangUp() error {
	starts.Delete(s.bundle)
	if s.inflow != nil {
		s.inflow.close()
	}
	if s.files == nil {
		return nil
	}
	if s.from.Kind == engine.SaveFiles {
		return s.files.end() // the sentry would keep it for ever
	}
	_, err := s.files.wait()
	return err
}
