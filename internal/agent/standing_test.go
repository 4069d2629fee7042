package agent

import (
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestArriveThatFails leaves nothing where it was to arrive, so that the sandbox can go on where it was.
func TestArriveThatFails(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to := m.boot(), other.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		p, err := n.depart(id)
		m.check(err)
		gen := p.GetSandbox().GetGeneration() + 1
		m.check(to.receive(p, gen))
		other.onGuest(func(sandbox.ID, *http.Request) (int, string) { return http.StatusInternalServerError, "no" })
		if err := to.arrive(id, gen); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("arrived: %v", err)
		}
		if err := to.arrive(id, gen); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("arrived again: %v", err)
		}
		synctest.Wait()
		to.verify()
		m.check(n.comeBack(id, gen+1))
		if got := m.holds(id); got != "mem/disk" || n.state(id) != "running" || len(other.guests()) != 0 {
			t.Errorf("it holds %s and is %s; guests elsewhere: %v", got, n.state(id), other.guests())
		}
		if got := other.server.types(id); got != "received forgotten" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
	})
}

// TestArriveAsPaused saves the guest that came.
func TestArriveAsPaused(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		n, to := m.boot(), other.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		p, err := n.depart(id)
		m.check(err)
		gen := p.GetSandbox().GetGeneration() + 1
		m.check(to.receive(p, gen))
		_, err = to.Arrive(m.t.Context(), &agentv1.ArriveRequest{Id: string(id), Generation: gen, Paused: true})
		m.check(err)
		m.check(n.forget(id, gen))
		if got := to.state(id); got != "paused" || len(other.guests()) != 0 {
			m.t.Errorf("state: %s, guests: %v", got, other.guests())
		}
		to.verify()
		_, err = to.resumeIt(id)
		m.check(err)
		if got := other.holds(id); got != "mem/disk" {
			m.t.Errorf("it holds %s", got)
		}
	})
}

// TestReturnWithoutAGuest has a sandbox lost whose guest ended while it moved.
func TestReturnWithoutAGuest(t *testing.T) {
	bubble(t, func(m *machine) {
		n := m.boot()
		id := n.create()
		_, err := n.depart(id)
		m.check(err)
		m.check(m.host.Crash(id))
		synctest.Wait()
		m.check(n.comeBack(id, 0))
		if got := n.state(id); !strings.HasPrefix(got, "lost: ") {
			m.t.Errorf("state: %s", got)
		}
		n.verify()
	})
}

// TestGuestEndsWhileItMoves has it end on one side of a move, which goes on with the other.
func TestGuestEndsWhileItMoves(t *testing.T) {
	for _, source := range []bool{true, false} {
		bubbles(t, func(m, other *machine) {
			t := m.t
			n, to := m.boot(), other.boot()
			id := n.create()
			m.put(id, "mem", "disk")
			p, err := n.depart(id)
			m.check(err)
			gen := p.GetSandbox().GetGeneration() + 1
			m.check(to.receive(p, gen))
			if source {
				m.check(m.host.Crash(id))
				synctest.Wait()
				if got := n.state(id); got != "migrating" {
					t.Errorf("state: %s", got)
				}
				m.check(to.arrive(id, gen))
				m.check(n.forget(id, gen))
			} else {
				m.check(other.host.Crash(id))
				synctest.Wait()
				if err := to.arrive(id, gen); !errors.Is(err, sandbox.ErrNotFound) {
					t.Errorf("arrived: %v", err)
				}
				m.check(n.comeBack(id, gen+1))
			}
			where := map[bool]*machine{true: other, false: m}[source]
			if got := where.holds(id); got != "mem/disk" {
				t.Errorf("it holds %s", got)
			}
			n.verify()
			to.verify()
		})
	}
}

// TestMoveBreaksOff loses the connection while the guest comes.
func TestMoveBreaksOff(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to := m.boot(), other.boot()
		id := n.create()
		m.put(id, strings.Repeat("mem", 1<<20), "disk")
		p, err := n.depart(id)
		m.check(err)
		gen := p.GetSandbox().GetGeneration() + 1
		m.near.spoil = func(c net.Conn) net.Conn { return &breaking{Conn: c, left: 1 << 20} }
		if err := to.receive(p, gen); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("received: %v", err)
		}
		m.near.spoil = nil
		synctest.Wait()
		to.verify()
		n.verify()
		m.check(to.receive(p, gen+1))
		m.check(to.arrive(id, gen+1))
		m.check(n.forget(id, gen+1))
		if got := other.holds(id); !strings.HasSuffix(got, "mem/disk") {
			t.Errorf("it holds %.20s", got)
		}
		n.verify()
		to.verify()
	})
}
