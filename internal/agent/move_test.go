package agent

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// bubbles runs a test on two machines, with a clock of their own.
func bubbles(t *testing.T, f func(m, to *machine)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m, to := newMachine(t), newMachine(t)
		m.near = newWire()
		to.near = m.near
		f(m, to)
	})
}

func (n *node) depart(id sandbox.ID, change ...func(*agentv1.DepartRequest)) (*agentv1.Parcel, error) {
	req := &agentv1.DepartRequest{Id: string(id)}
	for _, f := range change {
		f(req)
	}
	resp, err := n.Depart(n.m.t.Context(), req)
	return resp.GetParcel(), err
}

func (n *node) receive(p *agentv1.Parcel, generation int64) error {
	_, err := n.Receive(n.m.t.Context(), &agentv1.ReceiveRequest{
		Parcel: p, Generation: generation, Peers: []*agentv1.Peer{{NodeId: p.GetSandbox().GetNodeId()}},
	})
	return err
}

func (n *node) arrive(id sandbox.ID, generation int64) error {
	_, err := n.Arrive(n.m.t.Context(), &agentv1.ArriveRequest{Id: string(id), Generation: generation})
	return err
}

func (n *node) comeBack(id sandbox.ID, generation int64) error {
	_, err := n.Return(n.m.t.Context(), &agentv1.ReturnRequest{Id: string(id), Generation: generation})
	return err
}

func (n *node) forget(id sandbox.ID, below int64) error {
	_, err := n.Forget(n.m.t.Context(), &agentv1.ForgetRequest{Id: string(id), Below: below})
	return err
}

// carry copies the checkpoint that a sandbox moves in, if it does, to another node, as a fetch does.
func (n *node) carry(to *node, p *agentv1.Parcel) {
	n.m.t.Helper()
	if p.GetCheckpoint() != nil {
		n.m.check(copyCheckpoint(n.saves, to.saves, p.GetCheckpoint().GetId()))
	}
}

// move takes a sandbox from one node to the other, as a server does.
func (n *node) move(to *node, id sandbox.ID) int64 {
	n.m.t.Helper()
	p, err := n.depart(id)
	n.m.check(err)
	n.carry(to, p)
	gen := p.GetSandbox().GetGeneration() + 1
	n.m.check(to.receive(p, gen))
	n.m.check(to.arrive(id, gen))
	n.m.check(n.forget(id, gen))
	return gen
}

func TestMove(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to := m.boot(), other.boot()
		id := n.create(func(r *agentv1.CreateRequest) {
			r.IdempotencyKey, r.AutoPause, r.AutoResume, r.IdleTimeout = "key", true, true, true
		})
		m.put(id, "mem", "disk")
		end := n.end(id)
		conn, err := n.DialGuest(t.Context(), id, 80)
		m.check(err)
		p, err := n.depart(id)
		m.check(err)
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("an open connection went on")
		}
		if again, err := n.depart(id); err != nil || again.GetCheckpoint() != nil || !again.GetRunning() {
			t.Errorf("departed again: %v, %v", again, err)
		}
		synctest.Wait()
		n.verify()
		if held := n.jour.Ledger().Allocated.Resources; held.MemoryBytes != small().MemoryBytes {
			t.Errorf("the room to return is not kept: %+v", held)
		}
		refusals(t, n, id)

		gen := p.GetSandbox().GetGeneration() + 1
		m.check(to.receive(p, gen))
		m.check(to.receive(p, gen)) // asked again
		to.verify()
		if !m.host.Still(id) || !other.host.Still(id) {
			t.Error("a guest does not stand still")
		}
		refusals(t, to, id)
		if got := to.jour.Ledger().Allocated; got.Sandboxes != 1 || got.Resources.MemoryBytes != small().MemoryBytes {
			t.Errorf("allocated: %+v", got)
		}
		if err := to.comeBack(id, 0); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("a received one returned: %v", err)
		}
		if err := to.arrive(id, gen-1); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("arrived with a stale generation: %v", err)
		}
		m.check(to.arrive(id, gen))
		m.check(to.arrive(id, gen)) // asked again
		m.check(n.forget(id, gen))
		m.check(n.forget(id, gen)) // asked again
		if err := to.forget(id, gen); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("the copy that counts forgotten: %v", err)
		}

		resp, err := to.Get(t.Context(), &agentv1.GetRequest{Id: string(id)})
		m.check(err)
		b := resp.GetSandbox()
		if b.GetState() != agentv1.State_STATE_RUNNING || b.GetNodeId() != string(to.NodeID()) || b.GetReceived() || b.GetCheckpointId() != "" ||
			b.GetGeneration() <= gen || !b.GetEndAt().AsTime().Equal(end) || b.GetMetadata()["who"] != "me" ||
			!b.GetAutoPause() || !b.GetAutoResume() || !b.GetIdleTimeout() || b.GetTimeout().AsDuration() != 5*time.Minute {
			t.Errorf("arrived: %v", b)
		}
		if got := other.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		if in := other.init(id); in.AccessToken != sandbox.AccessToken(other.server.secret, id) || len(in.EnvVars) != 0 {
			t.Errorf("init: %+v", in)
		}
		if again := to.create(func(r *agentv1.CreateRequest) { r.IdempotencyKey = "key" }); again != id {
			t.Errorf("its idempotency key leads to %s", again)
		}
		if _, err := n.DialGuest(t.Context(), id, 80); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("dial where it was: %v", err)
		}
		c, err := to.DialGuest(t.Context(), id, 80)
		m.check(err)
		m.check(c.Close())
		synctest.Wait()
		if got, there := m.server.types(id), other.server.types(id); got != "created started departed forgotten" || there != "received arrived" {
			t.Errorf("reported: %q, %q", got, there)
		}
		n.verify()
		to.verify()
		if l := n.jour.Ledger(); l.Allocated != (journal.Amount{}) {
			t.Errorf("something is still allocated: %+v", l.Allocated)
		}
		pass(6 * time.Minute)
		if got := to.state(id); got != "paused: idle for 5m0s" {
			t.Errorf("state at the end: %s", got)
		}
	})
}

