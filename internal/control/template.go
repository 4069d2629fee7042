package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

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

// resolve finds the template of a name or id, whatever its tag. Errors: ErrInvalid for a name that can be none,
// ErrNotFound.
func (c *Control) resolve(ctx context.Context, ref string) (sandbox.Template, Name, error) {
	name, err := ParseName(ref)
	if err != nil {
		return sandbox.Template{}, Name{}, err
	}
	now := time.Now()
	t, changes, ok := c.catalog.get(name.Key(), now)
	if ok {
		return t, name, nil
	}
	t, err = c.templates.Template(ctx, name.Key())
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Template{}, Name{}, sandbox.NotFoundf("template %q does not exist", name)
	}
	if err != nil {
		return sandbox.Template{}, Name{}, fmt.Errorf("find template %q: %w", name, err)
	}
	c.catalog.put(name.Key(), t, changes, now)
	return t, name, nil
}

// resolveBuild finds what [namespace/]alias[:tag] or id[:tag] means to a sandbox that starts now; the id of a build
// serves as a tag of it. The build is ready.
// Errors: ErrInvalid, ErrNotFound for the template or its tag, ErrUnavailable for one whose first build is under way,
// ErrConflict for one that was never built.
func (c *Control) resolveBuild(ctx context.Context, ref string) (sandbox.Template, sandbox.Build, error) {
	t, name, err := c.resolve(ctx, ref)
	if err != nil {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	b, ok := t.Tagged(name.Tag)
	if !ok {
		b, ok = t.Build(name.Tag)
	}
	if !ok || b.State != sandbox.BuildReady {
		return sandbox.Template{}, sandbox.Build{}, notBuilt(t, name)
	}
	return t, b, nil
}

// nameFor is the name by which a template was asked for; asked for by id, it is its main name.
func nameFor(t sandbox.Template, ref string) string {
	name, err := ParseName(ref)
	if err != nil {
		return ref
	}
	if name.Key() == string(t.ID) && len(t.Names) > 0 {
		main, err := ParseName(t.Names[0])
		if err == nil {
			main.Tag = name.Tag
			return main.String()
		}
	}
	return name.String()
}

// notBuilt says why there is nothing to start behind a tag.
func notBuilt(t sandbox.Template, name Name) error {
	newest, any := t.Newest()
	for _, b := range t.Builds {
		if slices.Contains(b.Tags, name.Tag) {
			newest = b
			break
		}
	}
	switch {
	case any && slices.Contains(newest.Tags, name.Tag) && newest.State == sandbox.BuildFailed:
		return sandbox.Conflictf("template %q has no image, because its build failed: %s", name, newest.Error)
	case any && slices.Contains(newest.Tags, name.Tag) && newest.State != sandbox.BuildReady:
		return sandbox.Unavailablef("template %q is being built: try again when build %s is ready", name, newest.ID)
	case len(t.Tags) > 0:
		return sandbox.NotFoundf("template %q does not exist: its tags are %s", name, strings.Join(sortedTags(t), ", "))
	}
	return sandbox.Conflictf("template %q has no image: build it first", name)
}

// maxNamedTags bounds the tags that an error names.
const maxNamedTags = 8

func sortedTags(t sandbox.Template) []string {
	tags := slices.Sorted(maps.Keys(t.Tags))
	if len(tags) > maxNamedTags {
		tags = append(tags[:maxNamedTags], "...")
	}
	return tags
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
	t, _, err := c.resolve(ctx, ref)
	return t, err
}
