package apitest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// GuestVersion is what the sandboxes of a Node say of the agent inside.
const GuestVersion = "0.6.13"

var _ agentv1connect.AgentServiceClient = (*Node)(nil)

// Node answers agent.v1 as a node does, and runs nothing.
type Node struct {
	agentv1connect.UnimplementedAgentServiceHandler

	ID       sandbox.NodeID
	Capacity sandbox.Resources
	// EngineVersion and CPUFeatures are what the node says of itself when it joins.
	EngineVersion string
	CPUFeatures   []string
	// Room is how many sandboxes fit; 0 means any number.
	Room int

	mu    sync.Mutex
	err   error
	boxes map[string]*agentv1.Sandbox
	// allocated is the sum over boxes.
	allocated sandbox.Resources
	changes   []*nodev1.Change
	sequence  int64
	builds    builds
	created   []*agentv1.CreateRequest
	madeIDs   []string // of created
	removed   []string
	saved     saved
	moving    moving
	busy      []string // as SetBusy said
}

// NewNode returns a node with room for a few thousand sandboxes.
func NewNode(id sandbox.NodeID) *Node {
	return &Node{
		ID: id, Capacity: sandbox.Resources{MilliCPU: 1 << 40, MemoryBytes: 1 << 60, DiskBytes: 1 << 60},
		boxes: make(map[string]*agentv1.Sandbox), builds: newBuilds(),
	}
}

// Fail makes every command answer with err, until it is nil.
func (n *Node) Fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
}

// SetBusy has the node say that these sandboxes are in use, and no others.
func (n *Node) SetBusy(ids ...sandbox.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.busy = nil
	for _, id := range ids {
		n.busy = append(n.busy, string(id))
	}
}

// Busy returns what SetBusy said.
func (n *Node) Busy() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.busy)
}

// Created returns the create requests that the node took.
func (n *Node) Created() []*agentv1.CreateRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]*agentv1.CreateRequest(nil), n.created...)
}

// Removed returns the digests of the images that the node was told to remove.
func (n *Node) Removed() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.removed...)
}

// note records a change of a sandbox. It requires mu.
func (n *Node) note(b *agentv1.Sandbox, kind string) {
	n.sequence++
	copied, _ := proto.Clone(b).(*agentv1.Sandbox) // of the same type
	n.changes = append(n.changes, &nodev1.Change{
		Sequence: n.sequence, Time: timestamppb.Now(), Type: kind, Sandbox: copied,
	})
}

// Changes returns what happened after the sequence number.
func (n *Node) Changes(after int64) []*nodev1.Change {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []*nodev1.Change
	for _, c := range n.changes {
		if c.GetSequence() > after {
			out = append(out, c)
		}
	}
	return out
}

// Standing returns the last change of each sandbox that the node has.
func (n *Node) Standing() []*nodev1.Change {
	n.mu.Lock()
	defer n.mu.Unlock()
	last := make(map[string]*nodev1.Change)
	for _, c := range n.changes {
		if _, ok := n.boxes[c.GetSandbox().GetId()]; ok {
			last[c.GetSandbox().GetId()] = c
		}
	}
	return slices.Collect(maps.Values(last))
}

// Load returns the node's use. It locks.
func (n *Node) Load() *agentv1.Load {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.load()
}

func (n *Node) load() *agentv1.Load {
	return &agentv1.Load{
		Capacity: resources(n.Capacity), Allocated: resources(n.allocated), Sandboxes: int32(len(n.boxes)), //nolint:gosec // a test's few
	}
}

func resources(r sandbox.Resources) *agentv1.Resources {
	return &agentv1.Resources{MilliCpu: r.MilliCPU, MemoryBytes: r.MemoryBytes, DiskBytes: r.DiskBytes}
}

func endAt(from time.Time, timeout *durationpb.Duration) *timestamppb.Timestamp {
	if timeout == nil {
		return nil
	}
	return timestamppb.New(from.Add(timeout.AsDuration()))
}

// Create implements agent.v1.
func (n *Node) Create(ctx context.Context, req *agentv1.CreateRequest) (*agentv1.CreateResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if n.err != nil {
		return nil, n.err
	}
	if err := n.obtain(req); err != nil {
		return nil, err
	}
	if err := n.admitCheckpoint(req); err != nil {
		return nil, err
	}
	if n.Room > 0 && n.runningBoxes() >= n.Room {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("node %s has no room", n.ID))
	}
	if key := req.GetIdempotencyKey(); key != "" {
		for i, made := range n.created {
			if b := n.boxes[n.madeIDs[i]]; b != nil && made.GetIdempotencyKey() == key {
				return &agentv1.CreateResponse{Sandbox: copyOf(b), Load: n.load()}, nil
			}
		}
	}
	now := time.Now()
	b := &agentv1.Sandbox{
		Id: string(sandbox.NewID(n.ID)), NodeId: string(n.ID), TemplateId: req.GetTemplateId(), TemplateName: req.GetTemplateName(),
		State: agentv1.State_STATE_RUNNING, Generation: 1, Resources: req.GetResources(), Metadata: req.GetMetadata(),
		StartedAt: timestamppb.New(now), EndAt: endAt(now, req.GetTimeout()), Secure: req.GetSecure(),
		AllowInternet: req.GetAllowInternet(), GuestVersion: GuestVersion,
		AutoPause: req.GetAutoPause(), AutoPauseKind: req.GetAutoPauseKind(), AutoResume: req.GetAutoResume(), Timeout: req.GetTimeout(), ImageDigest: req.GetImageDigest(),
		IdleTimeout: req.GetIdleTimeout(),
	}
	n.remember(b, req)
	n.boxes[b.GetId()] = b
	n.allocated = n.allocated.Add(amount(b))
	n.created = append(n.created, req)
	n.madeIDs = append(n.madeIDs, b.GetId())
	n.note(b, "started")
	return &agentv1.CreateResponse{Sandbox: copyOf(b), Load: n.load()}, nil
}

