package v1

import (
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) getScheduler(w http.ResponseWriter, _ *http.Request) error {
	policy, source := s.control.SchedulerPolicy()
	return exchange.JSON(w, http.StatusOK, client.Scheduler{Source: source, Policy: policyToWire(policy)})
}

func (s *server) setScheduler(w http.ResponseWriter, r *http.Request) error {
	var body client.SchedulerPolicy
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	policy, err := policyFromWire(body)
	if err != nil {
		return err
	}
	if err := s.control.SetSchedulerPolicy(r.Context(), policy); err != nil {
		return err
	}
	return s.getScheduler(w, r)
}

func (s *server) resetScheduler(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.ResetSchedulerPolicy(r.Context()); err != nil {
		return err
	}
	return s.getScheduler(w, r)
}

func policyToWire(p control.SchedulerPolicy) client.SchedulerPolicy {
	return client.SchedulerPolicy{
		Strategy: string(p.Strategy), Sample: p.Sample, PrioritySelectNum: p.PrioritySelectNum,
		LeastSelectName: string(p.LeastSelectName), MaxCreating: p.MaxCreating, MaxFailures: p.MaxFailures,
		FailureHalfLifeSeconds: int64(p.FailureHalfLife / time.Second), Overcommit: client.SchedulerFactors(p.Overcommit),
		Reserved: resourcesToWire(p.Reserved), Weights: client.SchedulerWeights(p.Weights),
	}
}

func policyFromWire(w client.SchedulerPolicy) (control.SchedulerPolicy, error) {
	halfLife, err := exchange.Seconds("failure_half_life_seconds", w.FailureHalfLifeSeconds)
	p := control.SchedulerPolicy{
		Sample: w.Sample, PrioritySelectNum: w.PrioritySelectNum, MaxCreating: w.MaxCreating, MaxFailures: w.MaxFailures,
		FailureHalfLife: halfLife, Reserved: sandbox.Resources(w.Reserved),
	}
	p.Strategy, p.LeastSelectName = control.Strategy(w.Strategy), control.Selection(w.LeastSelectName)
	p.Overcommit, p.Weights = control.Overcommit(w.Overcommit), control.Weights(w.Weights)
	return p, err
}

func (s *server) explainSchedule(w http.ResponseWriter, r *http.Request) error {
	var body client.ExplainSchedule
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	found, err := s.control.ExplainSchedule(r.Context(), control.ScheduleQuery{
		Template: body.Template, Resources: sandbox.Resources(body.Resources), Metadata: body.Metadata,
	})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, client.Schedule{
		Template: found.Template, Resources: resourcesToWire(found.Resources), Strategy: string(found.Policy.Strategy),
		Sample: found.Policy.Sample, Fits: found.Fits, Nodes: each(found.Nodes, scheduledToWire),
	})
}

func scheduledToWire(n control.ScheduledNode) client.ScheduledNode {
	return client.ScheduledNode{
		ID: string(n.Node), Name: n.Name, Accepted: n.Accepted(), Reason: n.Reason(), Score: n.Score,
		Free: resourcesToWire(n.Free), Limit: resourcesToWire(n.Limit), Fits: n.Fits(),
	}
}
