package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

const (
	// moveDeadline bounds a move, and nodeDeadline is when the node that gives a sandbox away may ask what became of it.
	moveDeadline = 4 * time.Minute
	nodeDeadline = 5 * time.Minute
	// moveGrace is how long open requests to a sandbox may take to end before it is saved, while new ones wait. What is open
	// longer is cut; proxies repeat what is cut where that is harmless.
	moveGrace = 2 * time.Second
	// maxTargets bounds the nodes that one move tries.
	maxTargets = 3
	// arriveTries bounds how often a node that does not answer is asked to let a sandbox arrive.
	arriveTries = 5
	arrivePause = 200 * time.Millisecond
)

// transfer is one move of a sandbox.
type transfer struct {
	held
	// targets are the nodes to ask, the best first; to is the one that took it.
	targets []sandbox.NodeID
	to      sandbox.NodeID
	parcel  *agentv1.Parcel
}

// generation is the sandbox's at the new node; undone is the one that it gets where the move is taken back.
func (t *transfer) generation() int64 { return t.parcel.GetSandbox().GetGeneration() + 1 }
func (t *transfer) undone() int64     { return t.generation() + 1 }

// move gives a sandbox, running or paused, to another node and returns it there. The placement that it commits is the point
// at which the other node's copy counts; whatever fails before leaves the sandbox where it was, and whatever fails after is
// taken back or completed by runSettle.
// Errors: ErrConflict for a sandbox that is on its way, ErrExhausted where no node takes it, those of the nodes.
func (c *Control) move(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	release, ok := c.busy.try(id)
	if !ok {
		return sandbox.Sandbox{}, sandbox.Conflictf("sandbox %s is being moved already", id)
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, moveDeadline)
	defer cancel()
	t, err := c.planMove(ctx, id)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if err := c.prefetch(ctx, t); err != nil { // while the sandbox still runs
		return sandbox.Sandbox{}, err
	}
	if err := c.unguard(ctx, id); err != nil {
		return sandbox.Sandbox{}, err
	}
	if err := c.expect(ctx, t, t.targets[0]); err != nil { // likewise
		return sandbox.Sandbox{}, err
	}
	defer c.passing(t.held, t.box.State, sandbox.StateMigrating)()
	if err := c.depart(ctx, t); err != nil {
		return sandbox.Sandbox{}, err
	}
	if err := c.receive(ctx, t); err != nil {
		return sandbox.Sandbox{}, errors.Join(err, c.takeBack(ctx, t))
	}
	err = c.commitPlacement(ctx, sandbox.Placement{
		ID: id, Node: t.to, Generation: t.generation(), Stale: []sandbox.NodeID{t.box.NodeID},
	})
	if err != nil { // it may be decided or not, here or elsewhere: runSettle finds out
		return sandbox.Sandbox{}, fmt.Errorf("move sandbox %s to node %s: %w", id, t.to, err)
	}
	box, err := c.arrive(ctx, id, t.to, t.generation())
	if err != nil {
		return sandbox.Sandbox{}, errors.Join(err, c.recall(ctx, t, err))
	}
	c.forgetCopy(ctx, id, t.box.NodeID, t.generation())
	c.note(ctx, Event{
		Type: "moved", NodeID: t.to, SandboxID: id, Message: fmt.Sprintf("moved from node %s to node %s", t.box.NodeID, t.to),
		Fields: map[string]string{"from": string(t.box.NodeID), "to": string(t.to)},
	})
	return box, nil
}

// planMove finds the sandbox and the nodes that could take it. Errors: ErrConflict, ErrExhausted, with the reason.
func (c *Control) planMove(ctx context.Context, id sandbox.ID) (*transfer, error) {
	box, err := c.live(ctx, id)
	if err != nil {
		return nil, err
	}
	if box.State != sandbox.StateRunning && box.State != sandbox.StatePaused {
		return nil, sandbox.Conflictf("sandbox %s is %s: only one that runs or is paused can be moved", id, box.State)
	}
	if c.noted.isBereft(id) {
		return nil, sandbox.Conflictf("sandbox %s is being brought back: its node %s has lost it", id, box.NodeID)
	}
	agent, err := c.agent(box.NodeID)
	if err != nil {
		return nil, err
	}
	source, ok := c.fleet.record(box.NodeID)
	if !ok {
		return nil, sandbox.Unavailablef("sandbox %s: its node %s is not known", id, box.NodeID)
	}
	d, err := c.chooseFor(box, source)
	if err != nil {
		return nil, err
	}
	return &transfer{held: held{box: box, agent: agent}, targets: d}, nil
}

