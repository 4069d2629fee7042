package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// settleEvery is how often copies that do not count are looked at.
	settleEvery = time.Second
	// settleAfter is how long a sandbox is left on its way that nobody here moves: an earlier server's commands may still be
	// carried out.
	settleAfter = 5 * time.Second
	// maxSettling bounds the sandboxes that are settled at once.
	maxSettling = 8
)

// runSettle brings to an end what moves, losses and kills have left: copies that do not count, sandboxes on their way that
// nobody moves, and kills that nodes were away for.
func (c *Control) runSettle(ctx context.Context) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-c.strays.wake:
		}
		c.settleAll(ctx, time.Now())
	}
}

func (c *Control) settleAll(ctx context.Context, now time.Time) {
	var g errgroup.Group
	g.SetLimit(maxSettling)
	do := func(id sandbox.ID, what string, f func() error) {
		g.Go(func() error {
			if err := f(); err != nil && ctx.Err() == nil {
				c.log.LogAttrs(ctx, slog.LevelWarn, "sandbox not settled, trying again", slog.String("sandbox_id", string(id)), slog.String("what", what), errAttr(err))
			}
			return nil
		})
	}
	over, doubted := c.strays.takeEnds()
	for at := range doubted {
		do(at.id, "doubted", func() error { return c.askAgain(ctx, at.id, at.node) })
	}
	for id := range over {
		do(id, "ended", func() error { return c.endRecords(ctx, id) })
	}
	for _, k := range c.noted.allKills() {
		do(k.ID, "kill", func() error { return c.killWanted(ctx, k) })
	}
	for _, p := range c.noted.allPlacements() {
		if len(p.Stale) > 0 {
			do(p.ID, "stale", func() error { return c.forgetStale(ctx, p) })
		}
	}
	for id, copies := range c.strays.bySandbox() {
		if !c.limits.OneNode && !c.noted.doomed(id) { // only a server knows which of several counts
			do(id, "copies", func() error { return c.settleOne(ctx, id, copies, now) })
		}
	}
	_ = g.Wait() // each has told of its own error
}

// verdict is what is to become of a copy of a sandbox.
type verdict int

const (
	// verdictWait means that more has to be heard first.
	verdictWait verdict = iota
	// verdictOpen is for a copy that may go on, verdictArrive for one that counts and has to.
	verdictOpen
	verdictArrive
	// verdictDrop is for a copy that does not count, verdictEnd for any of a sandbox that is no more.
	verdictDrop
	verdictEnd
	// verdictAsk is for a received copy that does not count unless the node that the placement names still has the sandbox,
	// verdictBack for one that departed and counts again if that node knows nothing of it.
	verdictAsk
	verdictBack
	// verdictNews is for one that counts after all, as what spoke against it is gone.
	verdictNews
)

// settleOne decides about the copies of one sandbox.
func (c *Control) settleOne(ctx context.Context, id sandbox.ID, copies []stray, now time.Time) error {
	release, ok := c.busy.try(id)
	if !ok {
		return nil // it is being moved
	}
	defer release()
	if err := c.reloadPlacement(ctx, id); err != nil {
		return fmt.Errorf("read the placement of sandbox %s: %w", id, err)
	}
	var at *sandbox.Placement
	if p, ok := c.noted.placement(id); ok {
		at = &p
	}
	var open []stray
	var errs []error
	for _, one := range copies {
		v := c.judge(at, &one.box, copies)
		switch aged := now.Sub(one.since) >= settleAfter; {
		case v == verdictOpen && aged:
			open = append(open, one)
		case v == verdictNews && aged:
			c.strays.resolve(id, one.box.NodeID)
			c.index.apply(&entry{box: one.box}, now)
		case v == verdictEnd && (aged || at != nil && at.Ended):
			errs = append(errs, c.endCopy(ctx, id, one.box.NodeID))
		case v == verdictArrive:
			errs = append(errs, c.arriveAnyhow(ctx, id, one.box.NodeID, at.Generation))
		case v == verdictDrop:
			errs = append(errs, c.forgetAt(ctx, id, one.box.NodeID, one.box.Generation+1))
		case v == verdictAsk && aged:
			errs = append(errs, c.dropUnlessThere(ctx, at.Node, &one.box))
		case v == verdictBack && aged:
			errs = append(errs, c.backUnlessKnown(ctx, at, &one.box))
		}
	}
	return errors.Join(append(errs, c.settleOpen(ctx, at, open))...)
}

