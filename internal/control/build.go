package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// The states of a build, as in Template.BuildState.
const (
	BuildBuilding = "building"
	BuildReady    = "ready"
	BuildFailed   = "failed"
)

// Build is what is known of a build.
type Build struct {
	ID          string
	State       string
	Step        string
	Progress    float64
	Entries     []LogEntry
	Error       string
	ImageDigest string
	ImageBytes  int64
	Source      string
}

// BuildSpec is what a template is to be made from.
type BuildSpec struct {
	Name string
	// Sources are tried in order: a registry reference, oci:PATH, docker-archive:PATH, dir:PATH, or debian:SUITE.
	Sources []string
	// Resources of sandboxes from it; parts that are 0 keep the template's, or get the default.
	Resources sandbox.Resources
	// RegistryUsername and RegistryPassword are used once and never kept.
	RegistryUsername string
	RegistryPassword string
}

const (
	maxSources   = 16
	maxSourceLen = 4096
	// maxFollowed is how many builds are followed at once.
	maxFollowed = 32
	followWait  = 10 * time.Second
	retryAfter  = time.Second
)

// builds knows which node carries out which build.
type builds struct {
	// queue hands builds to Run. It is bounded: a full one refuses new builds.
	queue chan task

	mu   sync.Mutex
	node map[string]sandbox.NodeID
}

type task struct {
	template sandbox.TemplateID
	build    string
	node     sandbox.NodeID
}

func newBuilds() *builds {
	return &builds{queue: make(chan task, maxFollowed), node: make(map[string]sandbox.NodeID)}
}

func (b *builds) at(id string) (sandbox.NodeID, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, ok := b.node[id]
	return n, ok
}

func (b *builds) set(id string, node sandbox.NodeID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.node) >= maxCatalog {
		clear(b.node) // they are found again by asking the nodes
	}
	b.node[id] = node
}

// EnsureTemplate returns the template of the name if an image of it is at hand, and begins to build it otherwise. The
// answer's BuildState says which.
func (c *Control) EnsureTemplate(ctx context.Context, spec BuildSpec) (sandbox.Template, error) {
	t, err := c.resolve(ctx, spec.Name)
	if err == nil && t.ImageDigest != "" && len(c.fleet.holders(t.ImageDigest)) > 0 {
		return t, nil
	}
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Template{}, err
	}
	return c.BuildTemplate(ctx, spec)
}

// BuildTemplate makes a template, or rebuilds the one of that name, and returns it while it is being built. Until the
// build is ready, sandboxes start from the image that was there before.
// Errors: ErrInvalid, ErrExhausted when too many builds are under way, ErrUnavailable when no node can build.
func (c *Control) BuildTemplate(ctx context.Context, spec BuildSpec) (sandbox.Template, error) {
	name, err := c.checkBuild(spec)
	if err != nil {
		return sandbox.Template{}, err
	}
	t, err := c.recordTemplate(ctx, name, spec)
	if err != nil {
		return sandbox.Template{}, err
	}
	return c.startBuild(ctx, t, spec)
}

func (c *Control) checkBuild(spec BuildSpec) (Name, error) {
	name, err := ParseName(spec.Name)
	if err != nil {
		return Name{}, err
	}
	if name.Tag != defaultTag {
		return Name{}, sandbox.Unsupportedf("template name %q: tags are not supported by this version: leave out %q", spec.Name, ":"+name.Tag)
	}
	if len(spec.Sources) == 0 || len(spec.Sources) > maxSources {
		return Name{}, sandbox.Invalidf("template %q: %d sources: want 1 to %d, as in debian:bookworm", name, len(spec.Sources), maxSources)
	}
	for _, s := range spec.Sources {
		if s == "" || len(s) > maxSourceLen || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' }) {
			return Name{}, sandbox.Invalidf("template %q: source %.80q: want an image reference, oci:PATH, docker-archive:PATH, "+
				"dir:PATH or debian:SUITE", name, s)
		}
	}
	return name, checkResources(orElse(spec.Resources, c.limits.DefaultResources))
}