// chooseFor returns the nodes that could go on with a sandbox of another, best first. Errors: ErrExhausted with the reasons.
func (c *Control) chooseFor(box sandbox.Sandbox, source sandbox.Node) ([]sandbox.NodeID, error) {
	ask := scheduler.Request{Resources: box.Resources, Image: box.ImageDigest, Fetch: true, Key: string(box.TemplateID), MadeOn: source.Origin()}
	if box.State == sandbox.StatePaused {
		ask.Resources = sandbox.Resources{DiskBytes: box.Resources.DiskBytes}
		ask.MadeOn = madeOn(&box, ask.MadeOn)
		if r, ok := c.noted.replica(box.ID); ok && r.Generation == box.Generation && r.MadeOn != nil {
			ask.MadeOn = r.MadeOn // its node may be another by now
		}
	}
	if err := wishes(&ask, box.Metadata); err != nil {
		return nil, err
	}
	d := c.fleet.placeAmong(ask, time.Now(), func(n sandbox.Node) bool { return n.ID != source.ID })
	if len(d.Candidates) == 0 {
		return nil, sandbox.Exhaustedf("no other node can take sandbox %s: %s", box.ID, d.Explain(explained))
	}
	return d.Candidates[:min(maxTargets, len(d.Candidates))], nil
}

// prefetch has the first target that can get the image; those that cannot are no targets.
func (c *Control) prefetch(ctx context.Context, t *transfer) error {
	var last error
	for len(t.targets) > 0 {
		err := c.fetch(ctx, t.targets[0], &agentv1.FetchRequest{ImageDigest: t.box.ImageDigest, TemplateId: string(t.box.TemplateID)})
		if err == nil {
			return nil
		}
		last = err
		t.targets = t.targets[1:]
	}
	return fmt.Errorf("move sandbox %s: get its image: %w", t.box.ID, last)
}

// fetch has a node get an image or a checkpoint from those that have it. What the node has already costs nothing.
func (c *Control) fetch(ctx context.Context, node sandbox.NodeID, req *agentv1.FetchRequest) error {
	what := req.GetImageDigest() + req.GetCheckpointId()
	if what == "" || req.GetWarm() == nil && !c.fleet.lacks(node, what) {
		return nil
	}
	agent, err := c.agent(node)
	if err != nil {
		return err
	}
	if req.Peers == nil {
		req.Peers = c.fleet.peers(node, what)
	}
	req.Bucket = c.limits.Bucket
	if _, err := agent.Fetch(ctx, req); err != nil {
		return fmt.Errorf("node %s: fetch %s: %w", node, what, fromNode(node, err))
	}
	if !req.GetReplica() {
		c.fleet.setImage(node, what, true)
	}
	return nil
}

// depart has the sandbox saved where it is. Where the node does not answer, it may have been: it is told to go on.
func (c *Control) depart(ctx context.Context, t *transfer) error {
	resp, err := t.agent.Depart(ctx, &agentv1.DepartRequest{
		Id: string(t.box.ID), Deadline: durationpb.New(nodeDeadline), Grace: durationpb.New(moveGrace),
	})
	if err = fromNode(t.box.NodeID, err); err != nil {
		err = fmt.Errorf("move sandbox %s: save it: %w", t.box.ID, err)
		if errors.Is(err, sandbox.ErrUnavailable) {
			return errors.Join(err, c.giveBack(ctx, t.box.ID, t.box.NodeID, 0))
		}
		return err
	}
	t.parcel = resp.GetParcel()
	c.fleet.answered(t.box.NodeID, resp.GetLoad())
	return nil
}

// expect notes, before a node is asked to receive a sandbox, that it may have a copy from then on: whatever becomes of its
// answer, of this server and of the sandbox, it is known that there is something to drop.
func (c *Control) expect(ctx context.Context, t *transfer, at sandbox.NodeID) error {
	id := t.box.ID
	elsewhere := false
	err := c.placements.ChangePlacement(ctx, id, func(p *sandbox.Placement) bool {
		elsewhere = p.Node != t.box.NodeID || p.Ended
		p.AddStale(at)
		return true
	})
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		// Below the sandbox's generation, whose news goes on counting.
		err = c.placements.CommitPlacement(ctx, sandbox.Placement{
			ID: id, Node: t.box.NodeID, Generation: t.box.Generation - 1, Stale: []sandbox.NodeID{at}, At: time.Now().UTC(),
		})
	case err == nil && elsewhere:
		err = sandbox.Conflictf("it is not at node %s any more", t.box.NodeID)
	}
	if err != nil {
		return fmt.Errorf("move sandbox %s: note that node %s may have it: %w", id, at, err)
	}
	return c.reloadPlacement(ctx, id)
}

