package daemon

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// aloneStore is what a node knows of the cluster without its server: a copy of the templates, in a file. Everything else is
// empty, and nothing can be changed. It is safe for concurrent use.
type aloneStore struct {
	path    string
	servers func() []string
	secret  []byte

	*copied
}

// copied is the copy of the templates.
type copied struct {
	mu   sync.RWMutex
	held keptTemplates
}

// keptTemplates is the file of an aloneStore.
type keptTemplates struct {
	Version   string             `json:"version"`
	Templates []sandbox.Template `json:"templates"`
}

func newAloneStore(path string, servers func() []string) *aloneStore {
	return &aloneStore{path: path, servers: servers, copied: &copied{}}
}

// with returns the store with a token secret; the templates are shared.
func (s *aloneStore) with(secret []byte) *aloneStore {
	next := *s
	next.secret = secret
	return &next
}

// load reads the file. A damaged one is fetched again from the server.
func (s *aloneStore) load() error {
	text, err := os.ReadFile(s.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the copy of the templates: %w", err)
	}
	var kept keptTemplates
	if json.Unmarshal(text, &kept) != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = kept
	return nil
}

func (s *aloneStore) version() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.held.Version
}

// replace takes the server's templates. Builds that are not ready are left out: nothing starts from them.
func (s *aloneStore) replace(version string, all []sandbox.Template) error {
	for i := range all {
		all[i].Builds = slices.DeleteFunc(slices.Clone(all[i].Builds), func(b sandbox.Build) bool { return b.State != sandbox.BuildReady })
	}
	kept := keptTemplates{Version: version, Templates: all}
	text, err := json.Marshal(kept)
	if err == nil {
		err = writeSecret(s.path, string(text))
	}
	if err != nil {
		return fmt.Errorf("keep the copy of the templates: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = kept
	return nil
}

// knownBuilds returns those checkpoints that a template here names.
func (s *aloneStore) knownBuilds(ids []string) []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	known := make(map[string]bool)
	for i := range s.held.Templates {
		for _, b := range s.held.Templates[i].Builds {
			known[b.ID] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return !known[id] })
}

// elsewhere refuses what is the cluster's.
func (s *aloneStore) elsewhere(what string) error {
	return sandbox.Unsupportedf("%s the cluster's: ask the server at %s", what, strings.Join(s.servers(), ", "))
}

// Template returns a template by id or name.
func (s *aloneStore) Template(_ context.Context, idOrName string) (sandbox.Template, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, t := range s.held.Templates {
		if string(t.ID) == idOrName || slices.Contains(t.Names, idOrName) {
			return t, nil
		}
	}
	return sandbox.Template{}, sandbox.NotFoundf("template %q is not known on this node", idOrName)
}

// Templates returns all templates.
func (s *aloneStore) Templates(context.Context) ([]sandbox.Template, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clone(s.held.Templates), nil
}

// CreateTemplate is refused.
func (s *aloneStore) CreateTemplate(context.Context, sandbox.Template) error {
	return s.elsewhere("templates are")
}

// UpdateTemplate is refused.
func (s *aloneStore) UpdateTemplate(context.Context, sandbox.TemplateID, func(*sandbox.Template) error) (sandbox.Template, error) {
	return sandbox.Template{}, s.elsewhere("templates are")
}

// DeleteTemplate is refused.
func (s *aloneStore) DeleteTemplate(context.Context, sandbox.TemplateID) (sandbox.Template, error) {
	return sandbox.Template{}, s.elsewhere("templates are")
}

// PutNode has nothing to keep: the node itself registers with each start.
func (s *aloneStore) PutNode(context.Context, sandbox.Node) error { return nil }

// DeleteNode is refused.
func (s *aloneStore) DeleteNode(context.Context, sandbox.NodeID) error {
	return s.elsewhere("nodes are")
}

// Nodes returns none.
func (s *aloneStore) Nodes(context.Context) ([]sandbox.Node, error) { return nil, nil }

// NodeSettings returns none.
func (s *aloneStore) NodeSettings(context.Context) (map[sandbox.NodeID]sandbox.NodeSettings, error) {
	return map[sandbox.NodeID]sandbox.NodeSettings{}, nil
}

// UpdateNodeSettings is refused.
func (s *aloneStore) UpdateNodeSettings(context.Context, sandbox.NodeID, func(*sandbox.NodeSettings) error) (sandbox.NodeSettings, error) {
	return sandbox.NodeSettings{}, s.elsewhere("nodes are")
}

// DeleteNodeSettings is refused.
func (s *aloneStore) DeleteNodeSettings(context.Context, sandbox.NodeID) error {
	return s.elsewhere("nodes are")
}

// SchedulerPolicy returns none.
func (s *aloneStore) SchedulerPolicy(context.Context) (json.RawMessage, error) {
	return nil, sandbox.NotFoundf("no policy is stored on a node")
}

// PutSchedulerPolicy is refused.
func (s *aloneStore) PutSchedulerPolicy(context.Context, json.RawMessage) error {
	return s.elsewhere("scheduling is")
}

// Placements returns none: what was decided about moves is the server's to know.
func (s *aloneStore) Placements(context.Context) ([]sandbox.Placement, error) { return nil, nil }

// Placement is unknown here, so that nothing is decided about a sandbox on its way.
func (s *aloneStore) Placement(context.Context, sandbox.ID) (sandbox.Placement, error) {
	return sandbox.Placement{}, sandbox.Unavailablef("only a server knows where a sandbox was moved to")
}

// CommitPlacement is refused.
func (s *aloneStore) CommitPlacement(context.Context, sandbox.Placement) error {
	return s.elsewhere("moves are")
}

// ChangePlacement is refused.
func (s *aloneStore) ChangePlacement(context.Context, sandbox.ID, func(*sandbox.Placement) bool) error {
	return s.elsewhere("moves are")
}

// Replicas returns none.
func (s *aloneStore) Replicas(context.Context) ([]sandbox.Replica, error) { return nil, nil }

// CreateReplica is refused.
func (s *aloneStore) CreateReplica(context.Context, sandbox.Replica) error {
	return s.elsewhere("replicas are")
}

// UpdateReplica is refused.
func (s *aloneStore) UpdateReplica(context.Context, sandbox.Replica, sandbox.Replica) error {
	return s.elsewhere("replicas are")
}

// RemoveReplica is refused.
func (s *aloneStore) RemoveReplica(context.Context, sandbox.Replica) error {
	return s.elsewhere("replicas are")
}

// MoveReplica is refused.
func (s *aloneStore) MoveReplica(context.Context, sandbox.Replica, sandbox.Replica, sandbox.Placement) error {
	return s.elsewhere("replicas are")
}

// KillIntents returns none.
func (s *aloneStore) KillIntents(context.Context) ([]sandbox.KillIntent, error) { return nil, nil }

// PutKillIntent is refused: the node is here, and ends its sandboxes itself.
func (s *aloneStore) PutKillIntent(context.Context, sandbox.KillIntent) error {
	return s.elsewhere("sandboxes of other nodes are")
}

// DeleteKillIntent has nothing to delete.
func (s *aloneStore) DeleteKillIntent(context.Context, sandbox.ID) error { return nil }

// Pin pins nothing: there is one node, which knows the keys of its sandboxes itself.
func (s *aloneStore) Pin(_ context.Context, p sandbox.Pin, _ time.Duration) (kept sandbox.Pin, was bool, err error) {
	return p, false, nil
}

// MovePin has nothing to move.
func (s *aloneStore) MovePin(context.Context, sandbox.Pin, sandbox.NodeID) error { return nil }

// Unpin has nothing to take away.
func (s *aloneStore) Unpin(context.Context, string) error { return nil }

// Secret returns the token secret that the server gave; others are of this process alone.
func (s *aloneStore) Secret(_ context.Context, name string, size int) ([]byte, error) {
	if name == tokenSecretName && len(s.secret) == size {
		return s.secret, nil
	}
	fresh := make([]byte, size)
	_, _ = rand.Read(fresh) // never fails
	return fresh, nil
}

// tokenSecretName is the secret that access tokens are derived from, as control asks for it.
const tokenSecretName = "sandbox-access-token"

// CreateKey is refused.
func (s *aloneStore) CreateKey(context.Context, string) (control.Key, string, error) {
	return control.Key{}, "", s.elsewhere("keys are")
}

// Keys is refused.
func (s *aloneStore) Keys(context.Context) ([]control.Key, error) {
	return nil, s.elsewhere("keys are")
}

// RevokeKey is refused.
func (s *aloneStore) RevokeKey(context.Context, string) error { return s.elsewhere("keys are") }

// ownNode reaches the node of this process, for its own API.
type ownNode struct{ node *nodeRole }

// Agent returns the node's commands as far as they are not the cluster's.
func (o ownNode) Agent(id sandbox.NodeID) (agentv1connect.AgentServiceClient, bool) {
	if o.node.agent == nil || id != o.node.agent.NodeID() {
		return nil, false
	}
	return ownCommands{o.node.agent}, true
}

// ownCommands are the commands that a node gives to itself. What files of templates and checkpoints there are, and what
// becomes of a sandbox that moves, is a server's to say.
type ownCommands struct {
	agentv1connect.AgentServiceClient
}

func notAlone(what string) error {
	return sandbox.Unsupportedf("%s the cluster's: ask its server", what)
}

// Build is refused.
func (ownCommands) Build(context.Context, *agentv1.BuildRequest) (*agentv1.BuildResponse, error) {
	return nil, notAlone("builds are")
}

// PutFile is refused.
func (ownCommands) PutFile(context.Context, *agentv1.PutFileRequest) (*agentv1.PutFileResponse, error) {
	return nil, notAlone("builds are")
}

// Push is refused.
func (ownCommands) Push(context.Context, *agentv1.PushRequest) (*agentv1.PushResponse, error) {
	return nil, notAlone("templates are")
}

// RemoveTemplate is refused.
func (ownCommands) RemoveTemplate(context.Context, *agentv1.RemoveTemplateRequest) (*agentv1.RemoveTemplateResponse, error) {
	return nil, notAlone("templates are")
}

// Snapshot is refused.
func (ownCommands) Snapshot(context.Context, *agentv1.SnapshotRequest) (*agentv1.SnapshotResponse, error) {
	return nil, notAlone("snapshots are")
}

// RemoveCheckpoint is refused.
func (ownCommands) RemoveCheckpoint(context.Context, *agentv1.RemoveCheckpointRequest) (*agentv1.RemoveCheckpointResponse, error) {
	return nil, notAlone("checkpoints are")
}

// Resume makes a sandbox run that no other node can have brought back: only a server can know of the others.
func (o ownCommands) Resume(ctx context.Context, req *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	req.Permitted = false
	return o.AgentServiceClient.Resume(ctx, req)
}

// Rollback is like Resume.
func (o ownCommands) Rollback(ctx context.Context, req *agentv1.RollbackRequest) (*agentv1.RollbackResponse, error) {
	req.Permitted = false
	return o.AgentServiceClient.Rollback(ctx, req)
}

// Guard is refused.
func (ownCommands) Guard(context.Context, *agentv1.GuardRequest) (*agentv1.GuardResponse, error) {
	return nil, notAlone("copies are")
}

// Fetch is refused.
func (ownCommands) Fetch(context.Context, *agentv1.FetchRequest) (*agentv1.FetchResponse, error) {
	return nil, notAlone("copies are")
}

// Store is refused.
func (ownCommands) Store(context.Context, *agentv1.StoreRequest) (*agentv1.StoreResponse, error) {
	return nil, notAlone("copies are")
}

// Depart is refused.
func (ownCommands) Depart(context.Context, *agentv1.DepartRequest) (*agentv1.DepartResponse, error) {
	return nil, notAlone("moves are")
}

// Receive is refused.
func (ownCommands) Receive(context.Context, *agentv1.ReceiveRequest) (*agentv1.ReceiveResponse, error) {
	return nil, notAlone("moves are")
}

// Arrive is refused.
func (ownCommands) Arrive(context.Context, *agentv1.ArriveRequest) (*agentv1.ArriveResponse, error) {
	return nil, notAlone("moves are")
}

// Return is refused.
func (ownCommands) Return(context.Context, *agentv1.ReturnRequest) (*agentv1.ReturnResponse, error) {
	return nil, notAlone("moves are")
}

// Forget is refused.
func (ownCommands) Forget(context.Context, *agentv1.ForgetRequest) (*agentv1.ForgetResponse, error) {
	return nil, notAlone("moves are")
}
