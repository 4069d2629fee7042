package agent

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestHeartbeat(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		synctest.Wait()
		m.server.mu.Lock()
		first := len(m.server.reports)
		m.server.mu.Unlock()
		pass(51 * time.Second)
		m.server.mu.Lock()
		defer m.server.mu.Unlock()
		if got := len(m.server.reports) - first; got != 10 {
			t.Errorf("%d reports in 51 s, want 10", got)
		}
		if r := m.server.reports[len(m.server.reports)-1]; r.GetNodeId() != string(n.NodeID()) || r.GetLoad().GetCapacity() == nil || r.GetFull() {
			t.Errorf("report: %v", r)
		}
	})
}

func TestServerAway(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.server.refuse = errTest
		n := m.load()
		if err := n.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		go func() {
			pause(t.Context(), 10*time.Second)
			m.server.mu.Lock()
			defer m.server.mu.Unlock()
			m.server.refuse = nil
		}()
		n.run() // waits for the registration
		id := n.create()
		synctest.Wait()

		m.server.mu.Lock()
		m.server.before = func(*nodev1.ReportRequest) error { return errTest }
		m.server.mu.Unlock()
		if err := n.kill(id); err != nil {
			t.Fatal(err)
		}
		other := n.create()
		pass(time.Minute)
		if got := m.server.types(id); got != "created started" {
			t.Errorf("reported: %q", got)
		}
		m.server.mu.Lock()
		m.server.before = nil
		m.server.mu.Unlock()
		pass(6 * time.Second)
		if got := m.server.types(id); got != "created started killed" {
			t.Errorf("reported: %q", got)
		}
		if got := m.server.state(other); got != agentv1.State_STATE_RUNNING {
			t.Errorf("the server thinks that it is %v", got)
		}
		if l := n.jour.Ledger(); l.Acknowledged != l.Sequence {
			t.Errorf("ledger: %+v", l)
		}
	})
}

func TestLostAcknowledgements(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		m.server.mu.Lock()
		lost := 0
		m.server.after = func(*nodev1.ReportRequest) error {
			if lost++; lost%2 == 0 {
				return errTest // it was taken, and the node does not learn of it
			}
			return nil
		}
		m.server.mu.Unlock()
		var ids []sandbox.ID
		for range 20 {
			ids = append(ids, n.create())
			pass(30 * time.Millisecond)
		}
		pass(time.Minute)
		for _, id := range ids {
			if got := m.server.types(id); got != "created started" {
				t.Errorf("reported: %q", got)
			}
		}
	})
}

func TestNewEpochs(t *testing.T) {
	for _, forget := range []bool{false, true} {
		bubble(t, func(m *machine) {
			t := m.t
			n := m.boot()
			lives, killed := n.create(), n.create()
			pass(time.Second)
			m.server.restart(forget)
			if err := n.kill(killed); err != nil {
				t.Fatal(err)
			}
			pass(10 * time.Second)
			if got := m.server.state(lives); got != agentv1.State_STATE_RUNNING {
				t.Errorf("forget %v: the server thinks that it is %v", forget, got)
			}
			if got := m.server.types(killed); got != "created started killed" {
				t.Errorf("forget %v: reported %q", forget, got)
			}
			m.server.mu.Lock()
			full := 0
			for _, r := range m.server.reports {
				if r.GetFull() {
					full++
				}
			}
			m.server.mu.Unlock()
			if want := map[bool]int{false: 1, true: 2}[forget]; full != want {
				t.Errorf("forget %v: %d full reports, want %d", forget, full, want)
			}
			pass(time.Minute)
			if l := n.jour.Ledger(); l.Acknowledged != l.Sequence {
				t.Errorf("ledger: %+v", l)
			}
		})
	}
}

// TestFullReportKeepsHistory lets both sides restart while changes are not acknowledged.
func TestFullReportKeepsHistory(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		pass(time.Second)
		m.server.mu.Lock()
		m.server.before = func(*nodev1.ReportRequest) error { return errTest }
		m.server.mu.Unlock()
		id := n.create()
		pass(time.Second)
		n.down()
		m.server.mu.Lock()
		m.server.before = nil
		m.server.mu.Unlock()
		m.server.restart(true)
		m.boot()
		pass(time.Second)
		if got := m.server.types(id); got != "created started adopted" {
			t.Errorf("reported: %q", got)
		}
	})
}

func TestOutboxOverflow(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.opt.MaxChanges = 4
		n := m.boot()
		pass(time.Second)
		m.server.mu.Lock()
		m.server.before = func(*nodev1.ReportRequest) error { return errTest }
		m.server.mu.Unlock()
		var ids []sandbox.ID
		for range 5 {
			ids = append(ids, n.create())
		}
		pass(time.Second)
		m.server.mu.Lock()
		m.server.before = nil
		m.server.mu.Unlock()
		pass(10 * time.Second)
		for _, id := range ids {
			if got := m.server.types(id); !strings.HasSuffix(got, "started") {
				t.Errorf("reported: %q", got)
			}
		}
	})
}
