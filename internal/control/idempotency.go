package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// pinnedFor is how long a request that names a key can be repeated.
const pinnedFor = time.Hour

// pinOf names a request that can be repeated: by its key, and by what it asks for.
func pinOf(req *CreateRequest) (sandbox.Pin, error) {
	asked := *req
	asked.IdempotencyKey = ""
	text, err := json.Marshal(asked)
	if err != nil {
		return sandbox.Pin{}, fmt.Errorf("encode request: %w", err)
	}
	return sandbox.Pin{Key: digest([]byte(req.IdempotencyKey)), Request: digest(text)}, nil
}

func digest(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// dispatchPinned asks one node after the other, and notes before each which one it is: a repeated request goes to the node
// that may have carried out the first. Only a clear refusal lets it go on to the next.
// Errors: ErrConflict for a key that was used with another request, or whose node is down.
func (c *Control) dispatchPinned(ctx context.Context, pin sandbox.Pin, d scheduler.Decision, msg *agentv1.CreateRequest) (sandbox.Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	candidates := d.Candidates
	pin.Node = "none" // no node has this id: it is replaced before the first one is asked
	if len(candidates) > 0 {
		pin.Node = candidates[0]
	}
	kept, was, err := c.pins.Pin(ctx, pin, pinnedFor)
	if err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("note the idempotency key: %w", err)
	}
	if kept.Request != pin.Request {
		return sandbox.Sandbox{}, sandbox.Conflictf("the idempotency key was used with another request: use a new key for each request")
	}
	if was {
		if candidates, err = c.repeatAt(kept.Node, candidates); err != nil {
			return sandbox.Sandbox{}, err
		}
	}
	if len(candidates) == 0 {
		return sandbox.Sandbox{}, errors.Join(refusal(d), c.pins.Unpin(ctx, pin.Key))
	}
	box, err := c.createPinned(ctx, pinned{pin: kept, repeated: was}, candidates, msg)
	if err == nil {
		return box, nil
	}
	if ctx.Err() == nil && !errors.Is(err, sandbox.ErrUnavailable) { // nothing was made: the key may be used again
		if err := c.pins.Unpin(ctx, kept.Key); err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "idempotency key not freed", errAttr(err))
		}
	}
	return sandbox.Sandbox{}, fmt.Errorf("create sandbox from %s: %w", msg.GetTemplateName(), err)
}

// pinned is a request with an idempotency key.
type pinned struct {
	pin sandbox.Pin
	// repeated means that an earlier request with the key may have reached the pin's node.
	repeated bool
}

// createPinned asks the candidates in their order, each after the pin says so.
func (c *Control) createPinned(ctx context.Context, p pinned, candidates []sandbox.NodeID, msg *agentv1.CreateRequest) (sandbox.Sandbox, error) {
	first := p.pin.Node
	var last error
	for _, node := range candidates {
		if node != p.pin.Node {
			if err := c.pins.MovePin(ctx, p.pin, node); err != nil {
				return sandbox.Sandbox{}, fmt.Errorf("note the idempotency key: %w: %w", sandbox.ErrUnavailable, err)
			}
			p.pin.Node = node
		}
		box, err := c.createWith(ctx, node, msg)
		if err == nil {
			return box, nil
		}
		last = err
		unclear := p.repeated && node == first && errors.Is(err, errNotAsked) // an earlier request may have reached it
		if !declined(err) || unclear || ctx.Err() != nil {
			break
		}
	}
	return sandbox.Sandbox{}, last
}

// declined reports whether a node made nothing and another may.
func declined(err error) bool {
	return errors.Is(err, sandbox.ErrExhausted) || errors.Is(err, errNotThere) || errors.Is(err, errNotAsked)
}

// repeatAt returns whom to ask where a node was asked before: that one first, as long as it is in the cluster; whatever it made is gone
// with it. Errors: ErrConflict where it is down.
func (c *Control) repeatAt(node sandbox.NodeID, candidates []sandbox.NodeID) ([]sandbox.NodeID, error) {
	switch {
	case !c.fleet.has(node):
		return candidates, nil
	case c.fleet.isGivenUp(node, time.Now()):
		return nil, c.unknowable(node)
	}
	others := slices.DeleteFunc(slices.Clone(candidates), func(n sandbox.NodeID) bool { return n == node })
	return append([]sandbox.NodeID{node}, others...), nil
}

// unknowable says what is known of a request whose node is down: that it was sent there. Only the node knows whether it was carried
// out.
func (c *Control) unknowable(node sandbox.NodeID) error {
	name := c.fleet.nameOf(node)
	return sandbox.Conflictf("an earlier request with this idempotency key was sent to node %s, which is down: whether it made a sandbox is known when that "+
		"answers; repeat the request then, or after `cloister node rm %s`, or use a new key", name, name)
}

// isGivenUp reports whether a node is down for longer than its grace.
func (f *fleet) isGivenUp(id sandbox.NodeID, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.members[id]
	return m != nil && f.givenUp(m, now)
}
