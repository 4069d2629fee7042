package apitest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// saved is what a Node keeps of sandboxes that do not run. The Node's mutex guards it.
type saved struct {
	checkpoints map[string]*agentv1.Checkpoint
	// env is what each sandbox was created with.
	env map[string]map[string]string
	// held is closed when pauses and resumes may go on.
	held chan struct{}
	// resumes counts the sandboxes that were brought back.
	resumes int
}

func (s *saved) put(p *agentv1.Checkpoint) {
	if s.checkpoints == nil {
		s.checkpoints = make(map[string]*agentv1.Checkpoint)
	}
	s.checkpoints[p.GetId()] = p
}

// Hold has pauses and resumes stop half-way until release is called.
func (n *Node) Hold() (release func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	held := make(chan struct{})
	n.saved.held = held
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.saved.held = nil
		close(held)
	}
}

// Checkpoints returns the ids of the checkpoints that the node has, in order.
func (n *Node) Checkpoints() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]string, 0, len(n.saved.checkpoints))
	for id := range n.saved.checkpoints {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// Keep gives the node a checkpoint, as one that a crash left.
func (n *Node) Keep(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.saved.put(&agentv1.Checkpoint{Id: id})
}

// Resumes counts the sandboxes that were brought back from a pause.
func (n *Node) Resumes() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.saved.resumes
}

func refused(format string, args ...any) error {
	return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(format, args...))
}

// turn changes a sandbox's state. It requires mu.
func (n *Node) turn(b *agentv1.Sandbox, state agentv1.State, kind string) {
	b.State = state
	b.Generation++
	n.note(b, kind)
}

// halfway waits, where Hold was called, with mu released. It requires mu.
func (n *Node) halfway(ctx context.Context) error {
	held := n.saved.held
	if held == nil {
		return nil
	}
	n.mu.Unlock()
	defer n.mu.Lock()
	select {
	case <-held:
		return nil
	case <-ctx.Done():
		return connect.NewError(connect.CodeCanceled, ctx.Err())
	}
}

// Pause implements agent.v1. Unlike a real node it joins nobody.
func (n *Node) Pause(ctx context.Context, req *agentv1.PauseRequest) (*agentv1.PauseResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	if b.GetState() != agentv1.State_STATE_RUNNING {
		return nil, refused("sandbox %s is already %s", b.GetId(), b.GetState())
	}
	if err := meant(b, req.GetGeneration()); err != nil {
		return nil, err
	}
	if req.GetTimedOut() {
		b.Reason = "timeout"
	}
	n.turn(b, agentv1.State_STATE_PAUSING, "pausing")
	if err := n.halfway(ctx); err != nil {
		return nil, err
	}
	n.allocated = n.allocated.Sub(amount(b))
	b.PausedAt, b.PausedKind, b.PausedBytes, b.EndAt = timestamppb.Now(), req.GetKind(), 1<<20, nil
	b.CheckpointId = checkpointOf(b)
	n.turn(b, agentv1.State_STATE_PAUSED, "paused")
	return &agentv1.PauseResponse{Sandbox: copyOf(b), Load: n.load()}, nil
}

// Resume implements agent.v1. Unlike a real node it joins nobody.
func (n *Node) Resume(ctx context.Context, req *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	if b, err := n.running(req); b != nil || err != nil {
		return b, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	switch {
	case b.GetState() != agentv1.State_STATE_PAUSED:
		return nil, refused("sandbox %s is %s", b.GetId(), b.GetState())
	case req.GetCold() && b.GetPausedKind() != agentv1.CheckpointKind_CHECKPOINT_KIND_FILES:
		return nil, connect.NewError(connect.CodeUnimplemented, errors.New("its memory was kept"))
	case n.moving.guarded[b.GetId()] && !req.GetPermitted():
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("it may have been brought back elsewhere"))
	case n.Room > 0 && n.runningBoxes() >= n.Room:
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("node %s has no room", n.ID))
	}
	n.turn(b, agentv1.State_STATE_RESUMING, "resuming")
	if err := n.halfway(ctx); err != nil {
		return nil, err
	}
	n.allocated = n.allocated.Add(amount(b))
	n.saved.resumes++
	n.guard(b.GetId(), false)
	b.CheckpointId, b.Reason = "", ""
	b.PausedAt, b.PausedKind, b.PausedBytes, b.EndAt = nil, 0, 0, endAt(time.Now(), req.GetTimeout())
	if req.AutoPause != nil {
		b.AutoPause = req.GetAutoPause()
	}
	n.turn(b, agentv1.State_STATE_RUNNING, "resumed")
	return &agentv1.ResumeResponse{Sandbox: copyOf(b), Load: n.load(), Resumed: true}, nil
}

