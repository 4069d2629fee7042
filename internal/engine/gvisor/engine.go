package gvisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/flag"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// dirMode keeps everybody else out: a sentry gets what it needs as open files.
	dirMode  = 0o700
	fileMode = 0o600

	// DefaultSentryBytes is the room that a guest's control group grants beyond the guest's own memory, for the sentry's
	// heap and the stubs' page tables.
	DefaultSentryBytes = 64 << 20

	modulePath = "gvisor.dev/gvisor"

	// firstSafe is above the number of every file that is passed to a new process.
	firstSafe = 200
)

// Config says where and how an Engine runs its guests.
type Config struct {
	// Root is the directory of runtime state, such as <data>/node/gvisor. Absolute; made when it does not exist.
	Root string
	// CgroupParent names the control group that holds all guests, unique on this machine, such as "cloister-<node id>".
	CgroupParent string
	// ExePath is the program that becomes the sentry, one that begins with Maybe; empty means this one.
	ExePath string
	// MemoryBudgetBytes limits the memory of all guests together; 0 means no limit.
	MemoryBudgetBytes int64
	// SentryBytes is what a guest's processes may use beyond the guest's memory limit; 0 means DefaultSentryBytes.
	SentryBytes int64
	// Logger takes gVisor's own messages at debug level, and the engine's warnings; nil discards them.
	Logger *slog.Logger
}

// Engine is an engine.Engine on gVisor.
type Engine struct {
	exe     *os.File // the sentry's program, held open; nil where it is this one
	cfg     Config
	log     *slog.Logger
	conf    *config.Config
	cgroups *cgroups
	stdio   []owner

	mu     sync.Mutex
	guests map[sandbox.ID]*guest
}

var _ engine.Engine = (*Engine)(nil)

// New returns an Engine over cfg.Root. Guests that an earlier process started there are found again.
// Errors: ErrInvalid for a configuration that cannot work, ErrUnsupported when the machine lacks what guests need.
func New(cfg Config) (*Engine, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if config.CgoEnabled && cfg.ExePath == "" {
		return nil, sandbox.Unsupportedf("gvisor: this binary was built with cgo, which a sentry cannot be: " +
			"build it with CGO_ENABLED=0")
	}
	if os.Geteuid() != 0 {
		return nil, sandbox.Unsupportedf("gvisor: running guests needs root; this process runs as user %d", os.Geteuid())
	}
	if err := os.MkdirAll(cfg.Root, dirMode); err != nil {
		return nil, fmt.Errorf("make runtime directory %s: %w", cfg.Root, err)
	}
	conf, err := newConf(cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("configure gvisor: %w", err)
	}
	cg, err := openCgroups(cfg.CgroupParent, cfg.MemoryBudgetBytes, cfg.Logger)
	if err != nil {
		return nil, err
	}
	exe, err := useSentry(cfg.ExePath)
	if err != nil {
		return nil, err
	}
	captureLog(cfg.Logger)
	return &Engine{
		exe: exe, cfg: cfg, log: cfg.Logger, conf: conf, cgroups: cg, stdio: stdioOwners(), guests: map[sandbox.ID]*guest{},
	}, nil
}

// useSentry makes gVisor start the program at path, or this one where path is empty. The sentry is nobody from the moment that
// it is forked, and cannot walk to a file in a directory of root's; an open file it can execute. The file stays open.
func useSentry(path string) (*os.File, error) {
	if path == "" {
		return nil, nil //nolint:nilnil // this program needs no file
	}
	low, err := os.Open(path) //nolint:gosec // the caller's own program
	if err != nil {
		return nil, fmt.Errorf("open sentry: %w", err)
	}
	defer func() { _ = low.Close() }() // duplicated below
	f, err := guardedDup(low)
	if err != nil {
		return nil, fmt.Errorf("open sentry: %w", err)
	}
	specutils.ExePath = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	sentryFile.Store(f)
	return f, nil
}

// guardNumbers is more than files are ever passed to a new process.
const guardNumbers = 64

