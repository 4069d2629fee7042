package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// runBuilds carries builds to their end, those that an earlier process began included, and ends those that were
// announced and never started.
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
	tick := time.NewTicker(sweepBuildsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return g.Wait()
		case next := <-c.builds.queue:
			g.Go(func() error { c.carryOut(ctx, next); return nil })
		case now := <-tick.C:
			c.sweepAnnounced(ctx, now)
		}
	}
}

// sweepAnnounced ends builds that nobody started in time.
func (c *Control) sweepAnnounced(ctx context.Context, now time.Time) {
	all, err := c.templates.Templates(ctx)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "announced builds not looked at", errAttr(err))
		return
	}
	for _, t := range all {
		for _, b := range t.Builds {
			if b.State == sandbox.BuildWaiting && now.Sub(b.CreatedAt) > announceDeadline {
				c.abandonBuild(ctx, t.ID, b.ID, fmt.Errorf("it was not started within %v of its announcement", announceDeadline))
			}
		}
	}
}

// carryOut sends a build to its node, where that is still to be done, and follows it to its end.
func (c *Control) carryOut(ctx context.Context, t task) {
	defer c.builds.end(t.build)
	if t.release != nil {
		defer t.release()
	}
	if t.message != nil {
		if err := c.prepare(ctx, t); err != nil {
			if ctx.Err() != nil {
				return // the next process finds that no node knows it
			}
			c.abandonBuild(ctx, t.template, t.build, err)
			return
		}
	}
	c.follow(ctx, t)
}

// errForgotten is why a build fails whose node does not know it any more.
var errForgotten = errors.New("the node or the server was restarted while it was built: build the template again")

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
			_ = c.cancelAt(ctx, t.build) // it has failed in any case
			c.abandonBuild(ctx, t.template, t.build, fmt.Errorf("it was not done within %v", buildDeadline))
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
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	c.builds.end(build)
	end := Build{ID: build, State: sandbox.BuildFailed, Error: cause.Error()}
	t, err := c.changeTemplate(ctx, id, func(t *sandbox.Template) error { return recordEnd(t, end, time.Now().UTC()) })
	switch {
	case errors.Is(err, errDone), errors.Is(err, sandbox.ErrNotFound): // also: a push, which has no record
	case err != nil:
		c.log.LogAttrs(ctx, slog.LevelWarn, "end of a build not recorded", slog.String("build_id", build), errAttr(err))
	default:
		c.note(ctx, buildEvent(t, end))
	}
}

var errCancelled = errors.New("it was cancelled")

// CancelBuild ends a build or a push that is under way, or one that was announced.
// Errors: ErrNotFound, ErrConflict for one that has ended.
func (c *Control) CancelBuild(ctx context.Context, id string) error {
	t, b, err := c.findBuild(ctx, id)
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	recorded := err == nil
	if recorded && ended(b) {
		return sandbox.Conflictf("build %s has ended: it is %s", id, b.State)
	}
	known := c.builds.look(id)
	if known.cancel != nil {
		known.cancel()
	}
	if known.node != "" || !recorded || b.State == sandbox.BuildBuilding && !known.active {
		if err := c.cancelAt(ctx, id); err == nil || !recorded || !errors.Is(err, sandbox.ErrNotFound) {
			return err
		}
	}
	if recorded {
		c.abandonBuild(ctx, t.ID, id, errCancelled)
	}
	return nil
}

// cancelAt has the node of a build end it.
func (c *Control) cancelAt(ctx context.Context, id string) error {
	b, err := c.askNodes(ctx, &agentv1.GetBuildRequest{BuildId: id, Offset: 1 << 30})
	if err != nil {
		return err
	}
	agent, err := c.agent(b.node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	_, err = agent.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: id})
	return fromNode(b.node, err)
}
