package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// catalog remembers templates for a moment, so that creates in a row do not each read the store. A change by this
// server counts at once, one by another server after freshFor.
type catalog struct {
	mu    sync.Mutex
	known map[string]known
	// changes counts what was forgotten, so that a read that began before a change is not remembered after it.
	changes uint64
}

type known struct {
	template sandbox.Template
	at       time.Time
}

const (
	freshFor   = time.Second
	maxCatalog = 1024
)

func newCatalog() *catalog { return &catalog{known: make(map[string]known)} }

func (g *catalog) get(name string, now time.Time) (t sandbox.Template, changes uint64, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	k, ok := g.known[name]
	return k.template, g.changes, ok && now.Sub(k.at) < freshFor
}

func (g *catalog) put(name string, t sandbox.Template, changes uint64, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if changes != g.changes {
		return
	}
	if len(g.known) >= maxCatalog {
		clear(g.known)
	}
	g.known[name] = known{template: t, at: now}
}

// forget is called after each change of a template.
func (g *catalog) forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.known)
	g.changes++
}

// resolve finds a template by name or id. Errors: ErrInvalid for a name that can be none, ErrNotFound.
func (c *Control) resolve(ctx context.Context, ref string) (sandbox.Template, error) {
	now := time.Now()
	t, changes, ok := c.catalog.get(ref, now)
	if ok {
		return t, nil
	}
	name, err := ParseName(ref)
	if err != nil {
		return sandbox.Template{}, err
	}
	t, err = c.templates.Template(ctx, name.String())
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Template{}, sandbox.NotFoundf("template %q does not exist", name)
	}
	if err != nil {
		return sandbox.Template{}, fmt.Errorf("find template %q: %w", name, err)
	}
	c.catalog.put(ref, t, changes, now)
	return t, nil
}

// nameFor is the name by which a template was asked for; asked for by id, it is its main name.
func nameFor(t sandbox.Template, ref string) string {
	if ref == string(t.ID) {
		if len(t.Names) > 0 {
			return t.Names[0]
		}
		return ref
	}
	name, err := ParseName(ref)
	if err != nil {
		return ref
	}
	return name.String()
}

func notBuilt(t sandbox.Template) error {
	name := nameFor(t, string(t.ID))
	switch t.BuildState {
	case BuildBuilding:
		return sandbox.Unavailablef("template %q is being built: try again when build %s is ready", name, t.BuildID)
	case BuildFailed:
		return sandbox.Conflictf("template %q has no image, because its build failed: %s", name, t.BuildError)
	}
	return sandbox.Conflictf("template %q has no image: build it first", name)
}

// ListTemplates returns all templates, the oldest first.
func (c *Control) ListTemplates(ctx context.Context) ([]sandbox.Template, error) {
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	slices.SortStableFunc(all, func(a, b sandbox.Template) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return all, nil
}

// GetTemplate returns a template by name or id. Errors: ErrInvalid, ErrNotFound.
func (c *Control) GetTemplate(ctx context.Context, ref string) (sandbox.Template, error) {
	return c.resolve(ctx, ref)
}

// DeleteTemplate removes a template and, where no other template shares it, its image from the nodes. Running sandboxes
// stay. Errors: ErrNotFound; ErrConflict for "base", without which nothing starts by default.
func (c *Control) DeleteTemplate(ctx context.Context, ref string) error {
	t, err := c.resolve(ctx, ref)
	if err != nil {
		return err
	}
	if slices.Contains(t.Names, DefaultTemplate) {
		return sandbox.Conflictf("template %q is what sandboxes are made from by default: rebuild it instead", DefaultTemplate)
	}
	if err := c.templates.DeleteTemplate(ctx, t.ID); err != nil {
		return fmt.Errorf("delete template %q: %w", ref, err)
	}
	c.catalog.forget()
	c.note(ctx, Event{
		Type: "template_deleted", Message: fmt.Sprintf("template %s deleted", nameFor(t, string(t.ID))),
		Fields: map[string]string{"template_id": string(t.ID)},
	})
	c.removeImage(ctx, t)
	return nil
}

// removeImage frees a template's image on the nodes that are ready. What it misses, the node drops by itself: a node
// keeps no image that no template and no sandbox uses.
func (c *Control) removeImage(ctx context.Context, t sandbox.Template) {
	others, err := c.templates.Templates(ctx)
	if err != nil || slices.ContainsFunc(others, func(o sandbox.Template) bool { return o.ImageDigest == t.ImageDigest }) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	for _, node := range c.fleet.holders(t.ImageDigest) {
		agent, err := c.agent(node)
		if err != nil {
			continue
		}
		_, err = agent.RemoveTemplate(ctx, &agentv1.RemoveTemplateRequest{TemplateId: string(t.ID), ImageDigest: t.ImageDigest})
		if err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "template image not removed", nodeAttr(node), errAttr(err))
			continue
		}
		c.fleet.setImage(node, t.ImageDigest, false)
	}
}