// recordTemplate stores what the template is to be, before any work begins.
func (c *Control) recordTemplate(ctx context.Context, name Name, spec BuildSpec) (sandbox.Template, error) {
	now := time.Now().UTC()
	change := func(t *sandbox.Template) error {
		t.Sources, t.Resources, t.UpdatedAt = spec.Sources, orElse(spec.Resources, t.Resources), now
		return nil
	}
	defer c.catalog.forget()
	old, err := c.templates.Template(ctx, name.String())
	if err == nil {
		return c.templates.UpdateTemplate(ctx, old.ID, change)
	}
	if !errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Template{}, fmt.Errorf("find template %q: %w", name, err)
	}
	t := sandbox.Template{
		ID: sandbox.NewTemplateID(), Names: []string{name.String()}, Sources: spec.Sources,
		Resources: orElse(spec.Resources, c.limits.DefaultResources), CreatedAt: now, UpdatedAt: now,
	}
	err = c.templates.CreateTemplate(ctx, t)
	if errors.Is(err, sandbox.ErrConflict) { // somebody was faster
		if old, err = c.templates.Template(ctx, name.String()); err == nil {
			return c.templates.UpdateTemplate(ctx, old.ID, change)
		}
	}
	return t, err
}

// startBuild has a node build the template's image and notes where.
func (c *Control) startBuild(ctx context.Context, t sandbox.Template, spec BuildSpec) (sandbox.Template, error) {
	decision := c.fleet.place(scheduler.Request{}, time.Now())
	if len(decision.Candidates) == 0 {
		return sandbox.Template{}, sandbox.Unavailablef("no node can build template %q: %s", spec.Name, decision.Explain(explained))
	}
	node := decision.Candidates[0]
	agent, err := c.agent(node)
	if err != nil {
		return sandbox.Template{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.Build(ctx, &agentv1.BuildRequest{
		TemplateId: string(t.ID), Sources: spec.Sources,
		RegistryUsername: spec.RegistryUsername, RegistryPassword: spec.RegistryPassword,
	})
	if err != nil {
		return sandbox.Template{}, fmt.Errorf("build template %q: %w", spec.Name, fromNode(node, err))
	}
	id := resp.GetBuildId()
	c.builds.set(id, node)
	t, err = c.templates.UpdateTemplate(ctx, t.ID, func(t *sandbox.Template) error {
		t.BuildID, t.BuildState, t.BuildError = id, BuildBuilding, ""
		return nil
	})
	c.catalog.forget()
	if err != nil {
		return sandbox.Template{}, fmt.Errorf("record build %s: %w", id, err)
	}
	select {
	case c.builds.queue <- task{template: t.ID, build: id, node: node}:
		return t, nil
	default:
		return sandbox.Template{}, sandbox.Exhaustedf("%d builds are under way: try again when one of them is done", maxFollowed)
	}
}

// GetBuild returns a build with its log from offset on. Where there is nothing new it waits up to wait. Once it says
// that the build is ready, sandboxes start from the new image. Errors: ErrNotFound.
func (c *Control) GetBuild(ctx context.Context, id string, offset int32, wait time.Duration) (Build, error) {
	candidates := []sandbox.NodeID{}
	if node, ok := c.builds.at(id); ok {
		candidates = append(candidates, node)
	} else {
		for _, n := range c.fleet.list(time.Now()) {
			candidates = append(candidates, n.ID)
		}
	}
	for _, node := range candidates {
		b, err := c.buildAt(ctx, node, &agentv1.GetBuildRequest{BuildId: id, Offset: offset, Wait: durationpb.New(wait)})
		if errors.Is(err, sandbox.ErrNotFound) || len(candidates) > 1 && errors.Is(err, sandbox.ErrUnavailable) {
			continue
		}
		if err == nil && b.State != BuildBuilding {
			err = c.finishBuild(ctx, node, b)
		}
		return b, err
	}
	return Build{}, sandbox.NotFoundf("build %.80q was not found", id)
}

func (c *Control) buildAt(ctx context.Context, node sandbox.NodeID, req *agentv1.GetBuildRequest) (Build, error) {
	agent, err := c.agent(node)
	if err != nil {
		return Build{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline+req.GetWait().AsDuration())
	defer cancel()
	w, err := agent.GetBuild(ctx, req)
	if err != nil {
		return Build{}, fromNode(node, err)
	}
	b := Build{
		ID: req.GetBuildId(), State: BuildBuilding, Step: w.GetStep(), Progress: w.GetProgress(), Entries: logFromWire(w.GetEntries()),
		Error: w.GetError(), ImageDigest: w.GetImageDigest(), ImageBytes: w.GetImageBytes(), Source: w.GetSource(),
	}
	switch w.GetState() {
	case agentv1.BuildState_BUILD_STATE_READY:
		b.State = BuildReady
	case agentv1.BuildState_BUILD_STATE_FAILED:
		b.State = BuildFailed
	case agentv1.BuildState_BUILD_STATE_BUILDING, agentv1.BuildState_BUILD_STATE_UNSPECIFIED:
	}
	return b, nil
}

// errDone stops an update that somebody else has made already.
var errDone = errors.New("done already")

// finishBuild records the end of a build in its template, once.
func (c *Control) finishBuild(ctx context.Context, node sandbox.NodeID, b Build) error {
	if b.State == BuildReady {
		c.fleet.setImage(node, b.ImageDigest, true)
	}
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return fmt.Errorf("find the template of build %s: %w", b.ID, err)
	}
	i := slices.IndexFunc(all, func(t sandbox.Template) bool { return t.BuildID == b.ID && t.BuildState == BuildBuilding })
	if i < 0 {
		return nil
	}
	t, err := c.templates.UpdateTemplate(ctx, all[i].ID, func(t *sandbox.Template) error {
		if t.BuildID != b.ID || t.BuildState != BuildBuilding {
			return errDone
		}
		t.BuildState, t.BuildError, t.UpdatedAt = b.State, b.Error, time.Now().UTC()
		if b.State == BuildReady {
			t.ImageDigest, t.ImageBytes = b.ImageDigest, b.ImageBytes
		}
		return nil
	})
	c.catalog.forget()
	if errors.Is(err, errDone) || errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record the end of build %s: %w", b.ID, err)
	}
	c.note(ctx, buildEvent(t, b, node))
	return nil
}

func buildEvent(t sandbox.Template, b Build, node sandbox.NodeID) Event {
	e := Event{NodeID: node, Type: "template_built", Fields: map[string]string{"template_id": string(t.ID), "build_id": b.ID}}
	e.Message = fmt.Sprintf("template %s built from %s", nameFor(t, string(t.ID)), b.Source)
	if b.State == BuildFailed {
		e.Type = "template_build_failed"
		e.Message = fmt.Sprintf("template %s was not built: %s", nameFor(t, string(t.ID)), b.Error)
	}
	return e
}

// runBuilds follows builds to their end, those that an earlier process began included.
func (c *Control) runBuilds(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxFollowed)
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return fmt.Errorf("find unfinished builds: %w", err)
	}
	for _, t := range all {
		if t.BuildState == BuildBuilding {
			g.Go(func() error { c.resumeBuild(ctx, t); return nil })
		}
	}
	for {
		select {
		case <-ctx.Done():
			return g.Wait()
		case next := <-c.builds.queue:
			g.Go(func() error { c.follow(ctx, next); return nil })
		}
	}
}

