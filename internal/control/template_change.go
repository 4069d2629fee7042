package control

import (
	"context"
	"errors"
	"log/slog"
	"slices"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// keptBuilds is how many builds a template keeps beside those that a tag means and those under way: enough to go back to
// the one before, and to hear why the last ones failed. What only the others used is freed.
const keptBuilds = 3

// changeTemplate changes a template as the store's UpdateTemplate does, drops the builds that it need not keep, and frees
// on the nodes what only the dropped ones used.
func (c *Control) changeTemplate(
	ctx context.Context, id sandbox.TemplateID, change func(*sandbox.Template) error,
) (sandbox.Template, error) {
	var dropped []sandbox.Build
	t, err := c.templates.UpdateTemplate(ctx, id, func(t *sandbox.Template) error {
		before := slices.Clone(t.Builds)
		if err := change(t); err != nil {
			return err
		}
		dropped = trimBuilds(t, before)
		return nil
	})
	c.catalog.forget()
	if err == nil {
		c.freeBuilds(ctx, id, dropped)
	}
	return t, err
}

// trimBuilds drops the builds that a template need not keep, and returns those of before that it no longer has.
func trimBuilds(t *sandbox.Template, before []sandbox.Build) []sandbox.Build {
	tagged := make(map[string]bool, len(t.Tags))
	for _, tag := range t.Tags {
		tagged[tag.BuildID] = true
	}
	others := 0
	t.Builds = slices.DeleteFunc(t.Builds, func(b sandbox.Build) bool {
		if tagged[b.ID] || b.State == sandbox.BuildWaiting || b.State == sandbox.BuildBuilding {
			return false
		}
		others++
		return others > keptBuilds
	})
	return slices.DeleteFunc(before, func(b sandbox.Build) bool {
		_, kept := t.Build(b.ID)
		return kept
	})
}

// freeBuilds removes from the nodes what only these builds, which are in no record any more, used. What it misses, the
// node drops by itself: a node keeps nothing that no template and no sandbox uses.
func (c *Control) freeBuilds(ctx context.Context, id sandbox.TemplateID, builds []sandbox.Build) {
	if !slices.ContainsFunc(builds, func(b sandbox.Build) bool { return b.ImageDigest != "" || b.Checkpoint != "" }) {
		return
	}
	all, err := c.templates.Templates(ctx)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "builds not freed", slog.String("template_id", string(id)), errAttr(err))
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	var freed []string
	for _, b := range builds {
		if b.Checkpoint != "" {
			c.freeCheckpoint(ctx, b.ID)
		}
		if b.ImageDigest == "" || slices.Contains(freed, b.ImageDigest) || usesImage(all, b.ImageDigest) {
			continue
		}
		freed = append(freed, b.ImageDigest)
		c.freeImage(ctx, id, b.ImageDigest)
	}
}

func usesImage(all []sandbox.Template, digest string) bool {
	return slices.ContainsFunc(all, func(t sandbox.Template) bool {
		return slices.ContainsFunc(t.Builds, func(b sandbox.Build) bool { return b.ImageDigest == digest })
	})
}

func (c *Control) freeImage(ctx context.Context, id sandbox.TemplateID, digest string) {
	for _, node := range c.fleet.holders(digest) {
		agent, err := c.agent(node)
		if err != nil {
			continue
		}
		_, err = agent.RemoveTemplate(ctx, &agentv1.RemoveTemplateRequest{TemplateId: string(id), ImageDigest: digest})
		if err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "template image not removed", nodeAttr(node), errAttr(err))
			continue
		}
		c.fleet.setImage(node, digest, false)
	}
}

// freeCheckpoint has every node that may hold a checkpoint remove it.
func (c *Control) freeCheckpoint(ctx context.Context, build string) {
	for _, node := range c.fleet.holders(build) {
		agent, err := c.agent(node)
		if err != nil {
			continue
		}
		_, err = agent.RemoveCheckpoint(ctx, &agentv1.RemoveCheckpointRequest{CheckpointId: build})
		if err = fromNode(node, err); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			c.log.LogAttrs(ctx, slog.LevelWarn, "checkpoint not removed", nodeAttr(node), slog.String("build_id", build), errAttr(err))
			continue
		}
		c.fleet.setImage(node, build, false)
	}
}
