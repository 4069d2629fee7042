package control

import (
	"context"
	"fmt"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// About is what the server says of itself.
type About struct {
	Version  string
	APIURL   string
	ProxyURL string
	// Ready reports whether the whole process serves; nil leaves that to the nodes.
	Ready func() bool
	// Member says what this machine is, where it joined a cluster; nil where it is a server.
	Member func() Membership
}

// Membership is what a machine is that joined a cluster.
type Membership struct {
	sandbox.Member
	Name      string
	ClusterID string
	// Servers are HOST:PORT of each; Connected means that one of them is reached now.
	Servers   []string
	Connected bool
	// ExpiresAt is the end of the machine's certificate, unless it is renewed.
	ExpiresAt time.Time
}

// Status is the cluster at one glance.
type Status struct {
	About
	StartedAt time.Time
	// Ready means that a sandbox can be created now, but for room.
	Ready     bool
	Nodes     map[sandbox.NodeState]int
	Sandboxes map[sandbox.State]int
	Templates int
	Capacity  sandbox.Resources
	Allocated sandbox.Resources
}

// Status counts what there is.
func (c *Control) Status(ctx context.Context) (Status, error) {
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return Status{}, fmt.Errorf("count templates: %w", err)
	}
	s := Status{
		About: c.about, StartedAt: c.started, Templates: len(all),
		Nodes: make(map[sandbox.NodeState]int), Sandboxes: make(map[sandbox.State]int),
	}
	for state, n := range c.index.states() {
		if n > 0 {
			s.Sandboxes[state] = n
		}
	}
	for _, n := range c.fleet.list(time.Now()) {
		s.Nodes[n.State]++
		if n.State != sandbox.NodeDown {
			s.Capacity, s.Allocated = s.Capacity.Add(n.Capacity), s.Allocated.Add(n.Allocated)
		}
	}
	s.Ready = s.Nodes[sandbox.NodeReady] > 0 && (c.about.Ready == nil || c.about.Ready())
	return s, nil
}
