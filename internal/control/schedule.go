package control

import (
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// The keys of a create's metadata that say where the sandbox may go.
const (
	// KeyNodeSelector holds a selector that the node's labels must meet.
	KeyNodeSelector = sandbox.OwnLabels + "node-selector"
	// KeyNodeAffinity holds preferences: SELECTOR*WEIGHT;...
	KeyNodeAffinity = sandbox.OwnLabels + "node-affinity"
	// KeyTolerations holds the taints that the sandbox tolerates.
	KeyTolerations = sandbox.OwnLabels + "tolerations"
	// KeySticky holds what the strategy sticky keeps together; the template where it is missing.
	KeySticky = sandbox.OwnLabels + "sticky-key"
)

// wishes fills in what a create's metadata says of its node. Errors: ErrInvalid, which names the key.
func wishes(r *scheduler.Request, metadata map[string]string) error {
	if len(metadata) == 0 {
		return nil
	}
	var err error
	read := func(key string, parse func(string) error) {
		if text := metadata[key]; text != "" && err == nil {
			if err = parse(text); err != nil {
				err = fmt.Errorf("metadata %s: %w", key, err)
			}
		}
	}
	read(KeyNodeSelector, func(s string) (err error) { r.Selector, err = scheduler.ParseSelector(s); return err })
	read(KeyNodeAffinity, func(s string) (err error) { r.Preferences, err = scheduler.ParsePreferences(s); return err })
	read(KeyTolerations, func(s string) (err error) { r.Tolerations, err = scheduler.ParseTolerations(s); return err })
	if key := metadata[KeySticky]; key != "" {
		r.Key = key
	}
	return err
}

// prepare fills in what the fleet knows about a request. It requires mu.
func (f *fleet) prepare(r *scheduler.Request, now time.Time) {
	r.Random, r.Now, r.Start = f.random, now, f.next
	r.Fetch = r.Image != "" && f.fetchable(r.Image)
	if f.policy.Strategy != scheduler.Sticky || r.Key == "" {
		return
	}
	if home, ok := f.homes.get(r.Key); ok {
		r.Previous = f.at[home] + 1
	}
}

// settle remembers where the sandbox of a sticky key went.
func (f *fleet) settle(key string, node sandbox.NodeID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.policy.Strategy == scheduler.Sticky && key != "" {
		f.homes.put(key, node)
	}
}

// maxHomes bounds the sticky keys that are remembered; the one that was longest not used is forgotten, and with it only
// where its last sandbox was.
const maxHomes = 100_000

// homes remembers where the keys of the strategy sticky were last. The fleet's mutex guards it.
type homes struct {
	byKey map[string]*list.Element
	used  *list.List // of home, the latest first
}

type home struct {
	key  string
	node sandbox.NodeID
}

func newHomes() *homes { return &homes{byKey: make(map[string]*list.Element), used: list.New()} }

func (h *homes) get(key string) (sandbox.NodeID, bool) {
	e, ok := h.byKey[key]
	if !ok {
		return "", false
	}
	h.used.MoveToFront(e)
	at, ok := e.Value.(home)
	return at.node, ok
}

func (h *homes) put(key string, node sandbox.NodeID) {
	if e, ok := h.byKey[key]; ok {
		e.Value = home{key, node}
		h.used.MoveToFront(e)
		return
	}
	h.byKey[key] = h.used.PushFront(home{key, node})
	if h.used.Len() > maxHomes {
		if old, ok := h.used.Remove(h.used.Back()).(home); ok {
			delete(h.byKey, old.key)
		}
	}
}

// policies keeps a scheduling policy that was set through the API. SchedulerPolicy is ErrNotFound where there is none,
// and PutSchedulerPolicy of nil deletes it.
type policies interface {
	SchedulerPolicy(ctx context.Context) (json.RawMessage, error)
	PutSchedulerPolicy(ctx context.Context, policy json.RawMessage) error
}

type (
	// SchedulerPolicy is how nodes are chosen.
	SchedulerPolicy = scheduler.Policy
	// Strategy says what makes one node better than another.
	Strategy = scheduler.Strategy
	// Selection says how one of the best nodes is drawn.
	Selection = scheduler.Selection
	// Overcommit multiplies the parts of a capacity.
	Overcommit = scheduler.Overcommit
	// Weights says how much each part of a score counts.
	Weights = scheduler.Weights
)

// The sources of a scheduling policy.
const (
	PolicyFromSettings = "settings"
	PolicyFromAPI      = "api"
)

// SchedulerPolicy returns the policy in force and where it comes from.
func (c *Control) SchedulerPolicy() (policy scheduler.Policy, source string) {
	c.fleet.mu.Lock()
	defer c.fleet.mu.Unlock()
	if c.fleet.stored {
		source = PolicyFromAPI
	} else {
		source = PolicyFromSettings
	}
	return c.fleet.policy.WithDefaults(), source
}

// SetSchedulerPolicy puts a policy in force and stores it: it goes before the daemon's settings, also after a restart,
// until ResetSchedulerPolicy. Errors: ErrInvalid, which leaves the policy as it was.
func (c *Control) SetSchedulerPolicy(ctx context.Context, policy scheduler.Policy) error {
	if err := policy.Check(); err != nil {
		return err
	}
	text, err := json.Marshal(policy.WithDefaults())
	if err != nil {
		return fmt.Errorf("encode scheduling policy: %w", err)
	}
	if err := c.policies.PutSchedulerPolicy(ctx, text); err != nil {
		return fmt.Errorf("store scheduling policy: %w", err)
	}
	c.fleet.usePolicy(policy, true)
	c.tellPolicy(ctx, policy, PolicyFromAPI)
	return nil
}

// ResetSchedulerPolicy drops the stored policy: that of the daemon's settings is in force again.
func (c *Control) ResetSchedulerPolicy(ctx context.Context) error {
	if err := c.policies.PutSchedulerPolicy(ctx, nil); err != nil {
		return fmt.Errorf("drop scheduling policy: %w", err)
	}
	c.tellPolicy(ctx, c.fleet.dropPolicy(), PolicyFromSettings)
	return nil
}

// ReloadSchedulerPolicy takes the policy of the daemon's settings, which were read again. It reports whether it is in
// force: one that was set through the API goes before it. Errors: ErrInvalid, which leaves the policy as it was.
func (c *Control) ReloadSchedulerPolicy(ctx context.Context, policy scheduler.Policy) (inForce bool, err error) {
	if err := policy.Check(); err != nil {
		return false, err
	}
	changed, inForce := c.fleet.configure(policy)
	if changed && inForce {
		c.tellPolicy(ctx, policy, PolicyFromSettings)
	}
	return inForce, nil
}

func (c *Control) tellPolicy(ctx context.Context, policy scheduler.Policy, source string) {
	strategy := string(policy.WithDefaults().Strategy)
	c.log.LogAttrs(ctx, slog.LevelInfo, "scheduling policy changed", slog.String("strategy", strategy), slog.String("source", source))
	c.note(ctx, Event{
		Type: "scheduler_changed", Message: fmt.Sprintf("sandboxes are placed by %s, as the %s say", strategy, sourceText(source)),
		Fields: map[string]string{"strategy": strategy, "source": source},
	})
}

func sourceText(source string) string {
	if source == PolicyFromAPI {
		return "administrators"
	}
	return source
}

// loadPolicy puts a stored policy in force. One that this build cannot use is left alone, and told of.
func (c *Control) loadPolicy(ctx context.Context) error {
	text, err := c.policies.SchedulerPolicy(ctx)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the scheduling policy: %w", err)
	}
	var policy scheduler.Policy
	if err = json.Unmarshal(text, &policy); err == nil {
		err = policy.Check()
	}
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "stored scheduling policy not used", errAttr(err))
		return nil
	}
	c.fleet.usePolicy(policy, true)
	return nil
}

func (f *fleet) usePolicy(policy scheduler.Policy, stored bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.policy, f.stored = policy, stored
}

// dropPolicy goes back to the settings' policy and returns it.
func (f *fleet) dropPolicy() scheduler.Policy {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.policy, f.stored = f.configured, false
	return f.policy
}

// configure takes the settings' policy, which is in force unless one is stored.
func (f *fleet) configure(policy scheduler.Policy) (changed, inForce bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed = f.configured != policy
	f.configured = policy
	if !f.stored {
		f.policy = policy
	}
	return changed, !f.stored
}
