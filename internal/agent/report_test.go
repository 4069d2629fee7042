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

// TestLocalServer has a second server that is told the same, whether the first is there or not, and that decides nothing.
func TestLocalServer(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		var kept []byte
		m.remember = func(s []byte) error { kept = s; return nil }
		n := m.boot()
		n.down()
		if string(kept) != string(m.server.secret) {
			t.Fatalf("secret kept: %q", kept)
		}
		m.cfg.TokenSecret = kept
		m.remember = func([]byte) error { t.Error("remembered though it is known"); return nil }
		m.local = &fakeServer{secret: []byte("of the local server, nobody's")}
		m.server.mu.Lock()
		m.server.refuse = errTest
		m.server.mu.Unlock()

		n = m.boot()
		id := n.create() // no server was reached in this life
		if got := m.init(id).AccessToken; got != sandbox.AccessToken(kept, id) {
			t.Errorf("token: %q", got)
		}
		synctest.Wait()
		if got := m.local.types(id); got != "created started" {
			t.Errorf("told the local server: %q", got)
		}
		if l := n.jour.Ledger(); l.Acknowledged != 0 || l.Sequence != 2 {
			t.Errorf("the local server's word counts: %+v", l)
		}
		m.server.mu.Lock()
		m.server.refuse = nil
		m.server.mu.Unlock()
		pass(10 * time.Second)
		if got := m.server.types(id); got != "created started" {
			t.Errorf("told the server: %q", got)
		}
		m.local.restart(true)
		m.check(n.kill(id))
		pass(10 * time.Second)
		if l := n.jour.Ledger(); l.Acknowledged != l.Sequence {
			t.Errorf("ledger: %+v", l)
		}
		if a, b := m.server.types(id), m.local.types(id); a != "created started killed" || b != a {
			t.Errorf("told: %q, %q", a, b)
		}
		if got := string(*n.secret.Load()); got != string(kept) {
			t.Errorf("secret: %q", got)
		}
	})
}

func TestRegistration(t *testing.T) {
	bubble(t, func(m *machine) {
		m.cfg.Address, m.cfg.Labels, m.cfg.CPUFeatures = "10.0.0.1:3004", map[string]string{"zone": "a"}, []string{"sse2"}
		n := m.boot()
		synctest.Wait()
		r := m.server.registered
		if r.GetAddress() != "10.0.0.1:3004" || r.GetLabels()["zone"] != "a" || len(r.GetCpuFeatures()) != 1 || r.GetMachine().GetMilliCpu() == 0 {
			m.t.Errorf("registered: %v", r)
		}
		if l := m.server.lastLoad(); l.GetUsedMemory() <= 0 || l.GetUsedMemory() >= 1 {
			m.t.Errorf("load: %v", l)
		}
		n.down()
	})
}

func TestCordonedNodesKeepNothingWarm(t *testing.T) {
	bubble(t, func(m *machine) {
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 4
		n := m.boot()
		n.create()
		pass(10 * time.Second)
		warm := func() int { return n.jour.Ledger().Warm.Sandboxes }
		if warm() == 0 {
			m.t.Error("nothing is warm")
		}
		m.server.cordon(true)
		pass(10 * time.Second)
		if got := warm(); got != 0 {
			m.t.Errorf("%d are warm on a cordoned node", got)
		}
		m.server.cordon(false)
		pass(10 * time.Second)
		n.create()
		pass(10 * time.Second)
		if warm() == 0 {
			m.t.Error("nothing is warm again")
		}
	})
}
