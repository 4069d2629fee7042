package control

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// ForkRequest says how many copies of a sandbox are wanted.
type ForkRequest struct {
	// Count is 1 to MaxForks.
	Count int
	// Timeout of each fork, at least a second, or Never.
	Timeout time.Duration
}

// MaxForks is the most forks that one call makes.
const MaxForks = 100

const (
	// forkPrefix begins the names of the checkpoints that only forks start from: what is left of them after a crash is
	// known by it.
	forkPrefix = "fork-"
	// forksAtOnce bounds the creates that one call has under way at its node.
	forksAtOnce = 32
)

// Fork is the outcome of one fork: a running sandbox, or why there is none.
type Fork struct {
	Sandbox sandbox.Sandbox
	Err     error
}

// Fork makes copies of a running sandbox, which goes on: its processes, memory, files, metadata and environment. Each
// fork succeeds or fails for itself.
// Errors, of all forks: ErrInvalid, ErrNotFound, ErrConflict for a sandbox that is paused or on a cordoned node,
// ErrUnavailable.
func (c *Control) Fork(ctx context.Context, id sandbox.ID, req ForkRequest) ([]Fork, error) {
	if req.Count < 1 || req.Count > MaxForks {
		return nil, sandbox.Invalidf("count %d: want 1 to %d", req.Count, MaxForks)
	}
	if req.Timeout != Never {
		if err := c.limits.checkTimeout(req.Timeout, time.Second); err != nil {
			return nil, err
		}
	}
	h, err := c.hold(ctx, id)
	if err != nil {
		return nil, err
	}
	if h.box.State == sandbox.StatePaused {
		return nil, sandbox.Conflictf("sandbox %s is paused and cannot be forked: resume it first", id)
	}
	if err := c.fleet.open(h.box.NodeID); err != nil {
		return nil, fmt.Errorf("fork sandbox %s: %w", id, err)
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	saved := forkPrefix + newBuildID()
	defer c.saving.begin(saved)()
	point, err := c.save(ctx, h, &agentv1.SnapshotRequest{
		Id: string(id), CheckpointId: saved, Kind: agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY,
	})
	if err != nil {
		return nil, fmt.Errorf("fork sandbox %s: %w", id, err)
	}
	defer c.unsave(ctx, h, saved)
	return c.startForks(ctx, h, forkMessage(h.box, point, req.Timeout), req.Count), nil
}

// forkMessage asks for a sandbox that goes on from a checkpoint of another, as that one.
func forkMessage(box sandbox.Sandbox, p *agentv1.Checkpoint, timeout time.Duration) *agentv1.CreateRequest {
	msg := &agentv1.CreateRequest{
		TemplateId: string(box.TemplateID), TemplateName: box.TemplateName, ImageDigest: p.GetImageDigest(),
		Resources: p.GetResources(), Metadata: box.Metadata, Timeout: timeoutToWire(timeout), Secure: box.Secure,
		AllowInternet: box.AllowInternet, CustomSize: true, CheckpointId: p.GetId(), Guest: p.GetGuest(), AutoPause: box.AutoPause,
		AutoResume: box.AutoResume, IdleTimeout: box.IdleTimeout,
	}
	if box.AutoPause && box.AutoPauseKind == sandbox.CheckpointFiles {
		msg.AutoPauseKind = agentv1.CheckpointKind_CHECKPOINT_KIND_FILES
	}
	return msg
}

func (c *Control) startForks(ctx context.Context, h held, msg *agentv1.CreateRequest, count int) []Fork {
	out := make([]Fork, count)
	var g errgroup.Group
	g.SetLimit(forksAtOnce)
	for i := range out {
		g.Go(func() error {
			box, err := c.createAt(ctx, h.box.NodeID, msg)
			if err != nil { // the call as a whole succeeds, so that nobody else logs this
				c.log.LogAttrs(ctx, slog.LevelWarn, "fork not made", slog.String("sandbox_id", string(h.box.ID)), nodeAttr(h.box.NodeID), errAttr(err))
			}
			out[i] = Fork{Sandbox: box, Err: err}
			return nil
		})
	}
	_ = g.Wait() // each has its own error
	return out
}
