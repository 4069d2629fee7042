package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// replicateEvery is how often copies are planned, and maxCopies how many jobs are under way at once.
	replicateEvery = time.Second
	maxCopies      = 4
	// copyBackoff is how long a job that failed is left alone.
	copyBackoff = 15 * time.Second
	// copyDeadline bounds one job.
	copyDeadline = 10 * time.Minute
	// popularFor is how long a build counts as popular after its last use, and joinedFor how long a node as new.
	popularFor = time.Hour
	joinedFor  = 10 * time.Minute
	// maxPopular bounds the builds whose use is remembered.
	maxPopular = 1024
)

// copies is what runReplicas remembers from one round to the next.
type copies struct {
	mu sync.Mutex
	// active and failed are jobs by key.
	active map[string]struct{}
	failed map[string]time.Time
	// replicas are the checkpoints that nodes keep for others; joined is when nodes registered first here.
	replicas map[sandbox.NodeID]map[string]time.Time
	joined   map[sandbox.NodeID]time.Time
	uses     map[string]use
	// writing are the checkpoints that are written to the bucket, or removed there.
	writing map[string]struct{}
}

// use is when sandboxes were made from a build last, and of what size.
type use struct {
	template sandbox.TemplateID
	size     *agentv1.Resources
	at       time.Time
}

func newCopies() *copies {
	return &copies{
		active: make(map[string]struct{}), failed: make(map[string]time.Time), uses: make(map[string]use),
		writing:  make(map[string]struct{}),
		replicas: make(map[sandbox.NodeID]map[string]time.Time), joined: make(map[sandbox.NodeID]time.Time),
	}
}

// used notes that a sandbox was made from a build.
func (p *copies) used(template sandbox.TemplateID, build string, size *agentv1.Resources, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.uses[build]; !ok && len(p.uses) >= maxPopular {
		maps.DeleteFunc(p.uses, func(_ string, u use) bool { return at.Sub(u.at) > popularFor })
	}
	if len(p.uses) < maxPopular {
		p.uses[build] = use{template: template, size: size, at: at}
	}
}

// registered takes the replicas that a node says it keeps. What it kept before is as old as it was.
func (p *copies) registered(node sandbox.NodeID, ids []string, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.joined[node]; !ok {
		p.joined[node] = now
	}
	kept := make(map[string]time.Time, len(ids))
	for _, id := range ids {
		kept[id] = now
		if since, ok := p.replicas[node][id]; ok {
			kept[id] = since
		}
	}
	p.replicas[node] = kept
}

func (p *copies) keep(node sandbox.NodeID, checkpoint string, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.replicas[node] == nil {
		p.replicas[node] = make(map[string]time.Time)
	}
	p.replicas[node][checkpoint] = now
}

// inBucket returns the checkpoint that a job writes to the bucket or removes there; empty for any other job.
func (j *job) inBucket() string {
	switch {
	case j.kind == jobUnstore:
		return j.checkpoint
	case j.kind == jobGuard && j.node == "":
		return j.box.Checkpoint
	}
	return ""
}

func (p *copies) drop(node sandbox.NodeID, checkpoint string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.replicas[node], checkpoint)
}

// forget drops what is known of a node that is no more.
func (p *copies) forget(node sandbox.NodeID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.replicas, node)
	delete(p.joined, node)
}

// begin takes a job; it is false where the job is under way already.
func (p *copies) begin(j *job) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	key, at := j.key(), j.inBucket()
	if _, ok := p.active[key]; ok {
		return false
	}
	if _, ok := p.writing[at]; ok {
		return false
	}
	p.active[key] = struct{}{}
	if at != "" {
		p.writing[at] = struct{}{}
	}
	return true
}

func (p *copies) end(j *job, err error, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := j.key()
	delete(p.active, key)
	delete(p.writing, j.inBucket())
	maps.DeleteFunc(p.failed, func(_ string, at time.Time) bool { return now.Sub(at) >= copyBackoff })
	if err != nil {
		p.failed[key] = now
	}
}

func (p *copies) room() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maxCopies - len(p.active)
}

