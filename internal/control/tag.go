package control

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// AssignTags gives the build that ref means, [namespace/]alias[:tag] or id[:tag], further tags. What they meant before
// they mean no longer.
// Errors: ErrInvalid, ErrNotFound, ErrConflict for a tag whose build is not ready.
func (c *Control) AssignTags(ctx context.Context, ref string, tags []string) (sandbox.Template, sandbox.Build, error) {
	none := func(err error) (sandbox.Template, sandbox.Build, error) {
		return sandbox.Template{}, sandbox.Build{}, err
	}
	if len(tags) == 0 || len(tags) > maxTags {
		return none(sandbox.Invalidf("%d tags: want 1 to %d", len(tags), maxTags))
	}
	for _, tag := range tags {
		if err := checkTag(tag); err != nil {
			return none(err)
		}
	}
	c.catalog.forget() // what is about to change is not taken from memory
	t, b, err := c.resolveBuild(ctx, ref)
	if err != nil {
		return none(err)
	}
	t, err = c.changeTemplate(ctx, t.ID, func(t *sandbox.Template) error {
		if _, ok := t.Build(b.ID); !ok {
			return sandbox.NotFoundf("build %s was removed meanwhile", b.ID)
		}
		now := time.Now().UTC()
		for _, tag := range tags {
			setTag(t, tag, b.ID, now)
		}
		t.UpdatedAt = now
		return nil
	})
	if err != nil {
		return none(fmt.Errorf("tag template %q: %w", ref, err))
	}
	return t, b, nil
}

// RemoveTags takes tags from a template. Its builds stay, as the newest of those without a tag do.
// Errors: ErrInvalid for "default", without which the bare name means nothing; ErrNotFound for a template or tag that
// does not exist.
func (c *Control) RemoveTags(ctx context.Context, ref string, tags []string) error {
	if len(tags) == 0 || len(tags) > maxTags {
		return sandbox.Invalidf("%d tags: want 1 to %d", len(tags), maxTags)
	}
	if slices.Contains(tags, sandbox.DefaultTag) {
		return sandbox.Invalidf("the tag %q cannot be removed: give it to another build, or delete the template", sandbox.DefaultTag)
	}
	t, _, err := c.resolve(ctx, ref)
	if err != nil {
		return err
	}
	_, err = c.changeTemplate(ctx, t.ID, func(t *sandbox.Template) error {
		for _, tag := range tags {
			if _, ok := t.Tags[tag]; !ok {
				return sandbox.NotFoundf("template %q has no tag %.80q", ref, tag)
			}
		}
		maps.DeleteFunc(t.Tags, func(tag string, _ sandbox.Tag) bool { return slices.Contains(tags, tag) })
		t.UpdatedAt = time.Now().UTC()
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove tags of template %q: %w", ref, err)
	}
	return nil
}