// refusals checks that nobody but the server's move does anything with a sandbox that moves.
func refusals(tb testing.TB, n *node, id sandbox.ID) {
	tb.Helper()
	ctx := tb.Context()
	_, serr := n.SetTimeout(ctx, &agentv1.SetTimeoutRequest{Id: string(id), Timeout: durationpb.New(time.Minute)})
	_, rerr := n.resumeIt(id)
	_, cerr := n.save(id, "other", kindMemory)
	_, derr := n.DialGuest(ctx, id, 80)
	for what, err := range map[string]error{
		"kill": n.kill(id), "pause": n.pauseIt(id, kindMemory), "set timeout": serr, "resume": rerr, "snapshot": cerr, "dial": derr,
	} {
		if !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "migrating") {
			tb.Errorf("%s: %v", what, err)
		}
	}
}

func TestMoveOfAPausedOne(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to := m.boot(), other.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		m.check(n.pauseIt(id, kindMemory))
		n.move(to, id)
		if got := to.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
		if l := to.jour.Ledger(); l.Paused != 1 || l.Allocated.Sandboxes != 0 || l.Allocated.Resources.MemoryBytes != 0 {
			t.Errorf("ledger: %+v", l)
		}
		_, err := to.resumeIt(id)
		m.check(err)
		if got := other.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		n.verify()
		to.verify()
	})
}

func TestMoveThatIsGivenUp(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to := m.boot(), other.boot()
		running, paused := n.create(), n.create()
		m.put(running, "mem", "disk")
		m.check(n.pauseIt(paused, kindMemory))
		for id, want := range map[sandbox.ID]string{running: "running", paused: "paused"} {
			p, err := n.depart(id)
			m.check(err)
			n.carry(to, p)
			gen := p.GetSandbox().GetGeneration() + 1
			m.check(to.receive(p, gen))
			m.check(to.forget(id, gen+1))
			if _, err := to.Get(t.Context(), &agentv1.GetRequest{Id: string(id)}); !errors.Is(err, sandbox.ErrNotFound) {
				t.Errorf("where it was received: %v", err)
			}
			m.check(n.comeBack(id, gen+5))
			m.check(n.comeBack(id, gen+5)) // asked again
			if got := n.state(id); got != want {
				t.Errorf("state: %s, want %s", got, want)
			}
			in, _ := n.get(id)
			if got := in.record().Generation; got != gen+5 {
				t.Errorf("generation %d, want %d", got, gen+5)
			}
		}
		if got := m.holds(running); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		synctest.Wait()
		if got := m.server.types(running); got != "created started departed returned" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
		to.verify()
		if a := to.jour.Ledger().Allocated; a != (journal.Amount{}) {
			t.Errorf("something is still allocated: %+v", a)
		}
	})
}

func TestReceiveRefuses(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		other.opt.Capacity = small()
		n, to := m.boot(), other.boot()
		id := n.create()
		p, err := n.depart(id)
		m.check(err)
		gen := p.GetSandbox().GetGeneration() + 1
		if _, err := to.Receive(t.Context(), &agentv1.ReceiveRequest{Parcel: p, Generation: gen}); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("from nobody: %v", err)
		}
		p.Sandbox.Generation--
		if err := to.receive(p, gen); !errors.Is(err, sandbox.ErrConflict) || m.host.Still(id) {
			t.Errorf("of another departure: %v; it stands still: %t", err, m.host.Still(id))
		}
		p.Sandbox.Generation++
		if err := to.receive(p, gen-1); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("with a generation that it had: %v", err)
		}
		there := to.create()
		if err := to.receive(p, gen); !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("without room: %v", err)
		}
		m.check(to.kill(there))
		m.check(to.receive(p, gen))
		m.check(to.arrive(id, gen))
		if err := to.receive(p, gen+9); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("one that is here: %v", err)
		}
		if err := to.forget(id, 0); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("one that runs, forgotten without a generation: %v", err)
		}
	})
}

