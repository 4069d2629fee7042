package apitest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/control"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Records keeps what the store and the history keep, in memory.
type Records struct {
	mu        sync.Mutex
	templates map[sandbox.TemplateID]sandbox.Template
	nodes     map[sandbox.NodeID]sandbox.Node
	settings  map[sandbox.NodeID]sandbox.NodeSettings
	policy    json.RawMessage
	keys      map[string]control.Key
	secrets   map[string]string // key id by secret
	events    []control.Event
	failing   error
	reads     int
}

// NewRecords returns empty records.
func NewRecords() *Records {
	return &Records{
		templates: make(map[sandbox.TemplateID]sandbox.Template), nodes: make(map[sandbox.NodeID]sandbox.Node),
		settings: make(map[sandbox.NodeID]sandbox.NodeSettings),
		keys:     make(map[string]control.Key), secrets: make(map[string]string),
	}
}

// FailHistory makes Append fail, until err is nil.
func (r *Records) FailHistory(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failing = err
}

// TemplateReads counts the reads of single templates.
func (r *Records) TemplateReads() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reads
}

// CreateTemplate implements control's interface.
func (r *Records) CreateTemplate(_ context.Context, t sandbox.Template) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, old := range r.templates {
		for _, n := range t.Names {
			if slices.Contains(old.Names, n) {
				return sandbox.Conflictf("template name %q is taken", n)
			}
		}
	}
	r.templates[t.ID] = t
	return nil
}

// Template implements control's interface.
func (r *Records) Template(_ context.Context, ref string) (sandbox.Template, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reads++
	for id, t := range r.templates {
		if string(id) == ref || slices.Contains(t.Names, ref) {
			return t, nil
		}
	}
	return sandbox.Template{}, sandbox.NotFoundf("template %q does not exist", ref)
}

// UpdateTemplate implements control's interface.
func (r *Records) UpdateTemplate(_ context.Context, id sandbox.TemplateID, change func(*sandbox.Template) error) (sandbox.Template, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t, ok := r.templates[id]
	if !ok {
		return t, sandbox.NotFoundf("template %q does not exist", id)
	}
	t.Names, t.Builds, t.Tags = slices.Clone(t.Names), slices.Clone(t.Builds), maps.Clone(t.Tags)
	if err := change(&t); err != nil {
		return t, err
	}
	r.templates[id] = t
	return t, nil
}

// DeleteTemplate implements control's interface.
func (r *Records) DeleteTemplate(_ context.Context, id sandbox.TemplateID) (sandbox.Template, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t, ok := r.templates[id]
	if !ok {
		return t, sandbox.NotFoundf("template %q does not exist", id)
	}
	delete(r.templates, id)
	return t, nil
}

// Templates implements control's interface.
func (r *Records) Templates(context.Context) ([]sandbox.Template, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]sandbox.Template, 0, len(r.templates))
	for _, t := range r.templates {
		out = append(out, t)
	}
	slices.SortFunc(out, func(a, b sandbox.Template) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// PutNode implements control's interface.
func (r *Records) PutNode(_ context.Context, n sandbox.Node) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nodes[n.ID] = n
	return nil
}

// DeleteNode implements control's interface.
func (r *Records) DeleteNode(_ context.Context, id sandbox.NodeID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.nodes, id)
	return nil
}

// DeleteNodeSettings implements control's interface.
func (r *Records) DeleteNodeSettings(_ context.Context, id sandbox.NodeID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.settings, id)
	return nil
}

// Nodes implements control's interface.
func (r *Records) Nodes(context.Context) ([]sandbox.Node, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]sandbox.Node, 0, len(r.nodes))
	for _, n := range r.nodes {
		out = append(out, n)
	}
	return out, nil
}

// NodeSettings implements control's interface.
func (r *Records) NodeSettings(context.Context) (map[sandbox.NodeID]sandbox.NodeSettings, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.settings), nil
}

// UpdateNodeSettings implements control's interface.
func (r *Records) UpdateNodeSettings(
	_ context.Context, id sandbox.NodeID, change func(*sandbox.NodeSettings) error,
) (sandbox.NodeSettings, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.settings[id]
	next := old.Clone()
	if err := change(&next); err != nil {
		return sandbox.NodeSettings{}, err
	}
	r.settings[id] = next
	return next, nil
}

