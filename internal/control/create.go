package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// Never as a timeout means that the sandbox does not end by itself.
const Never time.Duration = -1

// CreateRequest is what a sandbox is to be.
type CreateRequest struct {
	// Template is a name or an id; "base" where it is empty.
	Template string
	Metadata map[string]string
	Env      map[string]string
	// Timeout is at least a second, or Never.
	Timeout time.Duration
	// Resources replace the template's where a part is not 0.
	Resources     sandbox.Resources
	Secure        bool
	AllowInternet bool
	// AutoPause has the timeout pause the sandbox instead of ending it; AutoPauseKind is what that keeps, memory where it is
	// empty.
	AutoPause     bool
	AutoPauseKind sandbox.CheckpointKind
	// AutoResume has a request make the sandbox run again while it is paused.
	AutoResume bool
	// IdleTimeout has the timeout count from the sandbox's last use, not from when it was set, as the template may say too.
	// With Never it means nothing.
	IdleTimeout bool
	// IdempotencyKey makes a node answer a repeated request with the sandbox that it made before.
	IdempotencyKey string
}

// DefaultTemplate is what a sandbox is made from where nothing is said.
const DefaultTemplate = "base"

// explained is how many nodes a refusal talks about.
const explained = 4

// Create starts a sandbox on the best node that takes it and returns it running.
//
// Errors: ErrInvalid with what was wrong, ErrNotFound for the template, ErrConflict for a template without an image,
// ErrExhausted when no node has room, ErrUnavailable when no node answers.
func (c *Control) Create(ctx context.Context, req CreateRequest) (sandbox.Sandbox, error) {
	if err := c.admit(&req); err != nil {
		return sandbox.Sandbox{}, err
	}
	template, build, err := c.resolveBuild(ctx, req.Template)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	msg, err := c.createMessage(template, build, req)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	ask, err := placement(template, build, msg)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	box, err := c.placed(ctx, &req, ask, msg)
	if err == nil {
		c.fleet.settle(ask.Key, box.NodeID)
		c.copies.used(template.ID, build.ID, msg.GetResources(), box.StartedAt)
	}
	return box, err
}

// placed asks nodes until one has made the sandbox. A request that can be repeated goes to the same node each time.
func (c *Control) placed(ctx context.Context, req *CreateRequest, ask scheduler.Request, msg *agentv1.CreateRequest) (sandbox.Sandbox, error) {
	decision := c.fleet.place(ask, time.Now())
	if req.IdempotencyKey != "" {
		pin, err := pinOf(req)
		if err != nil {
			return sandbox.Sandbox{}, err
		}
		return c.dispatchPinned(ctx, pin, decision, msg)
	}
	if len(decision.Candidates) == 0 {
		return sandbox.Sandbox{}, refusal(decision)
	}
	return c.dispatch(ctx, decision, msg)
}

// placement says what the scheduler is to look for: nodes that have what the sandbox starts from, the checkpoint or,
// without one, the image. Errors: ErrInvalid for metadata that says where to go and cannot be read.
func placement(t sandbox.Template, b sandbox.Build, msg *agentv1.CreateRequest) (scheduler.Request, error) {
	req := scheduler.Request{Resources: resourcesFromWire(msg.GetResources()), Image: b.ImageDigest, Key: string(t.ID)}
	if b.Checkpoint != "" {
		req.Image = b.ID
	}
	if b.Checkpoint == sandbox.CheckpointMemory {
		req.MadeOn = b.MadeOn
	}
	if err := templateWishes(&req, t); err != nil {
		return req, err
	}
	return req, wishes(&req, msg.GetMetadata())
}

// templateWishes fills in what a template says of its sandboxes' nodes; a create's own metadata goes before it.
func templateWishes(r *scheduler.Request, t sandbox.Template) error {
	if t.NodeSelector == "" && t.NodeAffinity == "" && t.Tolerations == "" {
		return nil
	}
	return wishes(r, map[string]string{KeyNodeSelector: t.NodeSelector, KeyNodeAffinity: t.NodeAffinity, KeyTolerations: t.Tolerations})
}

// admit fills in what is missing and refuses what cannot be.
func (c *Control) admit(req *CreateRequest) error {
	setDefault(&req.Template, DefaultTemplate)
	if req.Timeout != Never {
		if err := c.limits.checkTimeout(req.Timeout, time.Second); err != nil {
			return err
		}
	}
	if req.AutoResume && req.AutoPause && req.AutoPauseKind == sandbox.CheckpointFiles {
		return sandbox.Invalidf("a sandbox that its timeout pauses with its files alone cannot be resumed by requests: nothing runs in it that could answer them")
	}
	if len(req.IdempotencyKey) > maxNameLen {
		return sandbox.Invalidf("idempotency key of %d bytes: want at most %d", len(req.IdempotencyKey), maxNameLen)
	}
	return errors.Join(checkMetadata(req.Metadata), checkEnv(req.Env))
}