// follow waits for the end of a build. A node that restarted has forgotten its builds; such a build begins again.
func (c *Control) follow(ctx context.Context, t task) {
	for ctx.Err() == nil {
		b, err := c.buildAt(ctx, t.node, &agentv1.GetBuildRequest{
			BuildId: t.build, Offset: 1 << 30, Wait: durationpb.New(followWait),
		})
		if err == nil && b.State != BuildBuilding {
			err = c.finishBuild(ctx, t.node, b)
			if err == nil {
				return
			}
		}
		if errors.Is(err, sandbox.ErrNotFound) {
			c.restartBuild(ctx, t)
			return
		}
		if err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "build not followed, trying again", slog.String("build_id", t.build),
				nodeAttr(t.node), errAttr(err))
			pause(ctx, retryAfter)
		}
	}
}

func (c *Control) restartBuild(ctx context.Context, t task) {
	template, err := c.templates.Template(ctx, string(t.template))
	if err != nil || template.BuildID != t.build || template.BuildState != BuildBuilding {
		return
	}
	c.resumeBuild(ctx, template)
}

// resumeBuild begins or joins the build of a template that is recorded as being built, as soon as a node can do it.
func (c *Control) resumeBuild(ctx context.Context, t sandbox.Template) {
	for ctx.Err() == nil {
		next, err := c.startBuild(ctx, t, BuildSpec{Name: nameFor(t, string(t.ID)), Sources: t.Sources})
		switch {
		case err == nil:
			c.log.LogAttrs(ctx, slog.LevelInfo, "build resumed", slog.String("build_id", next.BuildID),
				slog.String("template_id", string(t.ID)))
			return
		case errors.Is(err, sandbox.ErrUnavailable), errors.Is(err, sandbox.ErrExhausted):
			pause(ctx, retryAfter)
		default:
			c.abandonBuild(ctx, t, err)
			return
		}
	}
}

func (c *Control) abandonBuild(ctx context.Context, t sandbox.Template, cause error) {
	_, err := c.templates.UpdateTemplate(ctx, t.ID, func(t *sandbox.Template) error {
		t.BuildState, t.BuildError = BuildFailed, cause.Error()
		return nil
	})
	c.catalog.forget()
	c.log.LogAttrs(ctx, slog.LevelWarn, "build abandoned", slog.String("template_id", string(t.ID)),
		errAttr(errors.Join(cause, err)))
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