// runReplicas copies, brings back and drops what planCopies says, until ctx ends and its jobs have.
func (c *Control) runReplicas(ctx context.Context) {
	var jobs sync.WaitGroup
	defer jobs.Wait()
	tick := time.NewTicker(replicateEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		most := c.copies.room()
		if most <= 0 {
			continue
		}
		view, err := c.copyView(ctx, time.Now())
		if err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "copies not planned", errAttr(err))
			continue
		}
		for _, j := range planCopies(view, most) {
			if c.copies.begin(&j) {
				jobs.Go(func() { c.carryCopy(ctx, j) })
			}
		}
	}
}

func (c *Control) copyView(ctx context.Context, now time.Time) (*copyView, error) {
	templates, err := c.templates.Templates(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the templates: %w", err)
	}
	v := &copyView{
		now: now, paused: c.index.pausedBoxes(), records: c.noted.allReplicas(), templates: templates, limits: c.limits,
		popular: make(map[string]bool), bereft: c.noted.isBereft,
	}
	p := c.copies
	p.mu.Lock()
	defer p.mu.Unlock()
	for build, u := range p.uses {
		if now.Sub(u.at) < popularFor {
			v.popular[build] = true
		}
	}
	skip := make(map[string]struct{}, len(p.active)+len(p.failed))
	maps.Copy(skip, p.active)
	for key, at := range p.failed {
		if now.Sub(at) < copyBackoff {
			skip[key] = struct{}{}
		}
	}
	v.stored, v.writing = c.noted.storedFor(c.started, now), maps.Clone(p.writing)
	v.skip = func(key string) bool { _, ok := skip[key]; return ok }
	v.nodes = c.fleet.copyViews(now)
	for i := range v.nodes {
		n := &v.nodes[i]
		n.replicas = maps.Clone(p.replicas[n.id])
		n.joined = now.Sub(p.joined[n.id]) < joinedFor
	}
	return v, nil
}

// copyViews returns the nodes as the plan of copies sees them. Locks: copies.mu is held by the caller.
func (f *fleet) copyViews(now time.Time) []nodeView {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]nodeView, 0, len(f.views))
	for i := range f.views {
		view := &f.views[i]
		m := f.members[view.ID]
		out = append(out, nodeView{
			id: view.ID, machine: m.machine, ready: m.state == sandbox.NodeReady, open: !m.settings.Cordoned,
			givenUp: f.givenUp(m, now),
			has:     view.Images, load: m.load.UsedDisk + float64(m.load.Sandboxes)/(1+float64(m.load.Sandboxes)),
		})
	}
	return out
}

func (c *Control) carryCopy(ctx context.Context, j job) {
	work, cancel := context.WithTimeout(ctx, copyDeadline)
	defer cancel()
	var err error
	switch j.kind {
	case jobRecover:
		err = c.recoverBox(work, j.replica, j.node)
	case jobFinish:
		err = c.finishRecovery(work, j.replica)
	case jobUnrecord:
		err = c.unrecord(work, j.replica)
	case jobGuard:
		err = c.copyPaused(work, j)
	case jobSpread:
		err = c.copyBuild(work, j)
	case jobUnstore:
		err = c.unstore(work, j.node, j.checkpoint)
	case jobForget:
		err = c.forgetReplica(work, j.node, j.checkpoint)
	}
	c.copies.end(&j, err, time.Now())
	if err != nil && ctx.Err() == nil && !errors.Is(err, sandbox.ErrConflict) {
		c.log.LogAttrs(ctx, slog.LevelWarn, "copy not made, trying again later", slog.String("op", string(j.kind)), nodeAttr(j.node), errAttr(err))
	}
}

// unrecord removes a record whose sandbox its node does not have paused any more.
func (c *Control) unrecord(ctx context.Context, r sandbox.Replica) error {
	release, ok := c.busy.try(r.ID)
	if !ok {
		return nil
	}
	defer release()
	if box, ok := c.index.get(r.ID); ok && !box.State.Ended() && box.Generation <= r.Generation {
		return nil // it was looked at in between
	} else if !ok && !c.reported(r.Home) {
		return nil // the node has not said yet what it has
	}
	return c.unguard(ctx, r.ID)
}