func (c *Control) createMessage(t sandbox.Template, b sandbox.Build, req CreateRequest) (*agentv1.CreateRequest, error) {
	own := orElse(b.Resources, c.limits.DefaultResources)
	want := orElse(req.Resources, own)
	if err := checkResources(want); err != nil {
		return nil, err
	}
	msg := &agentv1.CreateRequest{
		TemplateId: string(t.ID), TemplateName: nameFor(t, req.Template), ImageDigest: b.ImageDigest,
		Resources: resourcesToWire(want), Metadata: req.Metadata, Env: req.Env, Timeout: timeoutToWire(req.Timeout),
		Secure: req.Secure || b.Secure, AllowInternet: req.AllowInternet, IdempotencyKey: req.IdempotencyKey,
		CustomSize: want != own, Guest: guestToWire(b.Guest), AutoPause: req.AutoPause,
		AutoResume: req.AutoResume, IdleTimeout: req.IdleTimeout || t.IdleTimeout,
	}
	if req.AutoPause {
		kind, err := kindToWire(req.AutoPauseKind)
		if err != nil {
			return nil, fmt.Errorf("auto_pause_kind: %w", err)
		}
		msg.AutoPauseKind = kind
	}
	if b.Checkpoint != "" {
		if want != own {
			return nil, sandbox.Invalidf("template %q holds saved processes, whose size cannot change: leave the resources out",
				msg.GetTemplateName())
		}
		msg.CheckpointId = b.ID
	}
	return msg, nil
}

// refusal says why no node was found. What is too large for every node is the caller's mistake, not a lack of room.
func refusal(d scheduler.Decision) error {
	switch {
	case len(d.Verdicts) == 0:
		return sandbox.Unavailablef("no node has joined the cluster yet")
	case d.TooLarge:
		return sandbox.Invalidf("no node is large enough: %s", d.Explain(explained))
	}
	return sandbox.Exhaustedf("no node can take a sandbox now: %s", d.Explain(explained))
}

// dispatch asks the candidates in their order until one takes the sandbox. A node that is full, or does not answer, is
// passed over; any other refusal would be the same everywhere.
func (c *Control) dispatch(ctx context.Context, d scheduler.Decision, msg *agentv1.CreateRequest) (sandbox.Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	var last error
	for _, node := range d.Candidates {
		box, err := c.createWith(ctx, node, msg)
		if err == nil {
			return box, nil
		}
		last = err
		elsewhere := errors.Is(err, sandbox.ErrExhausted) || errors.Is(err, sandbox.ErrUnavailable) || errors.Is(err, errNotThere)
		if !elsewhere || ctx.Err() != nil {
			break
		}
	}
	return sandbox.Sandbox{}, fmt.Errorf("create sandbox from %s: %w", msg.GetTemplateName(), last)
}

// errNotThere means that a node has not what a sandbox is to start from, and could not get it.
var errNotThere = errors.New("the node has not got the template")

// marked is an error that also is a mark, of which users see nothing.
type marked struct{ err, mark error }

func (m marked) Error() string   { return m.err.Error() }
func (m marked) Unwrap() []error { return []error{m.err, m.mark} }

// errNotAsked means that a node was never asked, because it is not connected.
var errNotAsked = errors.New("the node was not asked")

// createWith has one node create the sandbox, and tells it from whom it can get what it lacks.
func (c *Control) createWith(ctx context.Context, node sandbox.NodeID, msg *agentv1.CreateRequest) (sandbox.Sandbox, error) {
	what := msg.GetImageDigest()
	if msg.GetCheckpointId() != "" {
		what = msg.GetCheckpointId()
	}
	if c.fleet.lacks(node, what) {
		msg = proto.CloneOf(msg)
		msg.Peers, msg.Bucket = c.fleet.peers(node, what), c.limits.Bucket
	}
	box, err := c.createAt(ctx, node, msg)
	switch {
	case err == nil && msg.Peers != nil:
		c.fleet.setImage(node, msg.GetImageDigest(), true)
		c.fleet.setImage(node, msg.GetCheckpointId(), true)
	case errors.Is(err, sandbox.ErrNotFound):
		c.fleet.setImage(node, what, false)
		err = marked{err, errNotThere}
	}
	return box, err
}

// createAt has one node create the sandbox and indexes the answer at once, so that the next request finds it.
func (c *Control) createAt(ctx context.Context, node sandbox.NodeID, msg *agentv1.CreateRequest) (sandbox.Sandbox, error) {
	agent, err := c.agent(node)
	if err != nil {
		c.fleet.outcome(node, true, time.Now())
		return sandbox.Sandbox{}, marked{err, errNotAsked}
	}
	done := c.fleet.dispatch(node, resourcesFromWire(msg.GetResources()))
	resp, err := agent.Create(ctx, msg)
	done(resp.GetLoad())
	err = fromNode(node, err)
	if ctx.Err() == nil || err == nil { // what the caller broke off says nothing about the node
		c.fleet.outcome(node, broken(err), time.Now())
	}
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	return c.learn(node, resp.GetSandbox())
}

// broken reports whether an answer speaks against the node, not against the request.
func broken(err error) bool {
	if err == nil {
		return false
	}
	for _, kind := range []error{
		sandbox.ErrExhausted, sandbox.ErrInvalid, sandbox.ErrConflict, sandbox.ErrNotFound, sandbox.ErrUnsupported, sandbox.ErrDenied,
	} {
		if errors.Is(err, kind) {
			return false
		}
	}
	return true
}

// learn indexes a node's answer and returns it.
func (c *Control) learn(node sandbox.NodeID, w *agentv1.Sandbox) (sandbox.Sandbox, error) {
	box, err := c.boxFromWire(node, w)
	if err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("read the answer of node %s: %w", node, err)
	}
	if box.Received || c.noted.outdated(&box) {
		return sandbox.Sandbox{}, sandbox.Unavailablef("sandbox %s is being moved: try again", box.ID)
	}
	c.index.apply(&entry{box: box, epoch: c.fleet.epochOf(node)}, time.Now())
	return box, nil
}
