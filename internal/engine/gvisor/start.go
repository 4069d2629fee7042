package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/pgalloc"
	"gvisor.dev/gvisor/pkg/urpc"
	"gvisor.dev/gvisor/runsc/config"
	runsc "gvisor.dev/gvisor/runsc/sandbox"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	killTick    = 5 * time.Millisecond
	undoTimeout = 30 * time.Second

	// When the machine is out of memory, and when a guest is, the sentry goes first: it takes its stubs with it, whereas
	// without a stub it would limp on.
	sentryOOMScore = "1000"
)

// starting is one guest on its way. Its files are open until the sentry has them.
type starting struct {
	e      *Engine
	spec   engine.Spec
	bundle string
	conf   config.Config
	oci    *specs.Spec
	disk   unix.Stat_t
	boxed  *runsc.Sandbox
	proc   *process
	from   manifest // of spec.Checkpoint
	files  *fileProcess
	share  bool    // files come from a server, which clones what it can
	inflow *inflow // what spec.Stream goes through; nil without one
	// restoring says that the sentry has the checkpoint, and has not started from it yet.
	restoring bool
}

// Start makes a guest and runs its first process. See engine.Engine.
func (e *Engine) Start(ctx context.Context, spec engine.Spec) error {
	if err := spec.Check(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s, err := e.newStarting(spec)
	if err != nil {
		return err
	}
	if err := e.reserve(spec.ID); err != nil {
		return err
	}
	g, err := s.run(ctx)
	e.mu.Lock()
	if err != nil {
		delete(e.guests, spec.ID)
	} else {
		e.guests[spec.ID] = g
	}
	e.mu.Unlock()
	return err
}

// newStarting prepares a start, without changing anything on the machine.
func (e *Engine) newStarting(spec engine.Spec) (*starting, error) {
	bundle := e.bundle(spec.ID)
	from, err := checkpointOf(&spec)
	if err != nil {
		return nil, fmt.Errorf("start sandbox %s: %w", spec.ID, err)
	}
	s := &starting{e: e, spec: spec, bundle: bundle, conf: *e.conf, oci: ociSpec(spec, bundle), from: from}
	s.conf.PanicLog = filepath.Join(bundle, panicFile)
	if spec.NetNS == "" {
		s.conf.Network = config.NetworkNone
	}
	return s, nil
}

// reserve makes the guest's directory, which nobody else may have, and hides it from List until Start returns.
func (e *Engine) reserve(id sandbox.ID) error {
	e.mu.Lock()
	_, taken := e.guests[id]
	if !taken {
		e.guests[id] = nil
	}
	e.mu.Unlock()
	if taken {
		return sandbox.Conflictf("sandbox %s exists already", id)
	}
	err := os.Mkdir(e.bundle(id), dirMode)
	if err == nil {
		return nil
	}
	e.mu.Lock()
	delete(e.guests, id)
	e.mu.Unlock()
	if errors.Is(err, os.ErrExist) {
		return sandbox.Conflictf("sandbox %s exists already, or its remains do: stop it first", id)
	}
	return fmt.Errorf("make directory of %s: %w", id, err)
}

// run takes the steps of a start, and takes them back on failure.
func (s *starting) run(ctx context.Context) (*guest, error) {
	err := s.prepare(ctx)
	if err == nil {
		err = s.begin(ctx)
	}
	err = errors.Join(err, s.hangUp())
	var g *guest
	if err == nil {
		g, err = s.settle()
	}
	if err == nil {
		return g, nil
	}
	err = s.explain(err)
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if s.proc != nil {
		s.proc.end(undo)
	}
	if clearErr := s.e.clear(undo, s.spec.ID); clearErr != nil {
		err = errors.Join(err, fmt.Errorf("undo start of %s: %w", s.spec.ID, clearErr))
	}
	return nil, err
}

// prepare makes a sentry, and meanwhile looks at what it is to start from.
func (s *starting) prepare(ctx context.Context) error {
	look := func() error { return s.from.verify(s.spec.Checkpoint) }
	if s.spec.Stream != nil {
		if err := s.openInflow(); err != nil {
			return err
		}
		look = func() error { return s.inflow.receiveHead(&s.spec) }
	}
	looked := make(chan error, 1)
	go func() { looked <- look() }()
	return errors.Join(s.create(ctx), <-looked)
}

// create makes everything of the guest up to a sentry that waits for the signal to start.
func (s *starting) create(ctx context.Context) error {
	id, limits := s.spec.ID, s.spec.Limits
	image, err := openImage(id, s.spec.RootFS)
	if err != nil {
		return err
	}
	defer func() { _ = image.Close() }() // the sentry has its own
	params, err := writeBundle(s.bundle, s.oci, boot{CPUs: guestCPUs(limits.MilliCPU), MemoryBytes: limits.MemoryBytes})
	if err != nil {
		return fmt.Errorf("write bundle of %s: %w", id, err)
	}
	defer func() { _ = params.Close() }() // as above
	if err := s.e.cgroups.create(id, limits.MemoryBytes+s.e.cfg.SentryBytes, limits.MilliCPU); err != nil {
		return fmt.Errorf("start sentry %s: %w", id, err)
	}
	dir, tasks, err := s.e.cgroups.entrance(id)
	if err != nil {
		return fmt.Errorf("start sentry %s: %w", id, err)
	}
	defer closeAll(tasks)
	defer func() { _ = dir.Close() }() // nil is fine
	disk, err := s.scratch()
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }() // as above
	passed := map[int]*os.File{bootFile: params}
	for i, f := range tasks {
		passed[joinFile+i] = f
	}
	args := &runsc.Args{
		ID: string(id), Spec: s.oci, BundleDir: s.bundle,
		IOFiles:             []*os.File{image},
		GoferFilestoreFiles: []*os.File{disk},
		GoferMountConfs: specutils.GoferMountConfFlags{{
			Lower: specutils.Erofs, Upper: specutils.AnonOverlay, Size: strconv.FormatInt(limits.DiskBytes, 10),
		}},
		CloneIntoCgroupFD: dir,
		PassFiles:         passed,
	}
	if err := s.prepareShare(disk); err != nil {
		return err
	}
	if s.from.Kind == engine.SaveFiles {
		args.FSRestoreImagePath = s.image()
	}
	return s.spawn(ctx, args)
}