// judge says what is to become of a copy, by the placement of its sandbox; nil means that there is none. Who is asked to
// receive a sandbox is noted in its placement before, so a received copy without one is of a sandbox that is no more.
func (c *Control) judge(at *sandbox.Placement, box *sandbox.Sandbox, all []stray) verdict {
	switch {
	case !c.fleet.isReady(box.NodeID):
		return verdictWait
	case at != nil && at.Ended, c.index.isOver(box.ID):
		return verdictEnd
	case at == nil && box.Received:
		return verdictDrop
	case at == nil && box.State == sandbox.StateMigrating:
		return verdictOpen
	case at == nil:
		return verdictNews
	case box.Received:
		return c.judgeReceived(at, box, all)
	case at.Node == box.NodeID || !at.Outdates(box.NodeID, box.Generation):
		if box.State == sandbox.StateMigrating {
			return verdictOpen
		}
	case c.confirmed(*at):
		return verdictDrop
	case box.State == sandbox.StateMigrating && c.fleet.isReady(at.Node):
		return verdictBack
	}
	return verdictWait
}

// judgeReceived judges a copy that was received for a move. Unless the placement names it, it never goes on without the word
// of the node that the placement does name.
func (c *Control) judgeReceived(at *sandbox.Placement, box *sandbox.Sandbox, all []stray) verdict {
	_, known := c.fleet.record(at.Node)
	switch {
	case at.Node == box.NodeID && box.Generation == at.Generation:
		return verdictArrive
	case at.Node == box.NodeID && box.Generation > at.Generation:
		return verdictWait
	case at.Node == box.NodeID, !known, c.confirmed(*at):
		return verdictDrop
	case !c.fleet.isReady(at.Node):
		return verdictWait
	case slices.ContainsFunc(all, func(o stray) bool { return o.box.NodeID == at.Node }):
		return verdictOpen
	}
	return verdictAsk
}

// settleOpen has one of the copies of a sandbox count that is on its way: a received one, if the copy that departed is heard
// of too, and takes it back where it cannot run; else the one that departed.
func (c *Control) settleOpen(ctx context.Context, at *sandbox.Placement, open []stray) error {
	slices.SortFunc(open, func(a, b stray) int {
		return cmp.Or(btoi(b.box.Received)-btoi(a.box.Received), cmp.Compare(b.box.Generation, a.box.Generation))
	})
	home := slices.IndexFunc(open, func(o stray) bool { return !o.box.Received })
	if home < 0 {
		return nil
	}
	box := open[0].box
	next := sandbox.Placement{ID: box.ID, Node: box.NodeID, Generation: box.Generation}
	if !box.Received {
		next.Generation += 2 // beyond that of whoever received it unheard of
		if at != nil {
			next.Generation = max(next.Generation, at.Generation+1)
		}
	}
	for _, other := range open[1:] {
		next.AddStale(other.box.NodeID)
	}
	if err := c.commitPlacement(ctx, next); err != nil {
		return err
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "sandbox settled", slog.String("sandbox_id", string(box.ID)), nodeAttr(box.NodeID), slog.Int64("generation", next.Generation))
	if !box.Received {
		return c.giveBack(ctx, box.ID, box.NodeID, next.Generation)
	}
	_, err := c.arrive(ctx, box.ID, box.NodeID, next.Generation)
	if err == nil || errors.Is(err, sandbox.ErrUnavailable) {
		return err
	}
	back := open[home].box
	next = sandbox.Placement{ID: back.ID, Node: back.NodeID, Generation: next.Generation + 1, Stale: []sandbox.NodeID{box.NodeID}}
	if commitErr := c.commitPlacement(ctx, next); commitErr != nil {
		return errors.Join(err, commitErr)
	}
	return c.giveBack(ctx, back.ID, back.NodeID, next.Generation)
}

// backUnlessKnown has a copy that departed go on if the node that the placement names knows nothing of the sandbox: it lost what
// it had received before it ran there. Of one that ran there and ended, that node knows until its end is recorded here.
func (c *Control) backUnlessKnown(ctx context.Context, at *sandbox.Placement, departed *sandbox.Sandbox) error {
	known, err := c.knows(ctx, departed.ID, at.Node)
	if err != nil || known {
		return err
	}
	next := sandbox.Placement{
		ID: departed.ID, Node: departed.NodeID, Generation: max(at.Generation, departed.Generation) + 1, Stale: []sandbox.NodeID{at.Node},
	}
	if err := c.commitPlacement(ctx, next); err != nil {
		return err
	}
	c.log.LogAttrs(ctx, slog.LevelWarn, "moved sandbox was lost before it ran and goes on where it was", slog.String("sandbox_id", string(departed.ID)),
		slog.String("lost_at", string(at.Node)), nodeAttr(departed.NodeID), slog.Int64("generation", next.Generation))
	return c.giveBack(ctx, departed.ID, departed.NodeID, next.Generation)
}

// dropUnlessThere drops a received copy if the node that the placement names says that it has the sandbox no more: it ended
// there, or was lost.
func (c *Control) dropUnlessThere(ctx context.Context, home sandbox.NodeID, copied *sandbox.Sandbox) error {
	there, err := c.hasIt(ctx, copied.ID, home)
	if err != nil || there {
		return err
	}
	return c.forgetAt(ctx, copied.ID, copied.NodeID, copied.Generation+1)
}
