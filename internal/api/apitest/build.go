package apitest

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
)

// builds is what a node has of builds and of their files.
type builds struct {
	byID   map[string]*agentv1.GetBuildResponse
	asked  []*agentv1.BuildRequest
	pushed []*agentv1.PushRequest
	files  map[string]*file
	// unreachable makes every build from a registry fail at once.
	unreachable bool
}

type file struct {
	data     []byte
	complete bool
}

func newBuilds() builds {
	return builds{byID: make(map[string]*agentv1.GetBuildResponse), files: make(map[string]*file)}
}

// Asked returns the builds that the node was asked for.
func (n *Node) Asked() []*agentv1.BuildRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]*agentv1.BuildRequest(nil), n.builds.asked...)
}

// Pushed returns the pushes that the node was asked for.
func (n *Node) Pushed() []*agentv1.PushRequest {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]*agentv1.PushRequest(nil), n.builds.pushed...)
}

// File returns what the node has of a file, and whether that is all.
func (n *Node) File(hash string) (string, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f := n.builds.files[hash]
	if f == nil {
		return "", false
	}
	return string(f.data), f.complete
}

// CutOff makes builds from a registry fail, as where there is no network.
func (n *Node) CutOff() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.builds.unreachable = true
}

// Build implements agent.v1: the build stays under way until FinishBuild.
func (n *Node) Build(_ context.Context, req *agentv1.BuildRequest) (*agentv1.BuildResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil {
		return nil, n.err
	}
	n.builds.asked = append(n.builds.asked, req)
	b := begun("fetching")
	b.Source = strings.Join(req.GetSources()[:min(1, len(req.GetSources()))], "")
	n.builds.byID[req.GetBuildId()] = b
	if n.builds.unreachable && len(req.GetSources()) > 0 {
		b.State, b.Error, b.FailedStep = agentv1.BuildState_BUILD_STATE_FAILED, "no such host", "base"
	}
	return &agentv1.BuildResponse{BuildId: req.GetBuildId()}, nil
}

func begun(step string) *agentv1.GetBuildResponse {
	return &agentv1.GetBuildResponse{
		State: agentv1.BuildState_BUILD_STATE_BUILDING, Step: "fetch", Progress: 0.25,
		Entries: []*agentv1.LogEntry{{Time: timestamppb.Now(), Level: "info", Message: step}},
	}
}

// Push implements agent.v1: the push stays under way until FinishBuild.
func (n *Node) Push(_ context.Context, req *agentv1.PushRequest) (*agentv1.PushResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil {
		return nil, n.err
	}
	n.builds.pushed = append(n.builds.pushed, req)
	n.builds.byID[req.GetBuildId()] = begun("pushing")
	return &agentv1.PushResponse{}, nil
}

// PutFile implements agent.v1.
func (n *Node) PutFile(_ context.Context, req *agentv1.PutFileRequest) (*agentv1.PutFileResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil {
		return nil, n.err
	}
	f := n.builds.files[req.GetHash()]
	if f == nil {
		f = &file{}
		n.builds.files[req.GetHash()] = f
	}
	if len(req.GetData()) > 0 {
		if req.GetOffset() != int64(len(f.data)) {
			return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("offset %d: want %d", req.GetOffset(), len(f.data)))
		}
		f.data = append(f.data, req.GetData()...)
		f.complete = req.GetComplete()
	}
	return &agentv1.PutFileResponse{Bytes: int64(len(f.data)), Complete: f.complete}, nil
}

// CancelBuild implements agent.v1.
func (n *Node) CancelBuild(_ context.Context, req *agentv1.CancelBuildRequest) (*agentv1.CancelBuildResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b, ok := n.builds.byID[req.GetBuildId()]
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("build %s is not here", req.GetBuildId()))
	}
	if b.GetState() != agentv1.BuildState_BUILD_STATE_BUILDING {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("build %s has ended", req.GetBuildId()))
	}
	b.State, b.Error = agentv1.BuildState_BUILD_STATE_FAILED, "cancelled"
	return &agentv1.CancelBuildResponse{}, nil
}

// Say adds lines to the log of a build.
func (n *Node) Say(id string, lines ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range lines {
		n.builds.byID[id].Entries = append(n.builds.byID[id].Entries, &agentv1.LogEntry{Time: timestamppb.Now(), Level: "debug", Message: l})
	}
}

// SaveBuild gives a build that FinishBuild is to end a checkpoint of memory, and settings.
func (n *Node) SaveBuild(id string, guest *agentv1.GuestSettings) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b := n.builds.byID[id]
	b.Guest = guest
	b.Checkpoint = &agentv1.Checkpoint{Id: id, Kind: agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY, Bytes: 7 << 20}
}

// FinishBuild ends a build: with an image where failure is empty.
func (n *Node) FinishBuild(id, digest, failure string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	b := n.builds.byID[id]
	b.State, b.Progress, b.ImageDigest, b.ImageBytes, b.Error = agentv1.BuildState_BUILD_STATE_READY, 1, digest, 1<<20, failure
	if failure != "" {
		b.State = agentv1.BuildState_BUILD_STATE_FAILED
	}
	b.Entries = append(b.Entries, &agentv1.LogEntry{Time: timestamppb.Now(), Level: "info", Message: "done"})
}

// ForgetBuilds drops all builds, as a restart does.
func (n *Node) ForgetBuilds() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.builds.byID)
}

// GetBuild implements agent.v1. Where there is nothing new it waits.
func (n *Node) GetBuild(ctx context.Context, req *agentv1.GetBuildRequest) (*agentv1.GetBuildResponse, error) {
	until := time.NewTimer(req.GetWait().AsDuration())
	defer until.Stop()
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for {
		b, err := n.buildNow(req)
		if err != nil || len(b.GetEntries()) > 0 || b.GetState() != agentv1.BuildState_BUILD_STATE_BUILDING {
			return b, err
		}
		select {
		case <-ctx.Done():
			return nil, connect.NewError(connect.CodeCanceled, ctx.Err())
		case <-until.C:
			return b, nil
		case <-look.C:
		}
	}
}

func (n *Node) buildNow(req *agentv1.GetBuildRequest) (*agentv1.GetBuildResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil {
		return nil, n.err
	}
	b, ok := n.builds.byID[req.GetBuildId()]
	if !ok {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("build %s is not here", req.GetBuildId()))
	}
	c, _ := proto.Clone(b).(*agentv1.GetBuildResponse) // of the same type
	c.EntriesTotal = int32(len(c.Entries))             //nolint:gosec // a test's few
	c.Entries = c.Entries[min(int(req.GetOffset()), len(c.Entries)):]
	if limit := int(req.GetLimit()); limit > 0 {
		c.Entries = c.Entries[:min(limit, len(c.Entries))]
	}
	return c, nil
}

// RemoveTemplate implements agent.v1.
func (n *Node) RemoveTemplate(_ context.Context, req *agentv1.RemoveTemplateRequest) (*agentv1.RemoveTemplateResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.removed = append(n.removed, req.GetImageDigest())
	return &agentv1.RemoveTemplateResponse{}, n.err
}
