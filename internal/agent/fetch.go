package agent

import (
	"context"
	"net/http"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// sources is where an artifact can be had.
type sources struct {
	peers  []*agentv1.Peer
	bucket bool
}

// Artifacts serves what this node has to other members of the cluster. Whoever reaches it may have everything: the
// connection says who that is, and is checked where it arrives.
func (a *Agent) Artifacts() http.Handler { return http.NotFoundHandler() }

// fetchImage gets an image, and returns how many bytes that moved: 0 where it was there.
func (a *Agent) fetchImage(context.Context, string, sources) (moved int64, err error) {
	return 0, sandbox.Unsupportedf("this node cannot fetch yet")
}

// fetchCheckpoint gets a checkpoint and its image.
func (a *Agent) fetchCheckpoint(context.Context, string, sources, bool) (m snapshot.Manifest, moved int64, err error) {
	return m, 0, sandbox.Unsupportedf("this node cannot fetch yet")
}

// keptParcel returns what came with a checkpoint that was fetched.
func (a *Agent) keptParcel(id string) (*agentv1.Parcel, error) {
	return nil, sandbox.NotFoundf("checkpoint %s came without the sandbox's settings", id)
}

// forgetReplica deletes the checkpoint that is kept of another node's sandbox. What is not there is no error.
func (a *Agent) forgetReplica(context.Context, string) error { return nil }

// Fetch gets an image or a checkpoint from a peer.
func (a *Agent) Fetch(context.Context, *agentv1.FetchRequest) (*agentv1.FetchResponse, error) {
	return nil, toWireError(sandbox.Unsupportedf("this node cannot fetch yet"))
}

// Store writes a checkpoint to the bucket.
func (a *Agent) Store(context.Context, *agentv1.StoreRequest) (*agentv1.StoreResponse, error) {
	return nil, toWireError(sandbox.Unsupportedf("this node has no bucket yet"))
}
