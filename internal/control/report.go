package control

import (
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"time"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/gen/node/v1/nodev1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

var _ nodev1connect.NodeServiceHandler = (*Control)(nil)

var nodeIDForm = regexp.MustCompile(`^[a-z0-9]{6}$`)

// Register takes a node into the cluster, or takes it back after a restart. It asks for a full report each time: that
// is one message, and right also after the server or the node forgot something.
func (c *Control) Register(ctx context.Context, req *nodev1.RegisterRequest) (*nodev1.RegisterResponse, error) {
	if err := c.checkNode(ctx, req.GetNodeId()); err != nil {
		return nil, toNode(err)
	}
	n, err := nodeFromWire(req)
	if err != nil {
		return nil, toNode(err)
	}
	now := time.Now()
	n, epoch := c.fleet.register(n, slices.Concat(req.GetImageDigests(), req.GetCheckpointIds()), now)
	if err := c.nodes.PutNode(ctx, n); err != nil {
		return nil, toNode(fmt.Errorf("record node %s: %w", n.ID, err))
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "node registered", nodeAttr(n.ID), slog.String("name", n.Name),
		slog.String("version", n.Version), slog.Int64("epoch", epoch))
	c.offerSweep(n.ID, req.GetCheckpointIds())
	c.copies.registered(n.ID, req.GetReplicaIds(), now)
	c.strays.kick()
	c.note(ctx, Event{
		Type: "node_registered", NodeID: n.ID, Message: fmt.Sprintf("node %s registered", n.Name),
		Fields: map[string]string{"version": n.Version},
	})
	return &nodev1.RegisterResponse{Epoch: epoch, TokenSecret: c.secret}, nil
}

func nodeFromWire(w *nodev1.RegisterRequest) (sandbox.Node, error) {
	if !nodeIDForm.MatchString(w.GetNodeId()) {
		return sandbox.Node{}, sandbox.Invalidf("node id %.40q: want 6 characters of a-z and 0-9", w.GetNodeId())
	}
	n := sandbox.Node{
		ID: sandbox.NodeID(w.GetNodeId()), Name: w.GetName(), Version: w.GetVersion(), Architecture: w.GetArchitecture(),
		Kernel: w.GetKernel(), Labels: w.GetLabels(), Capacity: resourcesFromWire(w.GetCapacity()),
		Address: w.GetAddress(), CPUFeatures: w.GetCpuFeatures(), Machine: resourcesFromWire(w.GetMachine()),
	}
	setDefault(&n.Name, string(n.ID))
	for _, e := range w.GetEngines() {
		n.Engines = append(n.Engines, e.GetName())
		if e.GetVersion() != "" {
			if n.EngineVersions == nil {
				n.EngineVersions = make(map[string]string, len(w.GetEngines()))
			}
			n.EngineVersions[e.GetName()] = e.GetVersion()
		}
	}
	return n, nil
}

// Report takes a node's changes. Taking the same report twice does no harm, so a node sends what is not acknowledged
// again; and it is not acknowledged before its events are kept.
func (c *Control) Report(ctx context.Context, req *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	if err := c.checkNode(ctx, req.GetNodeId()); err != nil {
		return nil, toNode(err)
	}
	node, now := sandbox.NodeID(req.GetNodeId()), time.Now()
	back, err := c.fleet.heard(node, req.GetEpoch(), req.GetLoad(), now)
	if err != nil {
		return nil, toNode(err)
	}
	if back && !req.GetFull() {
		c.revive(ctx, node)
	}
	node = sandbox.NodeID(shared(string(node)))
	c.followClock(ctx, node, timeFromWire(req.GetTime()), now)
	c.beat(c.fleet.recordOf(node), req.GetEpoch())
	var last int64
	var over []ending
	events := make([]Event, 0, len(req.GetChanges()))
	named := make(map[sandbox.ID]struct{}, len(req.GetChanges()))
	for _, change := range req.GetChanges() {
		box, err := c.boxFromWire(node, change.GetSandbox())
		if err != nil {
			return nil, toNode(fmt.Errorf("change %d: %w", change.GetSequence(), err))
		}
		named[box.ID] = struct{}{}
		if box.State.Ended() && c.noted.any(box.ID) {
			over = append(over, ending{id: box.ID, node: node, killed: change.GetType() == "killed"})
		}
		c.take(change.GetType(), &entry{box: box, sequence: change.GetSequence(), epoch: req.GetEpoch()}, now)
		events = append(events, changeEvent(change, box, now.UTC()))
		last = max(last, change.GetSequence())
	}
	if req.GetFull() {
		c.fleet.toldAll(node)
		c.strays.onlyNamed(node, named)
		c.noted.deprive(node, func(id sandbox.ID) bool {
			_, ok := named[id]
			return ok || c.index.madeUnder(id, node, req.GetEpoch())
		})
		events = append(events, c.markMissing(node, req.GetEpoch(), named, now.UTC())...)
	}
	if err := c.concludeEnds(ctx, over); err != nil {
		return nil, toNode(sandbox.Unavailablef("note what has ended: %v", err))
	}
	if len(events) > 0 {
		if err := c.history.Append(ctx, events); err != nil {
			return nil, toNode(sandbox.Unavailablef("keep %d events: %v", len(events), err))
		}
	}
	c.ends.busy(node, req.GetBusy(), now)
	resp := &nodev1.ReportResponse{
		AcknowledgedSequence: c.fleet.acknowledge(node, last), Cordoned: c.fleet.open(node) != nil, Decides: c.decides(),
	}
	c.tellRefusals(req.GetRefusalsVersion(), resp)
	return resp, nil
}

// tellRefusals tells a node who is no member any more, where it does not know: others dial it without a server between.
func (c *Control) tellRefusals(known string, resp *nodev1.ReportResponse) {
	if c.joining.members == nil {
		return
	}
	version, all := c.joining.members.Refused()
	if version == known {
		return
	}
	resp.RefusalsVersion = version
	for _, r := range all {
		resp.Refusals = append(resp.Refusals, &nodev1.Refusal{Member: r.Member.String(), Serial: r.Serial})
	}
}

// take takes what a node says of one sandbox. A copy that does not count, because the sandbox is elsewhere, has not
// arrived yet or is to be killed, is no news about the sandbox but work for runSettle.
func (c *Control) take(change string, e *entry, now time.Time) {
	box := &e.box
	if change == "forgotten" {
		c.strays.resolve(box.ID, box.NodeID)
		if c.limits.OneNode {
			c.index.apply(&entry{box: givenUp(box), sequence: e.sequence, epoch: e.epoch}, now)
		}
		return
	}
	if !box.State.Ended() && (c.noted.doomed(box.ID) || box.Received || c.noted.outdated(box) || c.index.isFinal(box.ID)) {
		c.strays.add(*box, now)
		return
	}
	if box.State == sandbox.StateMigrating {
		c.strays.add(*box, now)
	} else {
		c.strays.resolve(box.ID, box.NodeID)
	}
	if box.State.Ended() && (c.noted.doomed(box.ID) || c.noted.elsewhere(box.ID, box.NodeID)) {
		return // it is gone for everybody, or what has ended there is not what counts
	}
	c.index.apply(e, now)
	if box.State.Ended() {
		c.strays.ended(box.ID)
	}
}

const lostReason = "its node does not have it any more"

// givenUp returns a sandbox as one that its node has given up.
func givenUp(box *sandbox.Sandbox) sandbox.Sandbox {
	out := *box
	out.State, out.Reason = sandbox.StateDeleted, lostReason
	return out
}

// markMissing marks as lost what a node does not name in its full report. What was created there under the present
// registration is left out: the report may have been written before. So is what is brought back from a replica.
func (c *Control) markMissing(node sandbox.NodeID, epoch int64, named map[sandbox.ID]struct{}, now time.Time) []Event {
	var missing []sandbox.ID
	first, _ := ends()
	c.index.scan(false, first, func(e *entry) bool {
		switch _, ok := named[e.box.ID]; {
		case ok || e.box.NodeID != node || e.box.State.Ended() && !lostThere(e) || c.noted.isBereft(e.box.ID):
		case !c.spared(e, epoch, now):
			missing = append(missing, e.box.ID)
		case c.limits.OneNode: // the next report of everything may be long in coming
			c.strays.doubt(e.box.ID, node)
		}
		return true
	})
	var events []Event
	for _, id := range missing {
		c.index.change(id, now, func(e *entry) bool {
			if e.box.NodeID != node || e.box.State.Ended() && !lostThere(e) || c.spared(e, epoch, now) {
				return false
			}
			e.was = ""
			e.box.State, e.box.Reason, e.box.EndedAt = sandbox.StateLost, lostReason, now
			if c.limits.OneNode { // it ended or went elsewhere while it was not told
				e.box = givenUp(&e.box)
				return true
			}
			events = append(events, Event{Time: now, Type: "lost", NodeID: node, SandboxID: id, Message: lostReason})
			return true
		})
	}
	return events
}

// reportAge is how old a report can be that arrives now.
const reportAge = 10 * time.Second

// spared reports whether a full report that does not name a sandbox says nothing about it: it may have been written before. A node's
// own control is told everything again and again under one registration.
func (c *Control) spared(e *entry, epoch int64, now time.Time) bool {
	return e.epoch == epoch && (!c.limits.OneNode || now.Sub(e.box.StartedAt) <= reportAge)
}

func changeEvent(change *nodev1.Change, box sandbox.Sandbox, now time.Time) Event {
	e := Event{
		Time: timeFromWire(change.GetTime()), Type: change.GetType(), NodeID: box.NodeID, SandboxID: box.ID,
		Sequence: change.GetSequence(), Message: box.Reason,
		Fields: map[string]string{"state": string(box.State), "template": box.TemplateName},
	}
	setDefault(&e.Time, now)
	if e.Message == "" {
		e.Message = fmt.Sprintf("sandbox is %s", box.State)
	}
	return e
}
