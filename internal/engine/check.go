package engine

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The bounds of what any engine accepts.
const (
	maxMilliCPU    = 512 * 1000
	minMemoryBytes = 16 << 20
	minDiskBytes   = 1 << 20
	maxArgBytes    = 1 << 20
)

// plainHost reports whether s can be a host name: 1 to 64 letters, digits, '-' or '.', neither of these at an end. It is no
// regular expression, since what a program compiles at its start every sandbox would compile too.
func plainHost(s string) bool {
	if s == "" || len(s) > 64 || strings.Trim(s, "-.") != s {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		plain := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !plain && r != '-' && r != '.'
	})
}

// Check refuses, as ErrInvalid, a spec that no engine can run. It looks at the values alone, not at the machine.
func (s Spec) Check() error {
	if _, err := sandbox.ParseID(string(s.ID)); err != nil {
		return err
	}
	if err := s.checkPaths(); err != nil {
		return err
	}
	if s.Checkpoint != "" && s.Stream != nil || s.Hold && s.Stream == nil {
		return sandbox.Invalidf("sandbox %s: checkpoint %q, stream %t, hold %t: want one of the first two, and to hold only with a stream",
			s.ID, s.Checkpoint, s.Stream != nil, s.Hold)
	}
	if s.Hostname != "" && !plainHost(s.Hostname) {
		return sandbox.Invalidf("sandbox %s: host name %.80q: want 1 to 64 letters, digits, '-' or '.'", s.ID, s.Hostname)
	}
	if err := s.checkProgram(); err != nil {
		return err
	}
	return s.checkLimits()
}

func (s Spec) checkPaths() error {
	for _, p := range []struct {
		what, path string
		optional   bool
	}{
		{"root file system", s.RootFS, false},
		{"scratch directory", s.ScratchDir, false},
		{"network namespace", s.NetNS, true},
		{"checkpoint", s.Checkpoint, true},
	} {
		if p.optional && p.path == "" {
			continue
		}
		if !filepath.IsAbs(p.path) {
			return sandbox.Invalidf("sandbox %s: %s %.80q: want an absolute path", s.ID, p.what, p.path)
		}
	}
	return nil
}

func (s Spec) checkProgram() error {
	if (s.Checkpoint != "" || s.Stream != nil) && len(s.Args) == 0 {
		return nil // a checkpoint of memory needs none; an engine refuses others
	}
	if len(s.Args) == 0 || s.Args[0] == "" {
		return sandbox.Invalidf("sandbox %s: no program to run: want at least one argument", s.ID)
	}
	total := 0
	for _, kv := range s.Env {
		if k, _, ok := strings.Cut(kv, "="); !ok || k == "" {
			return sandbox.Invalidf("sandbox %s: environment entry %.80q: want KEY=value", s.ID, kv)
		}
	}
	for _, a := range slices.Concat(s.Args, s.Env) {
		if total += len(a) + 1; strings.ContainsRune(a, 0) {
			return sandbox.Invalidf("sandbox %s: argument or environment entry %.80q contains a zero byte", s.ID, a)
		}
	}
	if total > maxArgBytes {
		return sandbox.Invalidf("sandbox %s: arguments and environment have %d bytes: want at most %d", s.ID, total, maxArgBytes)
	}
	return nil
}

func (s Spec) checkLimits() error {
	switch l := s.Limits; {
	case l.MilliCPU <= 0 || l.MilliCPU > maxMilliCPU:
		return sandbox.Invalidf("sandbox %s: %d thousandths of a processor: want 1 to %d", s.ID, l.MilliCPU, maxMilliCPU)
	case l.MemoryBytes < minMemoryBytes:
		return sandbox.Invalidf("sandbox %s: %d bytes of memory: want at least %d", s.ID, l.MemoryBytes, minMemoryBytes)
	case l.DiskBytes < minDiskBytes:
		return sandbox.Invalidf("sandbox %s: %d bytes of disk: want at least %d", s.ID, l.DiskBytes, minDiskBytes)
	}
	return nil
}
