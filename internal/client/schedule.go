package client

import (
	"context"
	"net/http"
)

// SchedulerPolicy is the body of PUT /v1/scheduler. What is left out gets its default.
type SchedulerPolicy struct {
	// Strategy is "spread", "binpack", "round_robin" or "sticky".
	Strategy string `json:"strategy,omitempty"`
	// Sample is how many fitting nodes are compared.
	Sample int `json:"sample,omitempty"`
	// PrioritySelectNum is among how many of the best nodes the first is drawn, LeastSelectName how: "random" or "weighted".
	PrioritySelectNum int    `json:"priority_select_num,omitempty"`
	LeastSelectName   string `json:"least_select_name,omitempty"`
	// MaxCreating is how many creations a node may have under way.
	MaxCreating int `json:"max_creating,omitempty"`
	// MaxFailures is from how many recent failures on a node is asked last, FailureHalfLifeSeconds after what time one
	// counts half.
	MaxFailures            float64          `json:"max_failures,omitempty"`
	FailureHalfLifeSeconds int64            `json:"failure_half_life_seconds,omitempty"`
	Overcommit             SchedulerFactors `json:"overcommit,omitzero"`
	// Reserved is what is left free on each node.
	Reserved Resources `json:"reserved,omitzero"`
	// Weights are the defaults where all are 0.
	Weights SchedulerWeights `json:"weights,omitzero"`
}

// SchedulerFactors multiply the parts of a capacity.
type SchedulerFactors struct {
	CPU    float64 `json:"cpu,omitempty"`
	Memory float64 `json:"memory,omitempty"`
	Disk   float64 `json:"disk,omitempty"`
}

// SchedulerWeights say how much each part of a node's score counts.
type SchedulerWeights struct {
	Load       float64 `json:"load"`
	Warm       float64 `json:"warm"`
	Creating   float64 `json:"creating"`
	Sandboxes  float64 `json:"sandboxes"`
	UsedCPU    float64 `json:"used_cpu"`
	UsedMemory float64 `json:"used_memory"`
	Image      float64 `json:"image"`
	Affinity   float64 `json:"affinity"`
}

// Scheduler is GET /v1/scheduler.
type Scheduler struct {
	// Source is "settings" or "api".
	Source string          `json:"source"`
	Policy SchedulerPolicy `json:"policy"`
}

// ExplainSchedule is the body of POST /v1/schedule/explain: a sandbox that is asked about and not created.
type ExplainSchedule struct {
	Template  string    `json:"template,omitempty"` // default "base"
	Resources Resources `json:"resources,omitzero"`
	// Metadata is that of the create; its keys that begin with cloister.dev/ say where it may go.
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Schedule answers it.
type Schedule struct {
	Template  string    `json:"template"`
	Resources Resources `json:"resources"`
	Strategy  string    `json:"strategy"`
	// Sample is how many of the accepted nodes a create compares.
	Sample int `json:"sample"`
	// Fits is how many such sandboxes there is room for in all.
	Fits int64 `json:"fits"`
	// Nodes are all nodes: the accepted ones first, best first.
	Nodes []ScheduledNode `json:"nodes"`
}

// ScheduledNode is what the scheduler found about one node.
type ScheduledNode struct {
	ID       string  `json:"id"`
	Name     string  `json:"name"`
	Accepted bool    `json:"accepted"`
	Reason   string  `json:"reason"`
	Score    float64 `json:"score"`
	// Free is what is free there, Limit what there is, Fits how many such sandboxes that is.
	Free  Resources `json:"free"`
	Limit Resources `json:"limit"`
	Fits  int64     `json:"fits"`
}

const schedulerPath = "/v1/scheduler"

// Scheduler returns the scheduling policy in force.
func (c *Client) Scheduler(ctx context.Context) (Scheduler, error) {
	return get[Scheduler](ctx, c, schedulerPath)
}

// SetScheduler puts a scheduling policy in force and stores it.
func (c *Client) SetScheduler(ctx context.Context, p SchedulerPolicy) (Scheduler, error) {
	var out Scheduler
	_, err := c.call(ctx, http.MethodPut, schedulerPath, p, &out)
	return out, err
}

// ResetScheduler goes back to the policy of the daemon's settings.
func (c *Client) ResetScheduler(ctx context.Context) (Scheduler, error) {
	var out Scheduler
	_, err := c.call(ctx, http.MethodDelete, schedulerPath, nil, &out)
	return out, err
}

// ExplainSchedule says where a sandbox could go, without creating it.
func (c *Client) ExplainSchedule(ctx context.Context, e ExplainSchedule) (Schedule, error) {
	var out Schedule
	_, err := c.call(ctx, http.MethodPost, "/v1/schedule/explain", e, &out)
	return out, err
}