// running answers a resume of a sandbox that runs.
func (n *Node) running(req *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	resp, err := n.Get(context.Background(), &agentv1.GetRequest{Id: req.GetId()})
	if err != nil || resp.GetSandbox().GetState() != agentv1.State_STATE_RUNNING {
		return nil, err
	}
	moved, err := n.SetTimeout(context.Background(), &agentv1.SetTimeoutRequest{
		Id: req.GetId(), Timeout: req.GetTimeout(), ExtendOnly: req.GetExtendOnly(),
	})
	return &agentv1.ResumeResponse{Sandbox: moved.GetSandbox(), Load: n.Load()}, err
}

// runningBoxes requires mu.
func (n *Node) runningBoxes() int {
	count := 0
	for _, b := range n.boxes {
		if b.GetState() != agentv1.State_STATE_PAUSED {
			count++
		}
	}
	return count
}

// Snapshot implements agent.v1.
func (n *Node) Snapshot(_ context.Context, req *agentv1.SnapshotRequest) (*agentv1.SnapshotResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	p := &agentv1.Checkpoint{
		Id: req.GetCheckpointId(), Kind: req.GetKind(), ImageDigest: BaseDigest, Resources: b.GetResources(), Bytes: 2 << 20,
		CreatedAt: timestamppb.Now(), SandboxId: b.GetId(), Guest: &agentv1.GuestSettings{Env: n.saved.env[b.GetId()], User: "user"},
	}
	n.saved.put(p)
	n.note(b, "snapshotted")
	copied, _ := proto.Clone(p).(*agentv1.Checkpoint) // of the same type
	return &agentv1.SnapshotResponse{Checkpoint: copied}, nil
}

// Rollback implements agent.v1.
func (n *Node) Rollback(_ context.Context, req *agentv1.RollbackRequest) (*agentv1.RollbackResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	if p := n.saved.checkpoints[req.GetCheckpointId()]; p.GetSandboxId() != b.GetId() {
		return nil, refused("checkpoint %s is not of sandbox %s", req.GetCheckpointId(), b.GetId())
	}
	n.turn(b, agentv1.State_STATE_RUNNING, "rolled_back")
	return &agentv1.RollbackResponse{Sandbox: copyOf(b), Load: n.load()}, nil
}

// RemoveCheckpoint implements agent.v1.
func (n *Node) RemoveCheckpoint(_ context.Context, req *agentv1.RemoveCheckpointRequest) (*agentv1.RemoveCheckpointResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.moving.calls = append(n.moving.calls, "RemoveCheckpoint "+req.GetCheckpointId())
	delete(n.saved.checkpoints, req.GetCheckpointId())
	if req.GetBucket() && n.err == nil {
		n.moving.agents.store(req.GetCheckpointId(), nil)
	}
	return &agentv1.RemoveCheckpointResponse{}, n.err
}

// admitCheckpoint refuses a create from a checkpoint that the node has not. It requires mu.
func (n *Node) admitCheckpoint(req *agentv1.CreateRequest) error {
	id := req.GetCheckpointId()
	if id != "" && n.saved.checkpoints[id] == nil && len(req.GetPeers()) > 0 {
		n.saved.put(&agentv1.Checkpoint{Id: id})
	}
	if id != "" && n.saved.checkpoints[id] == nil {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("checkpoint %s is not here", id))
	}
	return nil
}

// remember keeps what a checkpoint of the sandbox is to hold. It requires mu.
func (n *Node) remember(b *agentv1.Sandbox, req *agentv1.CreateRequest) {
	if n.saved.env == nil {
		n.saved.env = make(map[string]map[string]string)
	}
	env := make(map[string]string)
	maps.Copy(env, req.GetGuest().GetEnv())
	maps.Copy(env, req.GetEnv())
	n.saved.env[b.GetId()] = env
}

// PauseByItself pauses a sandbox as its timeout does: nobody is told but by the next report.
func (n *Node) PauseByItself(tb testing.TB, id sandbox.ID) {
	tb.Helper()
	req := &agentv1.PauseRequest{Id: string(id), Kind: agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY}
	if _, err := n.Pause(tb.Context(), req); err != nil {
		tb.Fatal(err)
	}
}
