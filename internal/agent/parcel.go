package agent

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// parcelOf returns what another node needs to go on with a sandbox, beside the guest that it moves with or the checkpoint that it
// is paused or migrating in.
func (a *Agent) parcelOf(in *instance) (*agentv1.Parcel, error) {
	r := in.record()
	var saved *agentv1.Checkpoint
	if !stands(&r) {
		m, err := a.saves.Get(r.Checkpoint)
		if err != nil {
			return nil, err
		}
		saved = toWireCheckpoint(&m)
	}
	var left *durationpb.Duration
	if r.Runs && !r.EndAt.IsZero() {
		left = durationpb.New(r.EndAt.Sub(now()))
	}
	return &agentv1.Parcel{
		Left: left, Sandbox: toWireSandbox(&r.Sandbox), ImageDigest: r.ImageDigest, Checkpoint: saved,
		Guest:   &agentv1.GuestSettings{Env: r.Guest.Env, User: r.Guest.User, Workdir: r.Guest.WorkDir},
		TokenOf: string(r.TokenOf), IdempotencyKey: r.IdempotencyKey, Source: r.Source, Running: r.Runs,
	}, nil
}

// fromWireParcel makes the record of a sandbox that comes to this node. It belongs to it when it has arrived.
func (a *Agent) fromWireParcel(p *agentv1.Parcel, generation int64) (*journal.Record, error) {
	b, c := p.GetSandbox(), p.GetCheckpoint()
	r := &journal.Record{
		Sandbox: fromWireSandbox(b), Guest: fromWireGuest(p.GetGuest()), TokenOf: sandbox.ID(p.GetTokenOf()),
		IdempotencyKey: p.GetIdempotencyKey(), Source: p.GetSource(), Runs: p.GetRunning(),
	}
	r.NodeID, r.State, r.Received, r.Generation, r.Deadline = a.node, sandbox.StateMigrating, true, generation, now().Add(moveDeadline)
	r.Reason, r.EndedAt = "", time.Time{}
	if left := p.GetLeft(); left != nil {
		r.EndAt = now().Add(left.AsDuration())
	}
	r.Clock = a.clock.reading()
	r.Checkpoint, r.ImageDigest = c.GetId(), p.GetImageDigest()
	r.PausedKind, r.PausedBytes = fromWireKind(c.GetKind()), c.GetBytes()
	if r.PausedAt.IsZero() && c != nil {
		r.PausedAt = now()
	}
	return r, checkReceived(r, b.GetGeneration(), c)
}

// checkReceived refuses what this node could not go on with.
func checkReceived(r *journal.Record, was int64, c *agentv1.Checkpoint) error {
	if _, err := sandbox.ParseID(string(r.ID)); err != nil {
		return err
	}
	if r.Runs != (c == nil) {
		return sandbox.Invalidf("sandbox %s, running: %t, with checkpoint %.80q: one that runs moves with its guest, and any other in a checkpoint",
			r.ID, r.Runs, r.Checkpoint)
	}
	if !r.Runs {
		if err := snapshot.CheckID(r.Checkpoint); err != nil {
			return err
		}
	}
	switch size := r.Resources; {
	case !digestForm.MatchString(r.ImageDigest):
		return sandbox.Invalidf("image digest %.80q of sandbox %s: want sha256: and 64 hex digits", r.ImageDigest, r.ID)
	case size.MilliCPU <= 0 || size.MemoryBytes <= 0 || size.DiskBytes <= 0 || r.PausedBytes < 0:
		return sandbox.Invalidf("sandbox %s: resources %+v, checkpoint of %d bytes: want each above zero", r.ID, size, r.PausedBytes)
	case c != nil && c.GetSandboxId() != string(r.ID):
		return sandbox.Invalidf("checkpoint %s is of sandbox %.40q, not of %s", r.Checkpoint, c.GetSandboxId(), r.ID)
	case r.Generation <= was:
		return sandbox.Conflictf("sandbox %s has generation %d already: a node that receives it gets a higher one, not %d", r.ID, was, r.Generation)
	}
	return nil
}

func fromWireSandbox(b *agentv1.Sandbox) sandbox.Sandbox {
	return sandbox.Sandbox{
		ID: sandbox.ID(b.GetId()), TemplateID: sandbox.TemplateID(b.GetTemplateId()), TemplateName: b.GetTemplateName(),
		Resources: fromWireResources(b.GetResources()), Metadata: b.GetMetadata(),
		StartedAt: fromWireTime(b.GetStartedAt()), EndAt: fromWireTime(b.GetEndAt()),
		Secure: b.GetSecure(), AllowInternet: b.GetAllowInternet(), GuestVersion: b.GetGuestVersion(),
		AutoPause: b.GetAutoPause(), AutoPauseKind: fromWireKind(b.GetAutoPauseKind()), PausedAt: fromWireTime(b.GetPausedAt()),
		AutoResume: b.GetAutoResume(), Timeout: b.GetTimeout().AsDuration(), IdleTimeout: b.GetIdleTimeout(),
	}
}
