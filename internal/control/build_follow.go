package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Build is what is known of a build.
type Build struct {
	ID         string
	TemplateID sandbox.TemplateID
	State      string
	Step       string
	Progress   float64
	// Entries are those of the log from the offset on that was asked for, Total is how many there are in all.
	Entries    []LogEntry
	Total      int
	Error      string
	FailedStep string
	// Result is what was made, of a build that is ready.
	Result sandbox.Build
}

func (b Build) ended() bool { return b.State == sandbox.BuildReady || b.State == sandbox.BuildFailed }

const (
	// maxFollowed is how many builds are followed at once.
	maxFollowed = 32
	followWait  = 10 * time.Second
	retryAfter  = time.Second
	// buildDeadline is how long a build may take from its announcement on.
	buildDeadline = 4 * time.Hour
)

// builds knows which node carries out which build.
type builds struct {
	// queue hands builds to Run. It is bounded: a full one refuses new builds.
	queue chan task

	mu   sync.Mutex
	node map[string]sandbox.NodeID
}

// task is a build to follow; its node is empty where it is to be searched for.
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

// GetBuild returns a build with its log from offset on. Where there is nothing new it waits up to wait. Once it says
// that the build is ready, sandboxes start from it. A build whose node has forgotten it is known by its record alone,
// without a log. Errors: ErrNotFound.
func (c *Control) GetBuild(ctx context.Context, id string, offset int32, wait time.Duration) (Build, error) {
	b, err := c.askNodes(ctx, &agentv1.GetBuildRequest{BuildId: id, Offset: offset, Wait: durationpb.New(wait)})
	if err == nil && b.ended() {
		err = c.finishBuild(ctx, b)
	}
	if !errors.Is(err, sandbox.ErrNotFound) {
		return b, err
	}
	return c.recordedBuild(ctx, id)
}

// askNodes asks the node of a build, or all of them where it is not known.
// Errors: ErrNotFound where none has it, ErrUnavailable where one that may have it does not answer.
func (c *Control) askNodes(ctx context.Context, req *agentv1.GetBuildRequest) (Build, error) {
	candidates := []sandbox.NodeID{}
	if node, ok := c.builds.at(req.GetBuildId()); ok {
		candidates = append(candidates, node)
	} else {
		for _, n := range c.fleet.list(time.Now()) {
			candidates = append(candidates, n.ID)
		}
	}
	missing := sandbox.NotFoundf("build %.80q was not found", req.GetBuildId())
	for _, node := range candidates {
		b, err := c.buildAt(ctx, node, req)
		switch {
		case err == nil:
			c.builds.set(req.GetBuildId(), node)
			return b, nil
		case errors.Is(err, sandbox.ErrUnavailable):
			missing = err
		case !errors.Is(err, sandbox.ErrNotFound):
			return Build{}, err
		}
	}
	return Build{}, missing
}

// recordedBuild is what is left of a build that no node knows.
func (c *Control) recordedBuild(ctx context.Context, id string) (Build, error) {
	t, b, err := c.findBuild(ctx, id)
	if err != nil {
		return Build{}, err
	}
	return Build{ID: id, TemplateID: t.ID, State: b.State, Error: b.Error, FailedStep: b.FailedStep, Result: b}, nil
}

// findBuild returns a build's record with its template.
func (c *Control) findBuild(ctx context.Context, id string) (sandbox.Template, sandbox.Build, error) {
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return sandbox.Template{}, sandbox.Build{}, fmt.Errorf("find build %.80q: %w", id, err)
	}
	for _, t := range all {
		if b, ok := t.Build(id); ok {
			return t, b, nil
		}
	}
	return sandbox.Template{}, sandbox.Build{}, sandbox.NotFoundf("build %.80q was not found", id)
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
	id := req.GetBuildId()
	b := Build{
		ID: id, State: sandbox.BuildBuilding, Step: w.GetStep(), Progress: w.GetProgress(),
		Entries: logFromWire(w.GetEntries()), Total: int(w.GetEntriesTotal()), Error: w.GetError(), FailedStep: w.GetFailedStep(),
	}
	switch w.GetState() {
	case agentv1.BuildState_BUILD_STATE_READY:
		b.State = sandbox.BuildReady
		b.Result = sandbox.Build{
			ID: id, ImageDigest: w.GetImageDigest(), ImageBytes: w.GetImageBytes(), Source: w.GetSource(), Guest: guestFromWire(w.GetGuest()),
		}
		if p := w.GetCheckpoint(); p != nil {
			b.Result.Checkpoint, b.Result.CheckpointBytes = checkpointKind(p.GetKind()), p.GetBytes()
		}
		c.fleet.setImage(node, w.GetImageDigest(), true)
		c.fleet.setImage(node, w.GetCheckpoint().GetId(), true)
	case agentv1.BuildState_BUILD_STATE_FAILED:
		b.State = sandbox.BuildFailed
	case agentv1.BuildState_BUILD_STATE_BUILDING, agentv1.BuildState_BUILD_STATE_UNSPECIFIED:
	}
	return b, nil
}

