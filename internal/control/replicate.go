package control

import (
	"cmp"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// jobKind is what is to be done about copies.
type jobKind string

// The kinds of job, in the order of their urgency.
const (
	// jobRecover brings a paused sandbox back whose node is given up, at node; jobFinish goes on with that.
	jobRecover jobKind = "recover"
	jobFinish  jobKind = "finish"
	// jobUnrecord removes a record that says nothing any more.
	jobUnrecord jobKind = "unrecord"
	// jobGuard copies what a sandbox is paused in to node, or to the bucket where node is empty.
	jobGuard jobKind = "guard"
	// jobSpread has node get what a template's build needs, with warm sandboxes where Warm is set.
	jobSpread jobKind = "spread"
	// jobForget has node drop a replica that no record names.
	jobForget jobKind = "forget"
	// jobUnstore has node remove a checkpoint from the bucket.
	jobUnstore jobKind = "unstore"
)

// job is one thing to do about copies. It is a value: carrying it out makes no choices.
type job struct {
	kind    jobKind
	node    sandbox.NodeID
	box     sandbox.Sandbox
	replica sandbox.Replica
	// template and build are what a jobSpread is about.
	template sandbox.TemplateID
	build    sandbox.Build
	warm     bool
	// checkpoint is what a jobForget or a jobUnstore is about.
	checkpoint string
}

// key names the job, so that it is not begun twice and waits after a failure.
func (j *job) key() string {
	return string(j.kind) + "/" + string(j.node) + "/" + string(j.box.ID) + string(j.replica.ID) + j.build.ID + j.checkpoint
}

// nodeView is what the plan needs to know of a node.
type nodeView struct {
	id      sandbox.NodeID
	machine *sandbox.Origin
	ready   bool
	// open means that it gets new things; givenUp that it does not answer and its sandboxes are brought back elsewhere.
	open    bool
	givenUp bool
	// joined is set for a node that has come lately.
	joined bool
	// has is images and checkpoints, replicas the checkpoints that it keeps for other nodes, with since when that is known.
	has      map[string]struct{}
	replicas map[string]time.Time
	load     float64
}

// copyView is everything that planCopies looks at.
type copyView struct {
	now     time.Time
	nodes   []nodeView
	paused  []sandbox.Sandbox
	records map[sandbox.ID]sandbox.Replica
	// bereft reports whether the home of a record says that it has lost the sandbox.
	bereft func(sandbox.ID) bool
	// stored are the checkpoints that may be in the bucket; writing are those that are written there, or removed, right now.
	stored    []string
	writing   map[string]struct{}
	templates []sandbox.Template
	// popular are the builds that sandboxes were made from lately.
	popular map[string]bool
	limits  Limits
	// skip says which jobs are under way or have just failed.
	skip func(key string) bool
}

// forgetAfter is how long a replica without a record is kept: the record may be about to be written.
const forgetAfter = time.Minute

// planCopies says what to copy, bring back and drop, the most urgent first and at most so many. It is pure.
func planCopies(v *copyView, most int) []job {
	p := copyPlan{copyView: v, most: most}
	p.recoveries()
	p.guards()
	p.spreads()
	p.forgets()
	return p.jobs
}

type copyPlan struct {
	*copyView
	most int
	jobs []job
}

// add takes a job unless there are enough; it reports whether there is room for more.
func (p *copyPlan) add(j job) bool {
	if len(p.jobs) < p.most && !p.skip(j.key()) {
		p.jobs = append(p.jobs, j)
	}
	return len(p.jobs) < p.most
}

func (p *copyPlan) node(id sandbox.NodeID) *nodeView {
	i := slices.IndexFunc(p.nodes, func(n nodeView) bool { return n.id == id })
	if i < 0 {
		return nil
	}
	return &p.nodes[i]
}

// machineOf returns the machine of a node; nil where it is not known.
func (p *copyPlan) machineOf(id sandbox.NodeID) *sandbox.Origin {
	if n := p.node(id); n != nil {
		return n.machine
	}
	return nil
}

// gone reports whether a node is unknown or given up.
func (p *copyPlan) gone(id sandbox.NodeID) bool {
	n := p.node(id)
	return n == nil || n.givenUp
}

// best returns the least used of the nodes that ok says yes to.
func (p *copyPlan) best(ok func(*nodeView) bool) *nodeView {
	var out *nodeView
	for i := range p.nodes {
		n := &p.nodes[i]
		if n.ready && ok(n) && (out == nil || cmp.Or(cmp.Compare(n.load, out.load), cmp.Compare(n.id, out.id)) < 0) {
			out = n
		}
	}
	return out
}

// recoveries brings back the paused sandboxes of nodes that are given up.
func (p *copyPlan) recoveries() {
	paused := make(map[sandbox.ID]*sandbox.Sandbox, len(p.paused))
	for i := range p.paused {
		paused[p.paused[i].ID] = &p.paused[i]
	}
	for _, r := range p.records {
		home := p.node(r.Home)
		switch {
		case p.gone(r.Home), p.bereft(r.ID):
			if to := p.newHome(r); to != nil && !p.add(job{kind: jobRecover, node: to.id, replica: r}) {
				return
			}
		case r.Returning && home.ready:
			if !p.add(job{kind: jobFinish, node: r.Home, replica: r}) {
				return
			}
		case !r.Returning && home.ready:
			if box := paused[r.ID]; box == nil || box.NodeID != r.Home || box.Generation > r.Generation {
				p.add(job{kind: jobUnrecord, replica: r})
			}
		}
	}
}

// newHome returns the node that is to bring a sandbox back: one that has it or, from the bucket, any.
func (p *copyPlan) newHome(r sandbox.Replica) *nodeView {
	made := r.MadeOn
	if made == nil {
		made = p.machineOf(r.Home)
	}
	to := p.best(func(n *nodeView) bool {
		return slices.Contains(r.Holders, n.id) && n.holds(r.Checkpoint) && n.machine.Takes(made) && !p.skip((&job{kind: jobRecover, node: n.id, replica: r}).key())
	})
	if to == nil && r.Bucket {
		to = p.best(func(n *nodeView) bool {
			return n.open && (n.id != r.Home || p.bereft(r.ID)) && n.machine.Takes(made)
		})
	}
	return to
}

// holds reports whether a node has a checkpoint, as its own or as a replica. One that does not answer may.
func (n *nodeView) holds(checkpoint string) bool {
	_, replica := n.replicas[checkpoint]
	_, own := n.has[checkpoint]
	return replica || own || !n.ready
}

// guards copies what sandboxes are paused in.
func (p *copyPlan) guards() {
	for i := range p.paused {
		box := &p.paused[i]
		home := p.node(box.NodeID)
		if box.Checkpoint == "" || home == nil || !home.ready {
			continue
		}
		r := p.records[box.ID]
		if r.Generation != box.Generation {
			r = sandbox.Replica{}
		}
		_, writing := p.writing[box.Checkpoint] // what is being removed is stored again afterwards
		if p.limits.Bucket && !r.Bucket && !writing && !p.add(job{kind: jobGuard, box: *box, replica: r}) {
			return
		}
		if to := p.nextHolder(box, home, r); to != nil && !p.add(job{kind: jobGuard, node: to.id, box: *box, replica: r}) {
			return
		}
	}
}

// nextHolder returns the node that is to keep a copy, or nil where there are enough.
func (p *copyPlan) nextHolder(box *sandbox.Sandbox, home *nodeView, r sandbox.Replica) *nodeView {
	count := 1
	for _, h := range r.Holders {
		n := p.node(h)
		count += btoi(n != nil && !n.givenUp && n.holds(box.Checkpoint))
	}
	if count >= p.limits.SnapshotReplicas {
		return nil
	}
	made := r.MadeOn // also where the home is another by now
	if made == nil {
		made = madeOn(box, home.machine)
	}
	return p.best(func(n *nodeView) bool {
		return n.open && n.id != box.NodeID && n.machine.Takes(made) && (!slices.Contains(r.Holders, n.id) || !n.holds(box.Checkpoint)) &&
			!p.skip((&job{kind: jobGuard, node: n.id, box: *box, replica: r}).key())
	})
}

// madeOn returns what going on depends on of a sandbox that is paused on a machine. One that boots anew does not mind the engine.
func madeOn(box *sandbox.Sandbox, on *sandbox.Origin) *sandbox.Origin {
	if on == nil || box.PausedKind != sandbox.CheckpointFiles {
		return on
	}
	return &sandbox.Origin{Architecture: on.Architecture}
}

// spreads has nodes get templates and snapshots before they are asked for there.
func (p *copyPlan) spreads() {
	for i := range p.templates {
		t := &p.templates[i]
		for _, b := range t.Builds {
			if b.State == sandbox.BuildReady && tagged(t, b.ID) && !p.spread(t, b) {
				return
			}
		}
	}
}

func tagged(t *sandbox.Template, build string) bool {
	for _, tag := range t.Tags {
		if tag.BuildID == build {
			return true
		}
	}
	return false
}

// wanted is how many nodes are to have a template; -1 is all.
func (p *copyPlan) wanted(t *sandbox.Template) int {
	n := p.limits.TemplatePlacement
	if t.Placement != nil {
		n = *t.Placement
	}
	if t.Kind == sandbox.TemplateSnapshot && n >= 0 {
		n = max(n, p.limits.SnapshotReplicas)
	}
	return n
}

// sources counts the nodes that have a build, and says what machine it needs.
func (p *copyPlan) sources(b sandbox.Build) (count int, from *sandbox.Origin) {
	from = b.MadeOn
	for i := range p.nodes {
		if n := &p.nodes[i]; n.ready && n.hasBuild(b) {
			count++
			if b.MadeOn == nil || b.Checkpoint != sandbox.CheckpointMemory {
				from = n.machine
			}
		}
	}
	return count, from
}

func (p *copyPlan) spread(t *sandbox.Template, b sandbox.Build) bool {
	key := b.ImageDigest
	if b.Checkpoint != "" {
		key = b.ID
	}
	count, from := p.sources(b)
	if count == 0 || key == "" {
		return true // nobody has it: there is nothing to copy from
	}
	want := p.wanted(t)
	for i := range p.nodes {
		n := &p.nodes[i]
		if !n.ready || !n.open || n.hasBuild(b) || !n.suits(b, from) {
			continue
		}
		warm := n.joined && p.popular[b.ID]
		if !warm && want >= 0 && count >= want {
			continue
		}
		count++
		if !p.add(job{kind: jobSpread, node: n.id, template: t.ID, build: b, warm: warm}) {
			return false
		}
	}
	return true
}

// suits reports whether sandboxes of a build can start on a node, which was made, or is there already, on another machine.
func (n *nodeView) suits(b sandbox.Build, from *sandbox.Origin) bool {
	if b.Checkpoint == sandbox.CheckpointMemory {
		return n.machine.Takes(from)
	}
	return n.machine == nil || from == nil || n.machine.Architecture == from.Architecture
}

func (n *nodeView) hasBuild(b sandbox.Build) bool {
	_, image := n.has[b.ImageDigest]
	if b.Checkpoint == "" {
		return image
	}
	_, saved := n.has[b.ID]
	return saved
}

// forgets drops the replicas, and what is in the bucket, that nothing needs: their sandbox runs, is no more, or is elsewhere.
func (p *copyPlan) forgets() {
	needed := make(map[string]struct{}, len(p.records)+len(p.paused))
	for _, r := range p.records {
		needed[r.Checkpoint] = struct{}{}
	}
	for i := range p.paused {
		needed[p.paused[i].Checkpoint] = struct{}{}
	}
	for _, id := range p.stored {
		_, used := needed[id]
		if _, writing := p.writing[id]; used || writing {
			continue
		}
		if to := p.best(func(*nodeView) bool { return true }); to != nil && !p.add(job{kind: jobUnstore, node: to.id, checkpoint: id}) {
			return
		}
	}
	for i := range p.nodes {
		n := &p.nodes[i]
		for id, since := range n.replicas {
			if _, ok := needed[id]; ok || !n.ready || p.now.Sub(since) < forgetAfter {
				continue
			}
			if !p.add(job{kind: jobForget, node: n.id, checkpoint: id}) {
				return
			}
		}
	}
}