func TestDepartWaitsForConnections(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		grace := func(r *agentv1.DepartRequest) { r.Grace = durationpb.New(30 * time.Second) }
		polite, stubborn, killed := n.create(), n.create(), n.create()
		for id, want := range map[sandbox.ID]time.Duration{polite: 10 * time.Second, stubborn: 30 * time.Second} {
			conn, err := n.DialGuest(t.Context(), id, 80)
			m.check(err)
			go func() {
				if id == polite {
					pause(t.Context(), 10*time.Second)
					_ = conn.Close()
				}
			}()
			began := time.Now()
			_, err = n.depart(id, grace)
			m.check(err)
			if got := time.Since(began); got != want {
				t.Errorf("departed after %v, want %v", got, want)
			}
		}
		_, err := n.DialGuest(t.Context(), killed, 80)
		m.check(err)
		done := make(chan error, 1)
		go func() {
			_, err := n.depart(killed, grace)
			done <- err
		}()
		pass(time.Second)
		if _, err := n.DialGuest(t.Context(), killed, 80); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("dial of one that is about to move: %v", err)
		}
		m.check(n.kill(killed))
		if err := <-done; !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("departed though it was killed: %v", err)
		}
		n.verify()
	})
}

func TestMoveMeetsTheEnd(t *testing.T) {
	for _, auto := range []bool{false, true} {
		bubbles(t, func(m, other *machine) {
			t := m.t
			n, to := m.boot(), other.boot()
			id := n.create(func(r *agentv1.CreateRequest) { r.AutoPause = auto })
			p, err := n.depart(id)
			m.check(err)
			gen := p.GetSandbox().GetGeneration() + 1
			m.check(to.receive(p, gen))
			pass(10 * time.Minute)
			if got, there := n.state(id), to.state(id); got != "migrating" || there != "migrating" {
				t.Errorf("states past the end: %s, %s", got, there)
			}
			synctest.Wait()
			if got := m.server.types(id); !strings.HasPrefix(got, "created started departed ") {
				t.Errorf("reported: %q", got)
			}
			m.check(to.arrive(id, gen))
			want := "deleted: timeout"
			if auto {
				want = "paused"
			}
			if got := to.state(id); got != want {
				t.Errorf("arrived after its end: %s, want %s", got, want)
			}
			to.verify()
		})
	}
}

func TestMigratingSurvives(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to := m.boot(), other.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		p, err := n.depart(id)
		m.check(err)
		gen := p.GetSandbox().GetGeneration() + 1
		m.check(to.receive(p, gen))
		n.down()
		to.down()
		n, to = m.boot(), other.boot()
		pass(time.Minute)
		for _, x := range []*node{n, to} {
			if got := x.state(id); got != "migrating" {
				t.Errorf("after a restart: %s", got)
			}
			x.verify()
		}
		m.check(to.arrive(id, gen))
		m.check(n.forget(id, gen))
		if got := other.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		n.verify()
		to.verify()
	})
}

func TestWhatDoesNotMove(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		if _, err := n.depart(sandbox.NewID(n.NodeID())); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("unknown: %v", err)
		}
		in, err := n.admitBuild(t.Context(), "b-1", digestOf("one"), small())
		m.check(err)
		if _, err := n.depart(in.id); !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), "build b-1") {
			t.Errorf("a build's: %v", err)
		}
		n.abandon(t.Context(), in)
		id := n.create()
		m.host.OnSave(nil)
		if _, err := n.depart(id, func(r *agentv1.DepartRequest) { r.Grace = durationpb.New(-1) }); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("negative grace: %v", err)
		}
		if got := n.state(id); got != "running" {
			t.Errorf("state: %s", got)
		}
		n.verify()
	})
}

func TestGuard(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		guard := func(generation int64, on bool) error {
			_, err := n.Guard(t.Context(), &agentv1.GuardRequest{Id: string(id), Generation: generation, Guarded: on})
			return err
		}
		in, _ := n.get(id)
		if err := guard(in.record().Generation, true); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("one that runs guarded: %v", err)
		}
		_, err := n.save(id, "snap", kindMemory)
		m.check(err)
		m.check(n.pauseIt(id, kindMemory))
		gen := in.record().Generation
		if err := guard(gen-1, true); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("another generation guarded: %v", err)
		}
		m.check(guard(gen, true))
		n.down()
		n = m.boot()
		if _, err := n.resumeIt(id); !errors.Is(err, sandbox.ErrUnavailable) || !strings.Contains(err.Error(), "copies on other nodes") {
			t.Errorf("resumed without a permit: %v", err)
		}
		if err := n.rewind(id, "snap"); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("rolled back without a permit: %v", err)
		}
		_, err = n.resumeIt(id, func(r *agentv1.ResumeRequest) { r.Permitted = true })
		m.check(err)
		m.check(n.pauseIt(id, kindMemory))
		_, err = n.resumeIt(id) // the guard was of the pause before
		m.check(err)
	})
}