// guardedDup returns f again at a number where it can be executed. A new process moves files that are passed to it to the
// first numbers and, on their way, to those right after the highest of them; what is there is hidden. So the numbers before
// the file's are taken for good: no file that is passed can have one of them, and those from above go further up.
func guardedDup(f *os.File) (*os.File, error) {
	for run, next := 0, firstSafe; ; next++ {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, next)
		if err != nil {
			return nil, err
		}
		if fd != next { // somebody has a number in between
			if err := closeBefore(next, run); err != nil {
				return nil, err
			}
			run, next = 0, fd
		}
		if run++; run > guardNumbers {
			return os.NewFile(uintptr(fd), f.Name()), nil
		}
	}
}

// closeBefore closes the n descriptors before one.
func closeBefore(fd, n int) error {
	var errs []error
	for i := range n {
		errs = append(errs, unix.Close(fd-1-i))
	}
	return errors.Join(errs...)
}

// sentryFile keeps the program open that gVisor's global path names, when the Engine that has set it is gone.
//
//nolint:gochecknoglobals // as the path
var sentryFile atomic.Pointer[os.File]

// check fills in defaults and refuses what cannot work.
func (c *Config) check() error {
	if !filepath.IsAbs(c.Root) {
		return sandbox.Invalidf("gvisor: runtime directory %q: want an absolute path", c.Root)
	}
	c.Root = filepath.Clean(c.Root)
	if !plainName(c.CgroupParent) {
		return sandbox.Invalidf("gvisor: control group name %q: want 1 to 64 letters, digits, '-', '_' or '.'", c.CgroupParent)
	}
	if c.MemoryBudgetBytes < 0 || c.SentryBytes < 0 {
		return sandbox.Invalidf("gvisor: memory budget %d and sentry allowance %d: want 0 or more bytes",
			c.MemoryBudgetBytes, c.SentryBytes)
	}
	if c.SentryBytes == 0 {
		c.SentryBytes = DefaultSentryBytes
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// plainName reports whether s can name a control group: 1 to 64 letters, digits, '-', '_' or '.', none of these in front.
func plainName(s string) bool {
	if s == "" || len(s) > 64 || strings.ContainsAny(s[:1], "-_.") {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		plain := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !plain && !strings.ContainsRune("-_.", r)
	})
}

// newConf returns gVisor's configuration, which is the same for all guests.
func newConf(root string) (*config.Config, error) {
	fs := flag.NewFlagSet("gvisor", flag.ContinueOnError)
	config.RegisterFlags(fs)
	err := fs.Parse([]string{
		"--root=" + root,
		"--network=sandbox",
		"--platform=systrap",
		"--ignore-cgroups=true",
		"--directfs=false",
		"--overlay2=none",
		"--allow-suid=true",
		"--net-raw=true",
		"--host-settings=ignore",
		"--restore-spec-validation=ignore",
		"--sidecar-usage-policy=LEGACY_DEPRECATED_SLOW_EMBEDDED_FALLBACK",
	})
	if err != nil {
		return nil, err
	}
	return config.NewFromFlags(fs)
}

// Caps says what this engine can do here.
func (e *Engine) Caps() engine.Caps {
	caps := engine.Caps{Name: engineName, Version: moduleVersion()}
	caps.Capabilities = append(caps.Capabilities, "disk_limit", "memory_limit", "cpu_limit",
		"save_memory", "save_files", "save_layer")
	if e.cgroups.unified() {
		caps.Capabilities = append(caps.Capabilities, "cgroup_v2")
	} else {
		caps.Capabilities = append(caps.Capabilities, "cgroup_v1")
	}
	return caps
}

// moduleVersion returns the version of the gVisor module in this binary.
func moduleVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == modulePath {
				return m.Version
			}
		}
	}
	return cmp.Or(filterVersion, "unknown")
}

// Purge ends every guest of this Root and control group, removes both, and lets go of the sentry's program, so that nothing
// of the Engine keeps a file system busy. The Engine can start no guest afterwards.
func (e *Engine) Purge(ctx context.Context) error {
	list, err := e.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, g := range list {
		errs = append(errs, e.Stop(ctx, g.ID))
	}
	errs = append(errs, e.cgroups.purge(ctx))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("purge %s: %w", e.cfg.Root, err)
	}
	if err := os.RemoveAll(e.cfg.Root); err != nil {
		return fmt.Errorf("purge %s: %w", e.cfg.Root, err)
	}
	if e.exe != nil && sentryFile.CompareAndSwap(e.exe, nil) {
		return errors.Join(closeBefore(int(e.exe.Fd()), guardNumbers), e.exe.Close())
	}
	return nil
}
