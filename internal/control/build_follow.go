package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

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

	node sandbox.NodeID
	// checkpoint is the id of what was saved.
	checkpoint string
}

func (b Build) ended() bool { return b.State == sandbox.BuildReady || b.State == sandbox.BuildFailed }

const (
	// maxFollowed is how many builds are followed at once, those of an earlier process included.
	maxFollowed = 64
	followWait  = 10 * time.Second
	retryAfter  = time.Second
	// buildDeadline is how long a build may take from its start on, announceDeadline how long until its start.
	buildDeadline    = 4 * time.Hour
	announceDeadline = 2 * time.Hour
	sweepBuildsEvery = time.Minute
)

// BuildQuery asks for a build and a part of its log.
type BuildQuery struct {
	ID     string
	Offset int32
	// Limit is how many lines are wanted; 0 means all.
	Limit int32
	// Wait is how long to wait for something new where there is nothing.
	Wait time.Duration
}

// GetBuild returns a build with its log from the offset on. Once it says that the build is ready, sandboxes start from
// it. A build that its node has forgotten is known by its record alone, without a log. Errors: ErrNotFound.
func (c *Control) GetBuild(ctx context.Context, q BuildQuery) (Build, error) {
	known := c.builds.look(q.ID)
	if known.preparing() && int(q.Offset) >= len(known.lead) && q.Wait > 0 {
		pause(ctx, min(q.Wait, retryAfter))
		known = c.builds.look(q.ID)
	}
	entries := page(known.lead, q.Offset, q.Limit)
	if known.preparing() {
		return Build{
			ID: q.ID, State: sandbox.BuildBuilding, Step: known.step, Entries: entries, Total: len(known.lead),
		}, nil
	}
	req := &agentv1.GetBuildRequest{BuildId: q.ID, Offset: max(0, q.Offset-int32(len(known.lead)))} //nolint:gosec // a few lines
	if len(entries) == 0 {
		req.Wait = durationpb.New(q.Wait)
	}
	if q.Limit > 0 {
		req.Limit = max(1, q.Limit-int32(len(entries))) //nolint:gosec // at most the limit
	}
	b, err := c.askNodes(ctx, req)
	if err == nil {
		b.Entries = append(slices.Clip(entries), b.Entries...)
		if q.Limit > 0 {
			b.Entries = b.Entries[:min(len(b.Entries), int(q.Limit))]
		}
		b.Total += len(known.lead)
		if b.ended() {
			err = errors.Join(c.finishBuild(ctx, b), c.completeBuild(ctx, &b))
		}
		return b, err
	}
	if !errors.Is(err, sandbox.ErrNotFound) && !errors.Is(err, sandbox.ErrUnavailable) {
		return Build{}, err
	}
	record, recordErr := c.recordedBuild(ctx, q.ID)
	if recordErr == nil && !record.ended() && errors.Is(err, sandbox.ErrUnavailable) {
		return Build{}, err
	}
	record.Entries, record.Total = entries, len(known.lead)
	return record, recordErr
}

// page is the part of a log that was asked for.
func page(all []LogEntry, offset, limit int32) []LogEntry {
	all = all[min(max(0, int(offset)), len(all)):]
	if limit > 0 {
		all = all[:min(len(all), int(limit))]
	}
	return all
}

// askNodes asks the node of a build, or all of them where it is not known.
// Errors: ErrNotFound where none has it, ErrUnavailable where one that may have it does not answer.
func (c *Control) askNodes(ctx context.Context, req *agentv1.GetBuildRequest) (Build, error) {
	var candidates []sandbox.NodeID
	if node := c.builds.look(req.GetBuildId()).node; node != "" {
		candidates = []sandbox.NodeID{node}
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
		ID: id, node: node, State: sandbox.BuildBuilding, Step: w.GetStep(), Progress: w.GetProgress(),
		Entries: logFromWire(w.GetEntries()), Total: int(w.GetEntriesTotal()), Error: w.GetError(), FailedStep: w.GetFailedStep(),
	}
	switch w.GetState() {
	case agentv1.BuildState_BUILD_STATE_READY:
		b.State = sandbox.BuildReady
		b.Result = sandbox.Build{
			ID: id, ImageDigest: w.GetImageDigest(), ImageBytes: w.GetImageBytes(), Source: w.GetSource(), Guest: guestFromWire(w.GetGuest()),
			StartCommand: w.GetStartCommand(), ReadyCommand: w.GetReadyCommand(), Resources: resourcesFromWire(w.GetResources()),
		}
		if p := w.GetCheckpoint(); p != nil {
			b.Result.Checkpoint, b.Result.CheckpointBytes, b.checkpoint = checkpointKind(p.GetKind()), p.GetBytes(), p.GetId()
			b.Result.MadeOn = c.fleet.machine(node)
		}
	case agentv1.BuildState_BUILD_STATE_FAILED:
		b.State = sandbox.BuildFailed
	case agentv1.BuildState_BUILD_STATE_BUILDING, agentv1.BuildState_BUILD_STATE_UNSPECIFIED:
	}
	return b, nil
}