// scratch opens the nameless file for what the guest writes.
func (s *starting) scratch() (*os.File, error) {
	f, err := os.OpenFile(s.spec.ScratchDir, os.O_RDWR|unix.O_TMPFILE, fileMode)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, sandbox.Invalidf("sandbox %s: scratch directory %s does not exist", s.spec.ID, s.spec.ScratchDir)
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil, sandbox.Unsupportedf("sandbox %s: the file system of %s has no nameless files: "+
			"put the data directory on ext4, XFS, btrfs or tmpfs", s.spec.ID, s.spec.ScratchDir)
	case err != nil:
		return nil, fmt.Errorf("open scratch file of %s: %w", s.spec.ID, err)
	}
	pgalloc.IMAWorkAroundForMemFile(f.Fd())
	if err := unix.Fstat(int(f.Fd()), &s.disk); err != nil {
		_ = f.Close() // the first error says it
		return nil, fmt.Errorf("read scratch file of %s: %w", s.spec.ID, err)
	}
	return f, nil
}

// spawn starts the sentry in its control group.
func (s *starting) spawn(ctx context.Context, args *runsc.Args) error {
	release := holdForeign()
	defer func() { go release() }() // nobody is to wait for it
	err := s.killable(ctx, func() (err error) {
		defer restoreOwners(s.e.stdio)
		s.boxed, err = runsc.New(&s.conf, args)
		return err
	})
	if err != nil {
		return fmt.Errorf("start sentry %s: %w", s.spec.ID, err)
	}
	if s.proc, err = openProcess(s.boxed.Getpid(), 0); err != nil {
		return fmt.Errorf("open sentry %s: %w", s.spec.ID, err)
	}
	if err := s.e.cgroups.place(s.spec.ID, s.proc.pid); err != nil {
		return fmt.Errorf("start sentry %s: %w", s.spec.ID, err)
	}
	return nil
}

