package agent

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestMoveKilledAnywhere ends one of the two nodes' processes before and after each step of a move. What a server then does by
// its placement alone leaves one copy that runs, and nothing of the other.
func TestMoveKilledAnywhere(t *testing.T) {
	for _, source := range []bool{true, false} {
		for _, after := range []bool{false, true} {
			for at := 0; ; at++ {
				more := false
				bubbles(t, func(m, other *machine) { more = killedMove(m, other, &crash{at: at, after: after}, source) })
				if !more {
					break
				}
			}
		}
	}
}

// killedMove carries a move out in which one of the nodes ends at a step, and reports whether there was such a step.
func killedMove(m, other *machine, c *crash, source bool) bool {
	t := m.t
	victim := other
	if source {
		victim = m
	}
	victim.crashes(c)
	n, to := m.boot(), other.boot()
	c.journal = func() { _ = n.jour.Close() }
	if !source {
		c.journal = func() { _ = to.jour.Close() }
	}
	id := n.create()
	m.put(id, "mem", "disk")
	synctest.Wait()
	c.arm(true)
	placed, gen := n.tryMove(to, id)
	synctest.Wait()
	reached := len(c.steps) > c.at
	c.arm(false)

	// The process that ended begins anew, and the server goes by the placement.
	if source {
		n = n.again()
	} else {
		to = to.again()
	}
	if placed {
		m.check(to.arrive(id, gen))
		m.check(n.forget(id, gen))
	} else {
		m.check(to.forget(id, gen+1))
		if n.state(id) == "migrating" {
			m.check(n.comeBack(id, gen+1))
		}
	}
	pass(time.Minute)
	n.verify()
	to.verify()
	where := map[bool]*machine{true: other, false: m}[placed]
	if got := where.holds(id); got != "mem/disk" || len(m.guests())+len(other.guests()) != 1 {
		t.Errorf("step %d of the source: %v, after it: %v, placed: %v: it holds %s; guests %v and %v", c.at, source, c.after, placed, got, m.guests(), other.guests())
	}
	return reached
}

// tryMove moves a sandbox, as far as it gets. Placed says whether the server got to note that it is at the other node.
func (n *node) tryMove(to *node, id sandbox.ID) (placed bool, gen int64) {
	p, err := n.depart(id)
	if err != nil {
		return false, 100
	}
	gen = p.GetSandbox().GetGeneration() + 1
	if to.receive(p, gen) != nil {
		return false, gen
	}
	if to.arrive(id, gen) == nil {
		_ = n.forget(id, gen) // tried again
	}
	return true, gen
}

// again ends what is left of a process and begins another.
func (n *node) again() *node {
	_ = n.jour.Close() // it may be closed
	n.down()
	n.m.crashes(&crash{at: -1})
	next := n.m.boot()
	pass(time.Minute)
	return next
}
