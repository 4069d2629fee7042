package control

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// TemplateChange is what is to change about a template. What is nil stays as it is.
type TemplateChange struct {
	Public *bool
	// Placement is how many nodes have it before it is asked for there: on_demand, all or a number from 1 on; empty is as the
	// cluster says.
	Placement *string
	// NodeSelector, NodeAffinity and Tolerations say where its sandboxes may go, in the words of a create's metadata; empty says
	// nothing.
	NodeSelector *string
	NodeAffinity *string
	Tolerations  *string
	// IdleTimeout has the timeouts of its sandboxes count from their last use.
	IdleTimeout *bool
}

// The words of a template's placement.
const (
	placeOnDemand = "on_demand"
	placeAll      = "all"
	maxPlacement  = 10_000
)

// ChangeTemplate changes a template, all of it or nothing. Errors: ErrNotFound, ErrInvalid.
func (c *Control) ChangeTemplate(ctx context.Context, ref string, change TemplateChange) (sandbox.Template, error) {
	if change == (TemplateChange{}) {
		return sandbox.Template{}, sandbox.Invalidf("nothing is to be changed: want one of public, placement, node_selector, node_affinity, tolerations and idle_timeout")
	}
	t, _, err := c.resolve(ctx, ref)
	if err != nil {
		return sandbox.Template{}, err
	}
	t, err = c.changeTemplate(ctx, t.ID, func(t *sandbox.Template) error { return change.apply(t, time.Now().UTC()) })
	if err != nil {
		return sandbox.Template{}, fmt.Errorf("change template %q: %w", ref, err)
	}
	return t, nil
}

// SetPublic records whether a template is public. Errors: ErrInvalid, ErrNotFound.
func (c *Control) SetPublic(ctx context.Context, ref string, public bool) (sandbox.Template, error) {
	return c.ChangeTemplate(ctx, ref, TemplateChange{Public: &public})
}

func (h *TemplateChange) apply(t *sandbox.Template, now time.Time) error {
	next := *t
	if h.Placement != nil {
		n, err := ParsePlacement(*h.Placement)
		if err != nil {
			return err
		}
		next.Placement = n
	}
	take(&next.Public, h.Public)
	take(&next.NodeSelector, h.NodeSelector)
	take(&next.NodeAffinity, h.NodeAffinity)
	take(&next.Tolerations, h.Tolerations)
	take(&next.IdleTimeout, h.IdleTimeout)
	if err := templateWishes(&scheduler.Request{}, next); err != nil {
		return err
	}
	next.UpdatedAt = now
	*t = next
	return nil
}

func take[T any](at, value *T) {
	if value != nil {
		*at = *value
	}
}

// ParsePlacement reads a template's placement: how many nodes are to have it, -1 for all; nil for empty. Errors: ErrInvalid.
func ParsePlacement(text string) (*int, error) {
	n := 0
	switch text {
	case "":
		return nil, nil //nolint:nilnil // nothing is said
	case placeOnDemand:
	case placeAll:
		n = -1
	default:
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 1 || n > maxPlacement {
			return nil, sandbox.Invalidf("placement %.40q: want %s, %s, or a number of nodes from 1 to %d", text, placeOnDemand, placeAll, maxPlacement)
		}
	}
	return &n, nil
}

// PlacementText writes what ParsePlacement reads.
func PlacementText(n *int) string {
	switch {
	case n == nil:
		return ""
	case *n < 0:
		return placeAll
	case *n == 0:
		return placeOnDemand
	}
	return strconv.Itoa(*n)
}
