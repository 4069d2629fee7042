package agent

import (
	"context"
	"errors"
	"maps"
	"regexp"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// What one create may carry.
const (
	maxMetadataBytes = 64 << 10
	maxEnvBytes      = 1 << 20
	maxKeyBytes      = 256
	maxTimeout       = 10 * 365 * 24 * time.Hour
)

var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// states pairs the states with their wire form.
//
//nolint:gochecknoglobals // a table, never written
var states = map[sandbox.State]agentv1.State{
	sandbox.StateCreating:  agentv1.State_STATE_CREATING,
	sandbox.StateRunning:   agentv1.State_STATE_RUNNING,
	sandbox.StatePausing:   agentv1.State_STATE_PAUSING,
	sandbox.StatePaused:    agentv1.State_STATE_PAUSED,
	sandbox.StateResuming:  agentv1.State_STATE_RESUMING,
	sandbox.StateStopping:  agentv1.State_STATE_STOPPING,
	sandbox.StateStopped:   agentv1.State_STATE_STOPPED,
	sandbox.StateMigrating: agentv1.State_STATE_MIGRATING,
	sandbox.StateLost:      agentv1.State_STATE_LOST,
	sandbox.StateFailed:    agentv1.State_STATE_FAILED,
	sandbox.StateDeleted:   agentv1.State_STATE_DELETED,
}

// codes pairs the kinds of error with their wire form, the first that fits counts.
//
//nolint:gochecknoglobals // a table, never written
var codes = []struct {
	kind error
	code connect.Code
}{
	{sandbox.ErrNotFound, connect.CodeNotFound},
	{sandbox.ErrConflict, connect.CodeFailedPrecondition},
	{sandbox.ErrInvalid, connect.CodeInvalidArgument},
	{sandbox.ErrExhausted, connect.CodeResourceExhausted},
	{sandbox.ErrUnavailable, connect.CodeUnavailable},
	{sandbox.ErrDenied, connect.CodePermissionDenied},
	{sandbox.ErrUnsupported, connect.CodeUnimplemented},
	{context.Canceled, connect.CodeCanceled},
	{context.DeadlineExceeded, connect.CodeDeadlineExceeded},
}

// wireError is an error with its code. Its text is the error's own: a caller in the same process shows that to people.
type wireError struct {
	err  error
	code connect.Code
}

func (e *wireError) Error() string { return e.err.Error() }
func (e *wireError) Unwrap() error { return e.err }

// As gives Connect what it puts on the wire.
func (e *wireError) As(target any) bool {
	t, ok := target.(**connect.Error)
	if ok {
		*t = connect.NewError(e.code, e.err)
	}
	return ok
}

// toWireError gives an error its code; the kind stays visible to a caller in the same process.
func toWireError(err error) error {
	if err == nil {
		return nil
	}
	for _, c := range codes {
		if errors.Is(err, c.kind) {
			return &wireError{err: err, code: c.code}
		}
	}
	return &wireError{err: err, code: connect.CodeInternal}
}

func toWireResources(r sandbox.Resources) *agentv1.Resources {
	return &agentv1.Resources{MilliCpu: r.MilliCPU, MemoryBytes: r.MemoryBytes, DiskBytes: r.DiskBytes}
}

func toWireTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func fromWireTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func toWireSandbox(s *sandbox.Sandbox) *agentv1.Sandbox {
	return &agentv1.Sandbox{
		Id: string(s.ID), NodeId: string(s.NodeID), TemplateId: string(s.TemplateID), TemplateName: s.TemplateName,
		State: states[s.State], Reason: s.Reason, Generation: s.Generation, Resources: toWireResources(s.Resources),
		Metadata: s.Metadata, StartedAt: toWireTime(s.StartedAt), EndAt: toWireTime(s.EndAt), EndedAt: toWireTime(s.EndedAt),
		Secure: s.Secure, AllowInternet: s.AllowInternet, GuestVersion: s.GuestVersion,
		AutoPause: s.AutoPause, AutoPauseKind: kinds[s.AutoPauseKind],
		PausedAt: toWireTime(s.PausedAt), PausedKind: kinds[s.PausedKind], PausedBytes: s.PausedBytes,
		CheckpointId: s.Checkpoint, ImageDigest: s.ImageDigest, Received: s.Received,
		AutoResume: s.AutoResume, Timeout: toWireDuration(s.Timeout), IdleTimeout: s.IdleTimeout,
	}
}

// toWireDuration leaves 0, which means never, unset.
func toWireDuration(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

// kinds pairs what a checkpoint keeps with its wire form.
//
//nolint:gochecknoglobals // a table, never written
var kinds = map[sandbox.CheckpointKind]agentv1.CheckpointKind{
	sandbox.CheckpointMemory: agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY,
	sandbox.CheckpointFiles:  agentv1.CheckpointKind_CHECKPOINT_KIND_FILES,
}

// fromWireKind returns what a checkpoint is to keep: memory, unless files alone are asked for.
func fromWireKind(k agentv1.CheckpointKind) sandbox.CheckpointKind {
	if k == agentv1.CheckpointKind_CHECKPOINT_KIND_FILES {
		return sandbox.CheckpointFiles
	}
	return sandbox.CheckpointMemory
}

func fromWireGuest(g *agentv1.GuestSettings) sandbox.GuestSettings {
	return sandbox.GuestSettings{Env: g.GetEnv(), User: g.GetUser(), WorkDir: g.GetWorkdir()}
}

func toWireCheckpoint(m *snapshot.Manifest) *agentv1.Checkpoint {
	return &agentv1.Checkpoint{
		Id: m.ID, Kind: kinds[m.Kind], ImageDigest: m.ImageDigest, Resources: toWireResources(m.Resources), Bytes: m.Bytes,
		CreatedAt: toWireTime(m.CreatedAt), SandboxId: string(m.SandboxID),
		Guest: &agentv1.GuestSettings{Env: m.Guest.Env, User: m.Guest.User, Workdir: m.Guest.WorkDir},
	}
}

// over returns the union of two environments, where the upper one wins.
func over(lower, upper map[string]string) map[string]string {
	if len(lower) == 0 {
		return upper
	}
	both := maps.Clone(lower)
	maps.Copy(both, upper)
	return both
}

func toWireChange(c *journal.Change) *nodev1.Change {
	return &nodev1.Change{Sequence: c.Sequence, Time: toWireTime(c.Time), Type: c.Type, Sandbox: toWireSandbox(&c.Sandbox)}
}

func toWireLoad(l *journal.Ledger, u usedShares) *agentv1.Load {
	return &agentv1.Load{
		Capacity: toWireResources(l.Capacity),
		// Warm ones give way to real ones, so a scheduler need not count them.
		Allocated: toWireResources(l.Allocated.Resources.Sub(l.Warm.Resources)),
		Sandboxes: int32(l.Allocated.Sandboxes - l.Warm.Sandboxes), //nolint:gosec // far below 2^31
		Creating:  int32(l.Creating),                               //nolint:gosec // far below 2^31
		Warm:      int32(l.Warm.Sandboxes),                         //nolint:gosec // far below 2^31
		UsedCpu:   u.cpu, UsedMemory: u.memory, UsedDisk: u.disk,
	}
}

// order is a create as it was asked for.
type order struct {
	template sandbox.TemplateID
	name     string
	pool     poolKey
	metadata map[string]string
	timeout  time.Duration // 0 means never
	secure   bool
	internet bool
	key      string
	custom   bool // the size is not the template's
	guest    sandbox.GuestSettings
	from     snapshot.Manifest // of pool.checkpoint; filled in by createOnce
	lacking  sources           // who has what the node lacks

	autoPause     bool
	autoPauseKind sandbox.CheckpointKind
	autoResume    bool
	idleTimeout   bool
}

func fromWireCreate(r *agentv1.CreateRequest) (*order, error) {
	o := &order{
		template: sandbox.TemplateID(r.GetTemplateId()), name: r.GetTemplateName(),
		metadata: r.GetMetadata(), guest: fromWireGuest(r.GetGuest()), secure: r.GetSecure(), internet: r.GetAllowInternet(), key: r.GetIdempotencyKey(), custom: r.GetCustomSize(),
		pool:      poolKey{digest: r.GetImageDigest(), size: fromWireResources(r.GetResources()), checkpoint: r.GetCheckpointId()},
		autoPause: r.GetAutoPause(), autoPauseKind: fromWireKind(r.GetAutoPauseKind()),
		lacking:    sources{peers: r.GetPeers(), bucket: r.GetBucket()},
		autoResume: r.GetAutoResume(), idleTimeout: r.GetIdleTimeout(),
	}
	o.guest.Env = over(o.guest.Env, r.GetEnv())
	if !digestForm.MatchString(o.pool.digest) {
		return nil, sandbox.Invalidf("image digest %.80q: want sha256: and 64 hex digits; is the template built?", o.pool.digest)
	}
	if s := o.pool.size; s.MilliCPU <= 0 || s.MemoryBytes <= 0 || s.DiskBytes <= 0 {
		return nil, sandbox.Invalidf("resources of %d millicores, %d bytes of memory, %d bytes of disk: want each above zero",
			s.MilliCPU, s.MemoryBytes, s.DiskBytes)
	}
	if n := sizeOf(o.metadata); n > maxMetadataBytes {
		return nil, sandbox.Invalidf("metadata of %d bytes: want at most %d", n, maxMetadataBytes)
	}
	if n := sizeOf(o.guest.Env); n > maxEnvBytes {
		return nil, sandbox.Invalidf("environment of %d bytes: want at most %d", n, maxEnvBytes)
	}
	if o.pool.checkpoint != "" {
		if err := snapshot.CheckID(o.pool.checkpoint); err != nil {
			return nil, err
		}
	}
	if n := len(o.key); n > maxKeyBytes {
		return nil, sandbox.Invalidf("idempotency key of %d bytes: want at most %d", n, maxKeyBytes)
	}
	if r.GetTimeout() == nil {
		return o, nil
	}
	var err error
	if o.timeout, err = fromWireTimeout(r.GetTimeout()); err == nil && o.timeout == 0 {
		err = sandbox.Invalidf("timeout of 0: want more, or none at all for a sandbox that never ends")
	}
	return o, err
}

func fromWireTimeout(d *durationpb.Duration) (time.Duration, error) {
	if err := d.CheckValid(); err != nil {
		return 0, sandbox.Invalidf("timeout: %v", err)
	}
	if t := d.AsDuration(); t >= 0 && t <= maxTimeout {
		return t, nil
	}
	return 0, sandbox.Invalidf("timeout of %v: want 0 to %v", d.AsDuration(), maxTimeout)
}

func fromWireResources(r *agentv1.Resources) sandbox.Resources {
	return sandbox.Resources{MilliCPU: r.GetMilliCpu(), MemoryBytes: r.GetMemoryBytes(), DiskBytes: r.GetDiskBytes()}
}

func sizeOf(m map[string]string) (n int) {
	for k, v := range m {
		n += len(k) + len(v)
	}
	return n
}
