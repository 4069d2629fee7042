// Package engine is the contract between a node and what runs its sandboxes.
//
// It owns the words that both sides share (Spec, Exit, Stats, Caps) and nothing else: no policy, no records, no
// networking. Implementations live below it; enginetest holds the suite that each of them passes. An Engine is safe for
// concurrent use; calls for the same sandbox are serialised by the caller, except Wait and Stats, which may run beside any.
package engine

import (
	"context"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Engine starts, watches and ends isolated guests on this machine. What it started outlives the process that asked for
// it: a new process finds it again through List.
type Engine interface {
	// Caps says what the engine is and can do on this machine.
	Caps() Caps

	// Start makes a guest and runs spec.Args in it; it returns when the guest's first process runs.
	// Errors: ErrInvalid for a spec that can never work, ErrConflict when the id is in use, ErrUnavailable when the
	// machine refuses. After an error nothing of the guest is left.
	Start(ctx context.Context, spec Spec) error

	// Stop ends a guest at once and frees what it held. Stopping what is not there is no error.
	Stop(ctx context.Context, id sandbox.ID) error

	// List returns the guests that exist, also those that an earlier process started, and the remains of guests whose
	// processes are gone (Running false), which Stop clears away.
	List(ctx context.Context) ([]Guest, error)

	// Wait blocks until the guest has ended, and says how. A guest that does not exist is ErrNotFound.
	Wait(ctx context.Context, id sandbox.ID) (Exit, error)

	// Stats returns what the guest uses now. A guest that does not exist is ErrNotFound.
	Stats(ctx context.Context, id sandbox.ID) (Stats, error)
}

// Caps is what an engine can do; the API shows it.
type Caps struct {
	Name    string
	Version string
	// Capabilities are from a closed set: "disk_limit", "memory_limit", "cpu_limit", "cgroup_v1", "cgroup_v2", "kvm".
	Capabilities []string
}

// Spec is everything that an engine needs to start a guest. All paths are absolute.
type Spec struct {
	ID sandbox.ID
	// RootFS is the EROFS image of the root file system; it is shared and never written.
	RootFS string
	// ScratchDir is a directory on the file system that takes what the guest writes to its root.
	ScratchDir string
	// NetNS is the path of the network namespace that the guest's address lives in; empty means no network.
	NetNS    string
	Hostname string
	// Args is the first process and its arguments, run as root in "/".
	Args []string
	// Env is the first process's environment, as KEY=value.
	Env []string
	// Limits are enforced, and are what the guest sees as the size of its machine.
	Limits sandbox.Resources
}

// Guest is one entry of List.
type Guest struct {
	ID      sandbox.ID
	Running bool
	// PID is the host process that is the guest; 0 when not running.
	PID int
}

// Exit says how a guest ended.
type Exit struct {
	At time.Time
	// Code is the first process's exit code where it ended by itself, else -1.
	Code int
	// OOM means that the guest used more memory than its limit.
	OOM bool
	// Reason is one sentence for people, such as "out of memory: limit 512 MiB".
	Reason string
}

// Stats is a guest's use of the machine at one moment.
type Stats struct {
	Time time.Time
	// CPUTime is processor time used since the guest started.
	CPUTime time.Duration
	// MemoryBytes is anonymous (not reclaimable) memory; CacheBytes is reclaimable.
	MemoryBytes int64
	CacheBytes  int64
	// DiskBytes is what the guest's writes occupy on the machine's disk.
	DiskBytes int64
}