// receive has one of the targets take the sandbox. Those that failed keep nothing of it.
func (c *Control) receive(ctx context.Context, t *transfer) error {
	var last error
	for i, to := range t.targets {
		if i > 0 {
			if err := c.expect(ctx, t, to); err != nil {
				return err
			}
		}
		err := c.receiveAt(ctx, t, to)
		if err == nil {
			t.to = to
			return nil
		}
		last = err
		c.forgetCopy(ctx, t.box.ID, to, t.undone())
		if ctx.Err() != nil {
			break
		}
	}
	return fmt.Errorf("move sandbox %s: %w", t.box.ID, last)
}

func (c *Control) receiveAt(ctx context.Context, t *transfer, to sandbox.NodeID) error {
	agent, err := c.agent(to)
	if err != nil {
		return err
	}
	done := c.fleet.dispatch(to, t.box.Resources)
	resp, err := agent.Receive(ctx, &agentv1.ReceiveRequest{
		Parcel: t.parcel, Peers: []*agentv1.Peer{c.fleet.peer(t.box.NodeID)}, Generation: t.generation(),
	})
	done(resp.GetLoad())
	return fromNode(to, err)
}

// arrive lets a sandbox count at the node that received it, once its placement says so.
func (c *Control) arrive(ctx context.Context, id sandbox.ID, at sandbox.NodeID, generation int64) (sandbox.Sandbox, error) {
	for try := 1; ; try++ {
		box, err := c.arriveOnce(ctx, at, &agentv1.ArriveRequest{Id: string(id), Generation: generation})
		if err == nil || !errors.Is(err, sandbox.ErrUnavailable) || try == arriveTries || ctx.Err() != nil {
			return box, err
		}
		pause(ctx, arrivePause)
	}
}

// arriveAnyhow is arrive of a sandbox of which there is no other copy: where it cannot run it is paused.
func (c *Control) arriveAnyhow(ctx context.Context, id sandbox.ID, at sandbox.NodeID, generation int64) error {
	_, err := c.arrive(ctx, id, at, generation)
	if err == nil || errors.Is(err, sandbox.ErrUnavailable) || errors.Is(err, sandbox.ErrNotFound) || ctx.Err() != nil {
		return err
	}
	c.log.LogAttrs(ctx, slog.LevelWarn, "moved sandbox cannot run and is paused", slog.String("sandbox_id", string(id)), nodeAttr(at), errAttr(err))
	_, err = c.arriveOnce(ctx, at, &agentv1.ArriveRequest{Id: string(id), Generation: generation, Paused: true})
	return err
}

func (c *Control) arriveOnce(ctx context.Context, at sandbox.NodeID, req *agentv1.ArriveRequest) (sandbox.Sandbox, error) {
	agent, err := c.agent(at)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	resp, err := agent.Arrive(ctx, req)
	if err = fromNode(at, err); err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("sandbox %s arrives at node %s: %w", req.GetId(), at, err)
	}
	c.fleet.answered(at, resp.GetLoad())
	c.strays.resolve(sandbox.ID(req.GetId()), at)
	return c.learn(at, resp.GetSandbox())
}

// takeBack has the node that gave a sandbox away go on with it: the placement names it, or no node.
func (c *Control) takeBack(ctx context.Context, t *transfer) error {
	if t.to != "" {
		c.forgetCopy(ctx, t.box.ID, t.to, t.undone())
	}
	return c.giveBack(ctx, t.box.ID, t.box.NodeID, t.undone())
}

// recall takes back a move that counts already, because the sandbox cannot run where it went. Where that node does not
// answer, it may run there: runSettle goes on.
func (c *Control) recall(ctx context.Context, t *transfer, why error) error {
	if errors.Is(why, sandbox.ErrUnavailable) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CreateDeadline)
	defer cancel()
	err := c.commitPlacement(ctx, sandbox.Placement{
		ID: t.box.ID, Node: t.box.NodeID, Generation: t.undone(), Stale: []sandbox.NodeID{t.to},
	})
	if err != nil {
		return err
	}
	return c.takeBack(ctx, t)
}

// giveBack has a node go on with a sandbox that departed there. The caller has made sure that no other node may.
func (c *Control) giveBack(ctx context.Context, id sandbox.ID, to sandbox.NodeID, generation int64) error {
	agent, err := c.agent(to)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CreateDeadline)
	defer cancel()
	resp, err := agent.Return(ctx, &agentv1.ReturnRequest{Id: string(id), Generation: generation})
	if err = fromNode(to, err); err != nil { // its reports say that it is still on its way
		return fmt.Errorf("sandbox %s goes on at node %s: %w", id, to, err)
	}
	c.fleet.answered(to, resp.GetLoad())
	c.strays.resolve(id, to)
	_, err = c.learn(to, resp.GetSandbox())
	return err
}
