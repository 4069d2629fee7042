package control

import (
	"context"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// ScheduleQuery is a sandbox that is asked about and not created.
type ScheduleQuery struct {
	// Template is a name or an id; "base" where it is empty.
	Template string
	// Resources replace the template's where a part is not 0.
	Resources sandbox.Resources
	// Metadata is that of the create: the keys of this package say where it may go.
	Metadata map[string]string
}

// Schedule says where a sandbox could go.
type Schedule struct {
	Template  string
	Resources sandbox.Resources
	Policy    scheduler.Policy
	// Nodes are all nodes, those that would be asked first, best first.
	Nodes []ScheduledNode
	// Fits is how many such sandboxes the nodes that can take it have room for.
	Fits int64
}

// ScheduledNode is what the scheduler found about one node.
type ScheduledNode struct {
	scheduler.Verdict
	Name string
}

// ExplainSchedule judges every node for a sandbox, without creating it and without a sample. A create compares a random
// sample of the nodes that are accepted here.
// Errors: those of Create for what cannot be, but not for a lack of room, which is the answer.
func (c *Control) ExplainSchedule(ctx context.Context, q ScheduleQuery) (Schedule, error) {
	req := CreateRequest{Template: q.Template, Resources: q.Resources, Metadata: q.Metadata, Timeout: time.Minute}
	if err := c.admit(&req); err != nil {
		return Schedule{}, err
	}
	template, build, err := c.resolveBuild(ctx, req.Template)
	if err != nil {
		return Schedule{}, err
	}
	msg, err := c.createMessage(template, build, req)
	if err != nil {
		return Schedule{}, err
	}
	ask, err := placement(template, build, msg)
	if err != nil {
		return Schedule{}, err
	}
	s := c.fleet.explain(ask, time.Now())
	s.Template, s.Resources = msg.GetTemplateName(), ask.Resources
	return s, nil
}

func (f *fleet) explain(r scheduler.Request, now time.Time) Schedule {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.prepare(&r, now)
	d := scheduler.Explain(scheduler.Snapshot{Nodes: f.views, Policy: f.policy}, r)
	s := Schedule{Policy: f.policy.WithDefaults(), Nodes: make([]ScheduledNode, 0, len(d.Verdicts))}
	for _, v := range d.Verdicts {
		s.Nodes = append(s.Nodes, ScheduledNode{Verdict: v, Name: f.members[v.Node].record.Name})
		if v.Refusal == scheduler.Accepted {
			s.Fits += v.Fits()
		}
	}
	return s
}

// Accepted reports whether the node can take the sandbox.
func (n ScheduledNode) Accepted() bool { return n.Refusal == scheduler.Accepted }
