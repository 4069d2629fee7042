package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// BuildSpec says which template is to be built, and from what.
type BuildSpec struct {
	// Name is [namespace/]alias[:tag], Tags are further tags that the build gets when it is ready.
	Name string
	Tags []string
	// Resources of sandboxes from it; parts that are 0 keep the template's, or get the default.
	Resources sandbox.Resources
	Recipe
}

// Recipe is what a template is built from: either Sources or FromTemplate, and steps on top.
type Recipe struct {
	// Sources are tried in order: a registry reference, oci:PATH, docker-archive:PATH, dir:PATH, or debian:SUITE.
	Sources []string
	// FromTemplate is a name or id with or without a tag.
	FromTemplate string
	// RegistryUsername and RegistryPassword are used once and never kept.
	RegistryUsername string
	RegistryPassword string
	Steps            []recipe.Step
	StartCommand     string
	ReadyCommand     string
	// Force uses nothing from the step cache.
	Force bool
	// Substitute names a template to start from where the sources cannot be had; the log says so then.
	Substitute string
}

// EnsureTemplate returns the template of the name and its build if an image of it is at hand, and begins to build it
// otherwise; the build's state says which.
func (c *Control) EnsureTemplate(ctx context.Context, spec BuildSpec) (sandbox.Template, sandbox.Build, error) {
	t, b, err := c.resolveBuild(ctx, spec.Name)
	if err == nil && len(c.fleet.holders(b.ImageDigest)) > 0 {
		return t, b, nil
	}
	if errors.Is(err, sandbox.ErrInvalid) || ctx.Err() != nil {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	return c.BuildTemplate(ctx, spec)
}

// BuildTemplate makes a template, or rebuilds the one of that name, and returns it while it is being built. Until the
// build is ready, its tags mean what they did before.
// Errors: ErrInvalid, ErrNotFound for the template to start from, ErrExhausted when too many builds are under way,
// ErrUnavailable when no node can build.
func (c *Control) BuildTemplate(ctx context.Context, spec BuildSpec) (sandbox.Template, sandbox.Build, error) {
	if err := checkRecipe(spec.Recipe); err != nil {
		return sandbox.Template{}, sandbox.Build{}, fmt.Errorf("template %q: %w", spec.Name, err)
	}
	t, b, err := c.AnnounceBuild(ctx, spec)
	if err != nil {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	return c.StartBuild(ctx, string(t.ID), b.ID, spec.Recipe)
}

// AnnounceBuild records that a build of a template will be asked for, and makes the template where there is none of the
// name. Only the spec's name, tags and resources count.
// Errors: ErrInvalid, and ErrConflict for the name of a snapshot.
func (c *Control) AnnounceBuild(ctx context.Context, spec BuildSpec) (sandbox.Template, sandbox.Build, error) {
	name, tags, err := checkAnnounced(spec, c.limits.DefaultResources)
	if err != nil {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	if err := c.checkSize(spec.Resources); err != nil {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	b := sandbox.Build{
		ID: newBuildID(), State: sandbox.BuildWaiting, Tags: tags, CreatedAt: time.Now().UTC(), Resources: spec.Resources,
	}
	for {
		t, err := c.announce(ctx, name, b)
		if err == nil {
			b, _ = t.Build(b.ID)
			return t, b, nil
		}
		if !errors.Is(err, errFaster) {
			return sandbox.Template{}, sandbox.Build{}, err
		}
	}
}

// checkSize refuses what no sandbox can ever be started with here. The default is not asked about: it is to be had also
// where the machine is smaller, so that the server gets to say so.
func (c *Control) checkSize(asked sandbox.Resources) error {
	size := orElse(asked, c.limits.DefaultResources)
	if size == c.limits.DefaultResources {
		return nil
	}
	if d := c.fleet.place(scheduler.Request{Resources: size}, time.Now()); d.TooLarge {
		return refusal(d)
	}
	return nil
}

// errFaster means that somebody else took a name between a look at it and its use.
var errFaster = errors.New("somebody else was faster")

func (c *Control) announce(ctx context.Context, name Name, b sandbox.Build) (sandbox.Template, error) {
	old, err := c.templates.Template(ctx, name.Key())
	if err == nil {
		return c.announceIn(ctx, old, name, b)
	}
	if !errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Template{}, fmt.Errorf("find template %q: %w", name, err)
	}
	b.Resources = orElse(b.Resources, c.limits.DefaultResources)
	t := sandbox.Template{
		ID: sandbox.NewTemplateID(), Kind: sandbox.TemplateBuilt, Names: []string{name.Key()}, Builds: []sandbox.Build{b},
		CreatedAt: b.CreatedAt, UpdatedAt: b.CreatedAt,
	}
	defer c.catalog.forget()
	if err := c.templates.CreateTemplate(ctx, t); errors.Is(err, sandbox.ErrConflict) {
		return sandbox.Template{}, errFaster
	} else if err != nil {
		return sandbox.Template{}, fmt.Errorf("record template %q: %w", name, err)
	}
	return t, nil
}

func (c *Control) announceIn(ctx context.Context, t sandbox.Template, name Name, b sandbox.Build) (sandbox.Template, error) {
	if t.Kind == sandbox.TemplateSnapshot {
		return sandbox.Template{}, sandbox.Conflictf("template name %q belongs to a snapshot: choose another name, or delete that snapshot", name)
	}
	t, err := c.changeTemplate(ctx, t.ID, func(t *sandbox.Template) error {
		if newest, ok := t.Newest(); ok {
			b.Resources = orElse(b.Resources, newest.Resources)
		}
		b.Resources = orElse(b.Resources, c.limits.DefaultResources)
		t.Builds = slices.Insert(t.Builds, 0, b)
		t.UpdatedAt = b.CreatedAt
		return nil
	})
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Template{}, errFaster
	}
	return t, err
}

// StartBuild carries out a build that was announced, and returns it as it is then.
// Errors: ErrInvalid, ErrNotFound, ErrConflict for one that was started before, ErrExhausted when too many builds are
// under way, ErrUnavailable when no node can build.
func (c *Control) StartBuild(ctx context.Context, ref, id string, r Recipe) (sandbox.Template, sandbox.Build, error) {
	none := func(err error) (sandbox.Template, sandbox.Build, error) {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	if err := checkRecipe(r); err != nil {
		return none(err)
	}
	t, _, err := c.resolve(ctx, ref)
	if err != nil {
		return none(err)
	}
	next, err := c.plan(ctx, t, id, r)
	if err != nil {
		return none(err)
	}
	if err := c.builds.begin(id); err != nil {
		next.release()
		return none(err)
	}
	t, b, err := c.markStarted(ctx, t.ID, next.message)
	if err != nil {
		c.builds.end(id)
		next.release()
		return none(err)
	}
	next.message.Resources = resourcesToWire(b.Resources)
	next.message.DefaultResources = b.Resources == c.limits.DefaultResources
	if err := c.launch(ctx, next); err != nil {
		next.release()
		err = fmt.Errorf("build template %q: %w", nameFor(t, string(t.ID)), err)
		c.abandonBuild(ctx, t.ID, id, err)
		return none(err)
	}
	return t, b, nil
}

// plan says what is to be done for a build, and holds the files that it needs.
func (c *Control) plan(ctx context.Context, t sandbox.Template, id string, r Recipe) (task, error) {
	next := task{template: t.ID, build: id, message: r.message(t.ID, id), files: filesOf(r.Steps)}
	if r.FromTemplate != "" {
		from, base, err := c.resolveBuild(ctx, r.FromTemplate)
		if err != nil {
			return task{}, err
		}
		if from.Kind == sandbox.TemplateSnapshot {
			return task{}, sandbox.Unsupportedf("template %q is a snapshot: want one that was built to build from", r.FromTemplate)
		}
		next.message.BaseImageDigest, next.message.BaseGuest = base.ImageDigest, guestToWire(base.Guest)
		if r.StartCommand == "" {
			next.message.StartCommand = base.StartCommand
			next.message.ReadyCommand = cmp.Or(r.ReadyCommand, base.ReadyCommand)
		}
	}
	if r.Substitute != "" {
		if _, b, err := c.resolveBuild(ctx, r.Substitute); err == nil && b.ID != id {
			next.substitute = &b
		}
	}
	release, err := c.pinFiles(next.files)
	next.release = release
	return next, err
}

func (r Recipe) message(t sandbox.TemplateID, id string) *agentv1.BuildRequest {
	msg := &agentv1.BuildRequest{
		TemplateId: string(t), BuildId: id, Sources: r.Sources,
		RegistryUsername: r.RegistryUsername, RegistryPassword: r.RegistryPassword,
		StartCommand: r.StartCommand, ReadyCommand: r.ReadyCommand, Force: r.Force,
	}
	for _, s := range r.Steps {
		msg.Steps = append(msg.Steps, &agentv1.BuildStep{Type: s.Type, Args: s.Args, FilesHash: s.FilesHash, Force: s.Force})
	}
	return msg
}

// markStarted records that a build that was announced is under way.
func (c *Control) markStarted(ctx context.Context, id sandbox.TemplateID, msg *agentv1.BuildRequest) (sandbox.Template, sandbox.Build, error) {
	t, err := c.changeTemplate(ctx, id, func(t *sandbox.Template) error {
		return changeBuild(t, msg.GetBuildId(), func(b *sandbox.Build) error {
			if b.State != sandbox.BuildWaiting {
				return sandbox.Conflictf("build %s is %s: announce another one", b.ID, b.State)
			}
			b.State, b.Sources = sandbox.BuildBuilding, msg.GetSources()
			b.StartCommand, b.ReadyCommand = msg.GetStartCommand(), msg.GetReadyCommand()
			return nil
		})
	})
	b, _ := t.Build(msg.GetBuildId())
	return t, b, err
}

// changeBuild changes one build of a template. Errors: ErrNotFound, and change's own.
func changeBuild(t *sandbox.Template, id string, change func(*sandbox.Build) error) error {
	i := slices.IndexFunc(t.Builds, func(b sandbox.Build) bool { return b.ID == id })
	if i < 0 {
		return sandbox.NotFoundf("build %.80q of template %s does not exist", id, t.ID)
	}
	return change(&t.Builds[i])
}

// launch begins a build at once where nothing comes before it, so that a refusal is the caller's answer, and leaves it
// to Run otherwise.
func (c *Control) launch(ctx context.Context, t task) error {
	if len(t.files) == 0 && t.substitute == nil {
		node, err := c.builder(t.message)
		if err != nil {
			return err
		}
		if err := c.send(ctx, node, t.message); err != nil {
			return err
		}
		t.message = nil
	}
	select {
	case c.builds.queue <- t:
		return nil
	default: // as long as there may be builds under way
		return sandbox.Exhaustedf("too many builds are under way: try again when one of them is done")
	}
}

func guestToWire(g sandbox.GuestSettings) *agentv1.GuestSettings {
	return &agentv1.GuestSettings{Env: g.Env, User: g.User, Workdir: g.WorkDir}
}

func guestFromWire(w *agentv1.GuestSettings) sandbox.GuestSettings {
	return sandbox.GuestSettings{Env: maps.Clone(w.GetEnv()), User: w.GetUser(), WorkDir: w.GetWorkdir()}
}

// checkpointKind is the word for what a checkpoint of a node keeps.
func checkpointKind(w agentv1.CheckpointKind) sandbox.CheckpointKind {
	return cmp.Or(map[agentv1.CheckpointKind]sandbox.CheckpointKind{
		agentv1.CheckpointKind_CHECKPOINT_KIND_FILES: sandbox.CheckpointFiles,
	}[w], sandbox.CheckpointMemory)
}