// completeBuild adds to a node's answer what only the record of the build says. A push has none.
func (c *Control) completeBuild(ctx context.Context, b *Build) error {
	t, record, err := c.findBuild(ctx, b.ID)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	if err == nil {
		b.TemplateID, b.State, b.Error, b.FailedStep, b.Result = t.ID, record.State, record.Error, record.FailedStep, record
	}
	return err
}

// errDone stops an update that somebody else has made already.
var errDone = errors.New("done already")

// finishBuild records the end of a build in its template, once.
func (c *Control) finishBuild(ctx context.Context, b Build) error {
	t, old, err := c.findBuild(ctx, b.ID)
	if errors.Is(err, sandbox.ErrNotFound) || err == nil && ended(old) {
		c.builds.end(b.ID)
		return nil // also: a push, or the template was deleted meanwhile
	}
	if err != nil {
		return err
	}
	if err := checkMade(&b); err != nil {
		b.State, b.Error = sandbox.BuildFailed, err.Error()
	}
	if b.State == sandbox.BuildReady { // before anybody is told to start from it
		c.fleet.setImage(b.node, b.Result.ImageDigest, true)
		c.fleet.setImage(b.node, b.checkpoint, true)
	}
	t, err = c.changeTemplate(ctx, t.ID, func(t *sandbox.Template) error { return recordEnd(t, b, time.Now().UTC()) })
	if err != nil && !errors.Is(err, errDone) && !errors.Is(err, sandbox.ErrNotFound) {
		return fmt.Errorf("record the end of build %s: %w", b.ID, err)
	}
	c.builds.end(b.ID)
	if err != nil {
		return nil //nolint:nilerr // somebody else was faster
	}
	c.note(ctx, buildEvent(t, b))
	return nil
}

func ended(b sandbox.Build) bool {
	return b.State == sandbox.BuildReady || b.State == sandbox.BuildFailed
}

// maxGuestBytes bounds the environment of a template, which is part of a record.
const maxGuestBytes = 32 << 10

// checkMade refuses what no record can hold, or no sandbox can start from.
func checkMade(b *Build) error {
	size := 0
	for k, v := range b.Result.Guest.Env {
		size += len(k) + len(v)
	}
	switch {
	case b.State != sandbox.BuildReady:
		return nil
	case size > maxGuestBytes:
		return fmt.Errorf("the template's environment has %d bytes: want at most %d", size, maxGuestBytes)
	case b.checkpoint != "" && b.checkpoint != b.ID:
		return fmt.Errorf("node %s saved it as checkpoint %q: want %q", b.node, b.checkpoint, b.ID)
	}
	return nil
}

// recordEnd writes the end of a build into its record; a build that is ready gets its tags.
func recordEnd(t *sandbox.Template, end Build, now time.Time) error {
	var tags []string
	err := changeBuild(t, end.ID, func(b *sandbox.Build) error {
		if ended(*b) {
			return errDone
		}
		b.State, b.Error, b.FailedStep, b.FinishedAt = end.State, end.Error, end.FailedStep, now
		if end.State == sandbox.BuildReady {
			b.ImageDigest, b.ImageBytes, b.Source, b.Guest = end.Result.ImageDigest, end.Result.ImageBytes, end.Result.Source, end.Result.Guest
			b.Checkpoint, b.CheckpointBytes, b.MadeOn = end.Result.Checkpoint, end.Result.CheckpointBytes, end.Result.MadeOn
			b.StartCommand = cmp.Or(end.Result.StartCommand, b.StartCommand)
			b.ReadyCommand = cmp.Or(end.Result.ReadyCommand, b.ReadyCommand)
			b.Resources = orElse(end.Result.Resources, b.Resources)
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

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