// SchedulerPolicy implements control's interface.
func (r *Records) SchedulerPolicy(context.Context) (json.RawMessage, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.policy == nil {
		return nil, sandbox.NotFoundf("no policy is stored")
	}
	return r.policy, nil
}

// PutSchedulerPolicy implements control's interface.
func (r *Records) PutSchedulerPolicy(_ context.Context, policy json.RawMessage) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.policy = policy
	return nil
}

// Secret implements control's interface.
func (*Records) Secret(_ context.Context, name string, size int) ([]byte, error) {
	return []byte(strings.Repeat(name, size)[:size]), nil
}

// CreateKey implements control's interface.
func (r *Records) CreateKey(_ context.Context, name string) (control.Key, string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := fmt.Sprintf("key%d", len(r.secrets)+1)
	secret := fmt.Sprintf("e2b_%040x", len(r.secrets)+1)
	r.keys[id] = control.Key{ID: id, Name: name, Hint: "e2b_...", CreatedAt: time.Now()}
	r.secrets[secret] = id
	return r.keys[id], secret, nil
}

// Keys implements control's interface.
func (r *Records) Keys(context.Context) ([]control.Key, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]control.Key, 0, len(r.keys))
	for _, k := range r.keys {
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b control.Key) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// RevokeKey implements control's interface.
func (r *Records) RevokeKey(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.keys[id]; !ok {
		return sandbox.NotFoundf("key %q does not exist", id)
	}
	delete(r.keys, id)
	return nil
}

// Authenticate implements the API's interface.
func (r *Records) Authenticate(_ context.Context, key string) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := r.secrets[key]
	if _, ok := r.keys[id]; !ok {
		return "", sandbox.NotFoundf("no such key")
	}
	return id, nil
}

// Append implements control's interface.
func (r *Records) Append(_ context.Context, events []control.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failing != nil {
		return r.failing
	}
	for _, e := range events {
		known := func(o control.Event) bool { return o.NodeID == e.NodeID && o.Sequence == e.Sequence }
		if e.Sequence != 0 && slices.ContainsFunc(r.events, known) {
			continue
		}
		e.ID = int64(len(r.events) + 1)
		r.events = append(r.events, e)
	}
	return nil
}

// Query implements control's interface.
func (r *Records) Query(_ context.Context, q control.EventQuery) ([]control.Event, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := []control.Event{}
	for _, e := range r.events {
		if (q.SandboxID == "" || e.SandboxID == q.SandboxID) && (q.Type == "" || e.Type == q.Type) && e.ID > q.After &&
			!e.Time.Before(q.Since) {
			out = append(out, e)
		}
	}
	if q.After == 0 && q.Since.IsZero() {
		return out[max(0, len(out)-q.Limit):], nil
	}
	return out[:min(len(out), q.Limit)], nil
}

// Agents reaches nodes in this process.
type Agents struct {
	mu    sync.Mutex
	nodes map[sandbox.NodeID]agentv1connect.AgentServiceClient
	// bucket is what the nodes stored, by checkpoint.
	bucket map[string]*agentv1.Sandbox
}

// Stored returns the checkpoints in the bucket that all nodes have, in order.
func (a *Agents) Stored() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Sorted(maps.Keys(a.bucket))
}

// store puts what a sandbox is paused in into the bucket; nil takes it out.
func (a *Agents) store(checkpoint string, b *agentv1.Sandbox) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if b == nil {
		delete(a.bucket, checkpoint)
		return
	}
	if a.bucket == nil {
		a.bucket = make(map[string]*agentv1.Sandbox)
	}
	a.bucket[checkpoint] = b
}

func (a *Agents) stored(checkpoint string) *agentv1.Sandbox {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bucket[checkpoint]
}

// Agent implements control's interface.
func (a *Agents) Agent(id sandbox.NodeID) (agentv1connect.AgentServiceClient, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, ok := a.nodes[id]
	return c, ok
}

// Set connects a node, or disconnects it with nil.
func (a *Agents) Set(id sandbox.NodeID, c agentv1connect.AgentServiceClient) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c == nil {
		delete(a.nodes, id)
		return
	}
	a.nodes[id] = c
}