func copyOf(b *agentv1.Sandbox) *agentv1.Sandbox {
	c, _ := proto.Clone(b).(*agentv1.Sandbox) // of the same type
	return c
}

func (n *Node) find(id string) (*agentv1.Sandbox, error) {
	if n.err != nil {
		return nil, n.err
	}
	b, ok := n.boxes[id]
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("sandbox %s is not here", id))
	}
	return b, nil
}

// Get implements agent.v1.
func (n *Node) Get(_ context.Context, req *agentv1.GetRequest) (*agentv1.GetResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	return &agentv1.GetResponse{Sandbox: copyOf(b)}, nil
}

// Kill implements agent.v1.
func (n *Node) Kill(_ context.Context, req *agentv1.KillRequest) (*agentv1.KillResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err == nil && b.GetState() == agentv1.State_STATE_MIGRATING {
		err = refused("sandbox %s is %s", b.GetId(), b.GetState())
	}
	if err == nil {
		err = meant(b, req.GetGeneration())
	}
	if err != nil {
		return nil, err
	}
	kind := "killed"
	if req.GetTimedOut() {
		kind = "timed_out"
	}
	n.end(req.GetId(), agentv1.State_STATE_DELETED, req.GetReason(), kind)
	return &agentv1.KillResponse{}, nil
}

// meant refuses a command for another generation of a sandbox; 0 is any.
func meant(b *agentv1.Sandbox, generation int64) error {
	if generation > 0 && generation != b.GetGeneration() {
		return refused("sandbox %s has generation %d, not %d", b.GetId(), b.GetGeneration(), generation)
	}
	return nil
}

// end requires mu.
func (n *Node) end(id string, state agentv1.State, reason, kind string) {
	b := n.boxes[id]
	b.Generation++
	b.State, b.Reason, b.EndedAt = state, reason, timestamppb.Now()
	n.drop(id)
	n.note(b, kind)
}

// Crash ends a sandbox as if it had failed.
func (n *Node) Crash(id sandbox.ID, reason string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.end(string(id), agentv1.State_STATE_FAILED, reason, "failed")
}

// Lose drops a sandbox without a word, as a node does that lost its disk.
func (n *Node) Lose(id sandbox.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drop(string(id))
}

// drop requires mu.
func (n *Node) drop(id string) {
	if b, ok := n.boxes[id]; ok {
		if b.GetPausedAt() == nil {
			n.allocated = n.allocated.Sub(amount(b))
		}
		delete(n.boxes, id)
	}
}

func amount(b *agentv1.Sandbox) sandbox.Resources {
	r := b.GetResources()
	return sandbox.Resources{MilliCPU: r.GetMilliCpu(), MemoryBytes: r.GetMemoryBytes(), DiskBytes: r.GetDiskBytes()}
}

// SetTimeout implements agent.v1.
func (n *Node) SetTimeout(_ context.Context, req *agentv1.SetTimeoutRequest) (*agentv1.SetTimeoutResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	next := endAt(time.Now(), req.GetTimeout())
	earlier := next != nil && (b.GetEndAt() == nil || next.AsTime().Before(b.GetEndAt().AsTime()))
	if !req.GetExtendOnly() || !earlier {
		b.EndAt, b.Timeout = next, req.GetTimeout()
		b.Generation++
		n.note(b, "timeout_set")
	}
	return &agentv1.SetTimeoutResponse{Sandbox: copyOf(b)}, nil
}

// Metrics implements agent.v1 with two samples, a second apart.
func (n *Node) Metrics(_ context.Context, req *agentv1.MetricsRequest) (*agentv1.MetricsResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	sample := func(age time.Duration) *agentv1.MetricSample {
		return &agentv1.MetricSample{
			Time: timestamppb.New(time.Now().Add(-age)), CpuCount: 2, CpuUsedPercent: 12.5, MemoryUsedBytes: 64 << 20,
			MemoryTotalBytes: b.GetResources().GetMemoryBytes(), MemoryCacheBytes: 1 << 20, DiskUsedBytes: 3 << 20,
			DiskTotalBytes: b.GetResources().GetDiskBytes(),
		}
	}
	return &agentv1.MetricsResponse{Samples: []*agentv1.MetricSample{sample(time.Second), sample(0)}}, nil
}

// Logs implements agent.v1 with one entry of each level.
func (n *Node) Logs(_ context.Context, req *agentv1.LogsRequest) (*agentv1.LogsResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, err := n.find(req.GetId())
	if err != nil {
		return nil, err
	}
	var out []*agentv1.LogEntry
	for i, level := range []string{"debug", "info", "warn", "error"} {
		at := b.GetStartedAt().AsTime().Add(time.Duration(i) * time.Second)
		if start := req.GetStart(); start != nil && at.Before(start.AsTime()) || len(out) >= int(req.GetLimit()) {
			continue
		}
		out = append(out, &agentv1.LogEntry{
			Time: timestamppb.New(at), Level: level, Logger: "process", Message: "line of " + level, Fields: map[string]string{"n": strconv.Itoa(i)},
		})
	}
	return &agentv1.LogsResponse{Entries: out}, nil
}