// errDone stops an update that somebody else has made already.
var errDone = errors.New("done already")

// finishBuild records the end of a build in its template, once.
func (c *Control) finishBuild(ctx context.Context, b Build) error {
	t, _, err := c.findBuild(ctx, b.ID)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil // a push, or the template was deleted meanwhile
	}
	if err != nil {
		return err
	}
	t, err = c.changeTemplate(ctx, t.ID, func(t *sandbox.Template) error { return recordEnd(t, b, time.Now().UTC()) })
	if errors.Is(err, errDone) || errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("record the end of build %s: %w", b.ID, err)
	}
	c.note(ctx, buildEvent(t, b))
	return nil
}

// recordEnd writes the end of a build into its record; a build that is ready gets its tags.
func recordEnd(t *sandbox.Template, end Build, now time.Time) error {
	var tags []string
	err := changeBuild(t, end.ID, func(b *sandbox.Build) error {
		if b.State == sandbox.BuildReady || b.State == sandbox.BuildFailed {
			return errDone
		}
		b.State, b.Error, b.FailedStep, b.FinishedAt = end.State, end.Error, end.FailedStep, now
		if end.State == sandbox.BuildReady {
			b.ImageDigest, b.ImageBytes, b.Source, b.Guest = end.Result.ImageDigest, end.Result.ImageBytes, end.Result.Source, end.Result.Guest
			b.Checkpoint, b.CheckpointBytes = end.Result.Checkpoint, end.Result.CheckpointBytes
			tags = b.Tags
		}
		return nil
	})
	if err != nil {
		return err
	}
	t.UpdatedAt = now
	for _, tag := range tags {
		setTag(t, tag, end.ID, now)
	}
	return nil
}

func setTag(t *sandbox.Template, tag, build string, now time.Time) {
	if t.Tags == nil {
		t.Tags = make(map[string]sandbox.Tag)
	}
	t.Tags[tag] = sandbox.Tag{BuildID: build, At: now}
}

func buildEvent(t sandbox.Template, b Build) Event {
	e := Event{Type: "template_built", Fields: map[string]string{"template_id": string(t.ID), "build_id": b.ID}}
	e.Message = fmt.Sprintf("template %s built from %s", nameFor(t, string(t.ID)), b.Result.Source)
	if b.State == sandbox.BuildFailed {
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
		for _, b := range t.Builds {
			if b.State == sandbox.BuildBuilding {
				g.Go(func() error { c.follow(ctx, task{template: t.ID, build: b.ID}); return nil })
			}
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

// errForgotten is why a build fails whose node does not know it any more.
var errForgotten = errors.New("the node was restarted while it built: build the template again")

// follow waits for the end of a build. One that no node knows, or that takes too long, has failed.
func (c *Control) follow(ctx context.Context, t task) {
	deadline := time.Now().Add(buildDeadline)
	for ctx.Err() == nil {
		b, err := c.askNodes(ctx, &agentv1.GetBuildRequest{BuildId: t.build, Offset: 1 << 30, Wait: durationpb.New(followWait)})
		if err == nil && b.ended() {
			if err = c.finishBuild(ctx, b); err == nil {
				return
			}
		}
		switch {
		case errors.Is(err, sandbox.ErrNotFound) && c.anyReady():
			c.abandonBuild(ctx, t.template, t.build, errForgotten)
			return
		case time.Now().After(deadline):
			c.abandonBuild(ctx, t.template, t.build, fmt.Errorf("the build was not done within %v", buildDeadline))
			return
		case err != nil:
			c.log.LogAttrs(ctx, slog.LevelWarn, "build not followed, trying again", slog.String("build_id", t.build), errAttr(err))
			pause(ctx, retryAfter)
		}
	}
}

// anyReady reports whether a node is there to ask.
func (c *Control) anyReady() bool {
	return slices.ContainsFunc(c.fleet.list(time.Now()), func(n Node) bool { return n.State == sandbox.NodeReady })
}

// abandonBuild records that a build failed without a node's word.
func (c *Control) abandonBuild(ctx context.Context, id sandbox.TemplateID, build string, cause error) {
	end := Build{ID: build, State: sandbox.BuildFailed, Error: cause.Error()}
	t, err := c.changeTemplate(ctx, id, func(t *sandbox.Template) error { return recordEnd(t, end, time.Now().UTC()) })
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "end of a build not recorded", slog.String("build_id", build), errAttr(err))
		return
	}
	c.note(ctx, buildEvent(t, end))
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