// reported reports whether a node has told this server everything since it registered here.
func (c *Control) reported(node sandbox.NodeID) bool {
	c.fleet.mu.Lock()
	defer c.fleet.mu.Unlock()
	m := c.fleet.members[node]
	return m != nil && m.told
}

// copyPaused copies what a sandbox is paused in to a node or, without one, to the bucket, and records that.
func (c *Control) copyPaused(ctx context.Context, j job) error {
	r := sandbox.Replica{
		ID: j.box.ID, Home: j.box.NodeID, Generation: j.box.Generation, Checkpoint: j.box.Checkpoint, ImageDigest: j.box.ImageDigest,
		TemplateID: j.box.TemplateID, Holders: slices.Clone(j.replica.Holders), Bucket: j.replica.Bucket, At: time.Now().UTC(),
		MadeOn: j.replica.MadeOn,
	}
	if r.MadeOn == nil { // what the node is later, it may have become since
		r.MadeOn = madeOn(&j.box, c.fleet.machine(r.Home))
	}
	if j.node == "" {
		agent, err := c.agent(r.Home)
		if err == nil {
			err = c.putStored(ctx, r.Checkpoint)
		}
		if err != nil {
			return err
		}
		if _, err := agent.Store(ctx, &agentv1.StoreRequest{CheckpointId: r.Checkpoint}); err != nil {
			return fmt.Errorf("node %s: store %s: %w", r.Home, r.Checkpoint, fromNode(r.Home, err))
		}
		r.Bucket = true
		return c.guard(ctx, r)
	}
	if err := c.fetch(ctx, j.node, &agentv1.FetchRequest{ImageDigest: r.ImageDigest, TemplateId: string(r.TemplateID)}); err != nil {
		return err
	}
	err := c.fetch(ctx, j.node, &agentv1.FetchRequest{
		CheckpointId: r.Checkpoint, Peers: []*agentv1.Peer{c.fleet.peer(r.Home)}, Replica: true,
	})
	if err != nil {
		return err
	}
	c.copies.keep(j.node, r.Checkpoint, time.Now())
	if !slices.Contains(r.Holders, j.node) {
		r.Holders = append(r.Holders, j.node)
	}
	return c.guard(ctx, r)
}

// copyBuild has a node get what sandboxes of a build start from.
func (c *Control) copyBuild(ctx context.Context, j job) error {
	req := &agentv1.FetchRequest{ImageDigest: j.build.ImageDigest, TemplateId: string(j.template)}
	if j.warm && j.build.Checkpoint == "" {
		req.Warm = resourcesToWire(orElse(j.build.Resources, c.limits.DefaultResources))
	}
	if err := c.fetch(ctx, j.node, req); err != nil {
		return err
	}
	if j.build.Checkpoint == "" {
		return nil
	}
	return c.fetch(ctx, j.node, &agentv1.FetchRequest{CheckpointId: j.build.ID})
}

// forgetReplica has a node drop a checkpoint that it kept for another.
func (c *Control) forgetReplica(ctx context.Context, node sandbox.NodeID, checkpoint string) error {
	agent, err := c.agent(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	if _, err := agent.Forget(ctx, &agentv1.ForgetRequest{Replica: checkpoint}); err != nil {
		return fmt.Errorf("node %s: drop replica %s: %w", node, checkpoint, fromNode(node, err))
	}
	c.copies.drop(node, checkpoint)
	return nil
}

// unstore has a node remove a checkpoint from the bucket.
func (c *Control) unstore(ctx context.Context, node sandbox.NodeID, checkpoint string) error {
	agent, err := c.agent(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	_, err = agent.RemoveCheckpoint(ctx, &agentv1.RemoveCheckpointRequest{CheckpointId: checkpoint, Bucket: true})
	if err = fromNode(node, err); err != nil {
		return fmt.Errorf("node %s: remove %s from the bucket: %w", node, checkpoint, err)
	}
	return c.deleteStored(ctx, checkpoint)
}
