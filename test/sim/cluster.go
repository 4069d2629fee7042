package sim

import (
	"math/rand/v2"
	"slices"
	"strconv"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// Image is the image that every node has.
const Image = "sha256:base"

// Small is the sandbox that the runs place: 100 millicores, 64 MiB of memory, 256 MiB of disk.
func Small() sandbox.Resources {
	return sandbox.Resources{MilliCPU: 100, MemoryBytes: 64 << 20, DiskBytes: 256 << 20}
}

// Cluster is nodes, which hold the truth, and servers, which hold what they were last told.
type Cluster struct {
	nodes   []scheduler.Node
	servers []*server
	// Refused counts the placements that a node did not admit, and for which the next candidate was asked.
	Refused int
	next    int
}

// server decides by its own view: the nodes as of the last Tell, and what it placed itself since.
type server struct {
	views  scheduler.Snapshot
	random *rand.PCG
	// next is where round_robin goes on.
	next int
}

// New returns a cluster of empty nodes, each with room for perNode sandboxes, and of servers that know them.
func New(nodes, perNode, servers int, policy scheduler.Policy) *Cluster {
	c := &Cluster{nodes: make([]scheduler.Node, nodes)}
	images := map[string]struct{}{Image: {}}
	room := sandbox.Resources{}
	for range perNode {
		room = room.Add(Small())
	}
	for i := range c.nodes {
		c.nodes[i] = scheduler.Node{
			ID: sandbox.NodeID(strconv.Itoa(i)), State: sandbox.NodeReady, Engines: []string{"gvisor"}, Images: images, Capacity: room,
			Labels: map[string]string{"zone": strconv.Itoa(i % 3)},
		}
	}
	for i := range servers {
		c.servers = append(c.servers, &server{
			views:  scheduler.Snapshot{Nodes: slices.Clone(c.nodes), Policy: policy},
			random: rand.NewPCG(uint64(i), 1),
			next:   i * nodes / servers,
		})
	}
	return c
}

// Tell has every server know what the nodes have.
func (c *Cluster) Tell() {
	for _, s := range c.servers {
		copy(s.views.Nodes, c.nodes)
	}
}

// Place has the servers, one after the other, place one sandbox, and reports whether a node admitted it.
func (c *Cluster) Place() bool {
	s := c.servers[c.next%len(c.servers)]
	c.next++
	return c.place(s)
}

func (c *Cluster) place(s *server) bool {
	d := scheduler.Place(s.views, scheduler.Request{Resources: Small(), Engine: "gvisor", Image: Image, Random: s.random, Start: s.next})
	s.next = d.Next
	for _, id := range d.Candidates {
		i, err := strconv.Atoi(string(id))
		if err != nil {
			return false
		}
		ok := c.admit(i)
		s.learn(i, &c.nodes[i], ok)
		if ok {
			return true
		}
		c.Refused++
	}
	return false
}

// admit is the node's own decision: it takes what it has room for.
func (c *Cluster) admit(i int) bool {
	n := &c.nodes[i]
	if !Small().Fits(n.Capacity.Sub(n.Allocated)) {
		return false
	}
	n.Allocated = n.Allocated.Add(Small())
	n.Sandboxes++
	return true
}

// learn takes what an answer says: a refusal carries the node's load, an acceptance adds to what the server knew.
func (s *server) learn(i int, truth *scheduler.Node, took bool) {
	v := &s.views.Nodes[i]
	if !took {
		v.Allocated, v.Sandboxes = truth.Allocated, truth.Sandboxes
		return
	}
	v.Allocated = v.Allocated.Add(Small())
	v.Sandboxes++
}

// Spread returns the fewest and the most sandboxes of a node, and how many there are.
func (c *Cluster) Spread() (fewest, most, all int) {
	fewest = c.nodes[0].Sandboxes
	for i := range c.nodes {
		n := c.nodes[i].Sandboxes
		fewest, most, all = min(fewest, n), max(most, n), all+n
	}
	return fewest, most, all
}

// Overcommitted returns how many nodes have more than their capacity.
func (c *Cluster) Overcommitted() int {
	over := 0
	for i := range c.nodes {
		if !c.nodes[i].Allocated.Fits(c.nodes[i].Capacity) {
			over++
		}
	}
	return over
}
