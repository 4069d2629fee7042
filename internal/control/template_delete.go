package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// DeleteTemplate removes a template or, where ref has a tag, what the tag means: the last tag takes the template with it.
// What only it used is removed from the nodes; running sandboxes stay, builds under way are given up.
// Errors: ErrNotFound; ErrConflict for "base", without which nothing starts by default.
func (c *Control) DeleteTemplate(ctx context.Context, ref string) error {
	c.catalog.forget() // what is about to go is not taken from memory
	t, name, err := c.resolve(ctx, ref)
	if err != nil {
		return err
	}
	if strings.Contains(ref, ":") {
		err = c.deleteTagged(ctx, t, name)
		if !errors.Is(err, errWhole) {
			return err
		}
	}
	if slices.Contains(t.Names, DefaultTemplate) {
		return sandbox.Conflictf("template %q is what sandboxes are made from by default: rebuild it instead", DefaultTemplate)
	}
	t, err = c.templates.DeleteTemplate(ctx, t.ID)
	c.catalog.forget()
	if err != nil {
		return fmt.Errorf("delete template %q: %w", ref, err)
	}
	c.noteDeleted(ctx, t, nameFor(t, string(t.ID)))
	for _, b := range t.Builds {
		if b.State == sandbox.BuildBuilding {
			c.giveUp(ctx, b.ID)
		}
	}
	c.freeBuilds(ctx, t.ID, t.Builds)
	return nil
}

// errWhole means that the whole template is to go, with its last tag.
var errWhole = errors.New("the whole template")

// deleteTagged removes one tag and, unless another tag means it too, its build. The id of a build serves as a tag.
func (c *Control) deleteTagged(ctx context.Context, t sandbox.Template, name Name) error {
	isBase := slices.Contains(t.Names, DefaultTemplate) && name.Tag == sandbox.DefaultTag
	if isBase {
		return sandbox.Conflictf("template %q is what sandboxes are made from by default: rebuild it instead", DefaultTemplate)
	}
	t, err := c.changeTemplate(ctx, t.ID, func(t *sandbox.Template) error {
		id := name.Tag
		if tag, ok := t.Tags[name.Tag]; ok {
			id = tag.BuildID
			delete(t.Tags, name.Tag)
		} else if _, ok := t.Build(id); !ok {
			return sandbox.NotFoundf("template %q does not exist: its tags are %s", name, strings.Join(sortedTags(*t), ", "))
		}
		if id == name.Tag {
			maps.DeleteFunc(t.Tags, func(_ string, tag sandbox.Tag) bool { return tag.BuildID == id })
		}
		if len(t.Tags) == 0 {
			return errWhole
		}
		if !slices.ContainsFunc(slices.Collect(maps.Values(t.Tags)), func(tag sandbox.Tag) bool { return tag.BuildID == id }) {
			t.Builds = slices.DeleteFunc(t.Builds, func(b sandbox.Build) bool { return b.ID == id })
		}
		t.UpdatedAt = time.Now().UTC()
		return nil
	})
	if err != nil {
		return err
	}
	c.noteDeleted(ctx, t, name.String())
	return nil
}

func (c *Control) noteDeleted(ctx context.Context, t sandbox.Template, what string) {
	c.note(ctx, Event{
		Type: "template_deleted", Message: fmt.Sprintf("template %s deleted", what),
		Fields: map[string]string{"template_id": string(t.ID)},
	})
}

// giveUp ends a build whose record is gone.
func (c *Control) giveUp(ctx context.Context, id string) {
	if cancel := c.builds.look(id).cancel; cancel != nil {
		cancel()
	}
	_ = c.cancelAt(ctx, id) // what is not cancelled ends by itself, and finds no record
	c.builds.end(id)
}
