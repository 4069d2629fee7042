package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

// drainPoll is how often the progress of a drain is looked at.
const drainPoll = 500 * time.Millisecond

// defaultDrainTimeout is how long a drain is tried that nobody gave a time.
const defaultDrainTimeout = 10 * time.Minute

func (a *app) nodeDrain() *cobra.Command {
	var timeout time.Duration
	var d client.DrainNode
	c := &cobra.Command{
		Use: "drain NODE", Short: "Move a node's sandboxes to others, and give it no new ones",
		Long: "Give a node no new sandboxes and have those that it has, running and paused, go on elsewhere. The command shows how far that is\n" +
			"until the node is drained. Interrupted, it only stops watching: `cloister node uncordon` calls the drain off.",
		Example: "  cloister node drain node-1\n  cloister node drain node-1 --timeout 10m --force",
		Args:    exactly(1, "one node, by name or id"), ValidArgsFunction: a.complete(1, nodeNames),
		RunE: func(c *cobra.Command, args []string) error {
			if d.Force && !c.Flags().Changed("timeout") {
				timeout = 0
			}
			d.TimeoutSeconds = int64(timeout / time.Second)
			return a.drainNode(c.Context(), args[0], d)
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", defaultDrainTimeout, "how long to try; what is left then stays where it is, unless --force ends it; 0 means as long as it takes,\nand so does --force without --timeout, which ends at once what cannot be moved")
	c.Flags().IntVar(&d.MaxParallel, "max-parallel", 0, "how many sandboxes are moved at once; 0 means 4")
	c.Flags().BoolVar(&d.Force, "force", false, "end the sandboxes that cannot be moved")
	c.Flags().StringVar(&d.Reason, "reason", "", "`why`, for those who look at the node")
	return c
}

// drainNode begins a drain and watches it to its end.
func (a *app) drainNode(ctx context.Context, node string, d client.DrainNode) error {
	cn, err := a.target.connect()
	if err != nil {
		return err
	}
	n, err := cn.api.DrainNode(ctx, node, d)
	if err != nil {
		return cn.check(err)
	}
	bar := newProgress(a.err)
	defer bar.end()
	stuck := ""
	for n.Drain != nil && n.Drain.DoneAt.IsZero() {
		if n.Drain.Stuck != stuck && n.Drain.Stuck != "" {
			bar.line("nothing can be moved now: " + n.Drain.Stuck)
		}
		stuck = n.Drain.Stuck
		bar.update(drainText(n), drainFraction(n.Drain))
		select {
		case <-ctx.Done():
			bar.line(fmt.Sprintf("no longer watched; node %s is still being drained: `cloister node uncordon %s` calls that off", n.Name, n.Name))
			return ctx.Err()
		case <-time.After(drainPoll):
		}
		if n, err = cn.api.Node(ctx, n.ID); err != nil && ctx.Err() == nil {
			return cn.check(err)
		}
	}
	bar.end()
	if err := a.printNode(n); err != nil {
		return err
	}
	switch {
	case n.Drain == nil:
		return fmt.Errorf("the drain of node %s was called off", n.Name)
	case n.Drain.Error != "":
		return errors.New(n.Drain.Error)
	}
	return nil
}

func drainFraction(d *client.Drain) float64 {
	done := d.Moved + d.Ended
	return float64(done) / float64(max(1, done+d.Left))
}

// drainText says how far a drain is, in one line.
func drainText(n client.Node) string {
	d := n.Drain
	parts := []string{fmt.Sprintf("%s: %d moved, %d left", n.Name, d.Moved, d.Left)}
	if d.Ended > 0 {
		parts = append(parts, fmt.Sprintf("%d ended", d.Ended))
	}
	if len(d.Failed) > 0 {
		parts = append(parts, fmt.Sprintf("%d cannot move now, as %s: %s", len(d.Failed), d.Failed[0].ID, d.Failed[0].Reason))
	}
	return strings.Join(append(parts, d.Waiting...), "; ")
}

func (a *app) nodeRemove() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "rm NODE", Aliases: []string{"remove"}, Short: "Take a node out of the cluster for good",
		Long: "Take a node out of the cluster: its certificate is worth nothing from then on. Paused sandboxes of a node that is down are brought\n" +
			"back from their replicas first. A node that has sandboxes and answers is refused, unless --force ends them.",
		Example: "  cloister node drain node-1 && cloister node rm node-1\n  cloister node rm node-1 --force",
		Args:    exactly(1, "one node, by name or id"), ValidArgsFunction: a.complete(1, nodeNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			return cn.check(cn.api.RemoveNode(c.Context(), args[0], force))
		},
	}
	c.Flags().BoolVar(&force, "force", false, "also where it has sandboxes, which end, and paused ones without a replica, which are lost")
	return c
}
