package install

import (
	"context"
	"net/netip"
	"path/filepath"
	"slices"
	"time"
)

// Level says how bad a finding is.
type Level string

// The levels. A machine with a finding of LevelFail cannot run sandboxes; LevelWarn means fewer, slower or less safe.
const (
	LevelOK   Level = "ok"
	LevelWarn Level = "warn"
	LevelFail Level = "fail"
)

// Finding is what one check says.
type Finding struct {
	Check  string `json:"check"`
	Level  Level  `json:"level"`
	Detail string `json:"detail"`
	// Remedy is what to do; set wherever Level is not ok, and as a hint now and then.
	Remedy string `json:"remedy,omitempty"`
}

// Listener is an address that Cloister will listen on.
type Listener struct {
	// Setting is the name of the setting that it comes from, such as "api-addr".
	Setting string
	// Addr is host:port.
	Addr string
}

// Overlap is something on the machine that uses addresses of the guests' range.
type Overlap struct {
	// Kind is "interface", "route", "resolver" or "node".
	Kind         string
	Text, Remedy string
}

// Settings is what the checks need to know of the configuration.
type Settings struct {
	// DataDir is where Cloister keeps its files; it need not exist yet.
	DataDir string
	// NodeDir is where sandboxes' files go, below DataDir; it need not exist yet.
	NodeDir string
	// Image says whether they are, or will be, on the file system in storage.img.
	Image     bool
	Listeners []Listener
	// Range is the guests' address range.
	Range netip.Prefix
	// Sandboxes is how many are planned on this machine; 0 takes what its memory has room for, up to 1,000.
	Sandboxes int
	// Overlaps returns what conflicts with Range. Nil leaves the check out.
	Overlaps func() ([]Overlap, error)
	// Resolvers returns the name servers that guests will get. Nil leaves the check out.
	Resolvers func() []netip.Addr
}

// checkTimeout bounds one check.
const checkTimeout = 20 * time.Second

// Preflight runs every check and returns the findings in a fixed order. It stops early when ctx ends.
func Preflight(ctx context.Context, s Settings) []Finding {
	if s.DataDir != "" {
		if abs, err := filepath.Abs(s.DataDir); err == nil {
			s.DataDir = abs
		}
	}
	if s.Sandboxes <= 0 {
		s.Sandboxes = plannedSandboxes(gatherMemory())
	}
	checks := []func(context.Context, Settings) []Finding{
		checkKernel, checkEnvironment, checkPrivileges, checkNamespaces, checkEngine, checkCgroups,
		checkMemory, checkDisk, checkStorage, checkLimits,
		checkNftables, checkForwarding, checkFirewalls, checkRange, checkResolvers, checkListeners,
		checkClock, checkTools, checkDevices,
	}
	var out []Finding
	for _, check := range checks {
		if ctx.Err() != nil {
			break
		}
		bounded, cancel := context.WithTimeout(ctx, checkTimeout)
		out = append(out, check(bounded, s)...)
		cancel()
	}
	return out
}

// Worst returns the worst level among the findings.
func Worst(findings []Finding) Level {
	worst := LevelOK
	for _, f := range findings {
		order := []Level{LevelOK, LevelWarn, LevelFail}
		if slices.Index(order, f.Level) > slices.Index(order, worst) {
			worst = f.Level
		}
	}
	return worst
}

func ok(check, detail string) Finding { return Finding{Check: check, Level: LevelOK, Detail: detail} }

func hint(check, detail, remedy string) Finding {
	return Finding{Check: check, Level: LevelOK, Detail: detail, Remedy: remedy}
}

func warn(check, detail, remedy string) Finding {
	return Finding{Check: check, Level: LevelWarn, Detail: detail, Remedy: remedy}
}

func fail(check, detail, remedy string) Finding {
	return Finding{Check: check, Level: LevelFail, Detail: detail, Remedy: remedy}
}