// begin lets the sentry run the guest's first process, or go on from its checkpoint.
func (s *starting) begin(ctx context.Context) error {
	s.restoring = s.from.Kind != ""
	ctx, fed := s.feeding(ctx)
	err := s.killable(ctx, func() error {
		switch s.from.Kind {
		case engine.SaveMemory:
			return s.boxed.Restore(&s.conf, s.oci, string(s.spec.ID), s.image(), false, false, nil)
		case engine.SaveFiles:
			if err := s.boxed.StartRoot(&s.conf, s.oci); err != nil {
				return err
			}
			return s.boxed.WaitFSRestore(string(s.spec.ID))
		case engine.SaveLayer: // no start gets here with one
		}
		return s.boxed.StartRoot(&s.conf, s.oci)
	})
	if err = fed(err); err != nil {
		return fmt.Errorf("start guest %s: %w", s.spec.ID, err)
	}
	s.restoring = false
	return ctx.Err()
}

// settle does what a running guest needs, and writes its record as the last step.
func (s *starting) settle() (*guest, error) {
	id := s.spec.ID
	score := filepath.Join("/proc", strconv.Itoa(s.proc.pid), "oom_score_adj")
	if err := writeFile(score, sentryOOMScore); err != nil && !gone(err) {
		return nil, fmt.Errorf("start sentry %s: %w", id, err)
	}
	if err := s.e.cgroups.limitCPU(id, s.spec.Limits.MilliCPU); err != nil {
		return nil, fmt.Errorf("start sentry %s: %w", id, err)
	}
	g := &guest{id: id, bundle: s.bundle, proc: s.proc, diskFD: -1, rec: record{
		PID: s.proc.pid, StartTicks: s.proc.start, StartedAt: time.Now(), MemoryBytes: s.spec.Limits.MemoryBytes,
		Device: s.disk.Dev, Inode: s.disk.Ino, Limits: s.spec.Limits, Hostname: s.oci.Hostname,
	}}
	if err := writeRecord(s.bundle, g.rec); err != nil {
		return nil, fmt.Errorf("start guest %s: %w", id, err)
	}
	return g, nil
}

// gone reports whether err means that a process has ended.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// killable runs f, which cannot be cancelled, and makes it fail by killing the guest's processes when ctx ends first.
func (s *starting) killable(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	tick := time.NewTicker(killTick)
	defer tick.Stop()
	for {
		s.e.cgroups.kill(s.spec.ID)
		select {
		case <-done:
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// explain gives a failed start its kind. What the sentry itself refuses is the spec's fault while it is still alive: it
// could not run the first process.
func (s *starting) explain(err error) error {
	for _, kind := range []error{
		sandbox.ErrInvalid, sandbox.ErrUnsupported, context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, kind) {
			return err
		}
	}
	var remote urpc.RemoteError
	if errors.As(err, &remote) && s.proc != nil && !s.proc.ended() {
		return sandbox.Invalidf("sandbox %s: run %q: %s", s.spec.ID, s.spec.Args[0], oneLine([]byte(remote.Message)))
	}
	text := panicText(s.bundle)
	// A sentry that was killed, or whose disk is full, says nothing about what it starts from.
	if s.restoring && !diskFull(err) && s.e.cgroups.oomKills(s.spec.ID) == 0 && (text != "" || !s.proc.ended()) {
		return sandbox.Invalidf("sandbox %s: checkpoint %s: %s", s.spec.ID, s.spec.Checkpoint, oneLine([]byte(err.Error()+" "+text)))
	}
	if text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return fmt.Errorf("%w: %w", sandbox.ErrUnavailable, err)
}
