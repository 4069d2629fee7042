// Package engine is the contract between a node and what runs its sandboxes.
//
// It owns the words that both sides share (Spec, Exit, Stats, Caps) and nothing else: no policy, no records, no
// networking. Implementations live below it; enginetest holds the suite that each of them passes. An Engine is safe for
// concurrent use; calls for the same sandbox are serialised by the caller, except Wait and Stats, which may run beside any.
package engine

import (
	"context"
	"io"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Engine starts, watches and ends isolated guests on this machine. What it started outlives the process that asked for
// it: a new process finds it again through List.
type Engine interface {
	// Caps says what the engine is and can do on this machine.
	Caps() Caps

	// Start makes a guest and runs spec.Args in it; it returns when the guest's first process runs. With spec.Checkpoint
	// the guest goes on from there instead, see Spec. The checkpoint is only read: any number of guests can start from it,
	// and it may be deleted once Start has returned.
	// Errors: ErrInvalid for a spec that can never work or a damaged checkpoint, ErrUnsupported for a checkpoint that this
	// engine or its version cannot read, ErrConflict when the id is in use, ErrUnavailable when the machine refuses. After
	// an error nothing of the guest is left.
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

	// Save writes the guest's state of one moment into spec.Dir. When it returns without error, everything is flushed to
	// the disk, and the guest goes on, or with spec.Hold stands still until Thaw or Stop. After an error the guest goes
	// on as if nothing had been asked; what is in spec.Dir is then worthless. Should this process end in the middle, the
	// guest is left running or standing still, never ended: Thaw or Stop decides.
	// Errors: ErrNotFound, ErrUnsupported for a kind that the engine cannot save, ErrUnavailable for a full disk or a
	// guest that does not stand still in time.
	Save(ctx context.Context, id sandbox.ID, spec SaveSpec) (Saved, error)

	// Thaw lets a guest that stands still go on. For one that runs it does nothing. ErrNotFound when it does not exist.
	Thaw(ctx context.Context, id sandbox.ID) error
}

// SaveSpec says what Save writes, and where.
type SaveSpec struct {
	// Dir is an empty directory. Where it and the guest's scratch directory lie on one file system with reflinks, what the
	// guest wrote to its disk is shared, not copied.
	Dir string
	// Stream takes the state in place of Dir, where it is not nil; only SaveMemory can be streamed. What was written is worth
	// something once Save has returned without error.
	Stream io.Writer
	Kind   SaveKind
	// Hold leaves the guest standing still after success, so that nothing that it does is later than what was saved.
	Hold bool
}

// SaveKind is what a Save keeps.
type SaveKind string

// The kinds.
const (
	// SaveMemory keeps memory, processes and what was written to the root. Start goes on from there: open files and
	// listening sockets work, established TCP connections end, the clock is right, the network is that of the new spec.
	SaveMemory SaveKind = "memory"
	// SaveFiles keeps what was written to the root. Start runs its Args above these files.
	SaveFiles SaveKind = "files"
	// SaveLayer writes one file, LayerFile: what differs from the image, as a tar archive in the form of an OCI image's
	// layer (uncompressed, whiteouts as .wh. files, names relative to the root). Start cannot go on from it.
	SaveLayer SaveKind = "layer"
)

// LayerFile is the name of the only file of a SaveLayer.
const LayerFile = "layer.tar"

// Saved is what a Save has written.
type Saved struct {
	// Bytes is what the files in the directory occupy of their own; SharedBytes what they share with others.
	Bytes, SharedBytes int64
	// MemoryBytes is the part of it that is the guest's memory.
	MemoryBytes int64
}

// Caps is what an engine can do; the API shows it.
type Caps struct {
	Name    string
	Version string
	// Capabilities are from a closed set: "disk_limit", "memory_limit", "cpu_limit", "cgroup_v1", "cgroup_v2", "kvm",
	// "save_memory", "save_files", "save_layer".
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
	// Limits are enforced, and are what the guest sees as the size of its machine. With a Checkpoint of memory they must
	// be those that it was made with.
	Limits sandbox.Resources
	// Checkpoint is a directory that Save has written with SaveMemory or SaveFiles; empty means a fresh start. RootFS must
	// be the image that the saved guest ran from. After SaveMemory, Args, Env and Hostname are not used.
	Checkpoint string
	// Stream is what Save writes to a SaveSpec's Stream, in place of Checkpoint; the guest is loaded as it comes. It has to end
	// with io.EOF once that Save has returned without error, and with another error after any other end: then Start fails.
	Stream io.Reader
	// Hold has a guest that comes from a Stream stand still until Thaw: it is loaded, and nothing of it has run.
	Hold bool
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
