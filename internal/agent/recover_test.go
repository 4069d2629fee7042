package agent

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/fake"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

func TestRestart(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 2
		n := m.boot()
		lives, dies, expires := n.create(), n.create(), n.create(func(r *agentv1.CreateRequest) { r.Timeout = durationpb.New(time.Minute) })
		ended := n.create()
		if err := n.kill(ended); err != nil {
			t.Fatal(err)
		}
		n.eventually("the pool is filled", func() bool { ready, filling := n.warmCount(); return ready == 2 && filling == 0 })
		n.down()
		if err := m.host.Crash(dies); err != nil {
			t.Fatal(err)
		}
		pass(time.Hour)

		began := time.Now()
		n = m.boot()
		synctest.Wait()
		if took := time.Since(began); took > time.Second {
			t.Errorf("recovery took %v", took)
		}
		if got := n.state(lives); got != "deleted: timeout" {
			t.Errorf("the one whose time was up meanwhile: %s", got)
		}
		if got := n.state(dies); got != "lost: the sandbox's process ended while nobody watched it: its node was restarted or stopped" {
			t.Errorf("the one that died meanwhile: %s", got)
		}
		if got := n.state(expires); got != "deleted: timeout" {
			t.Errorf("the one with a short time: %s", got)
		}
		if got := m.server.types(dies); got != "created started lost" {
			t.Errorf("reported: %q", got)
		}
		if err := n.kill(dies); !errors.Is(err, sandbox.ErrNotFound) && connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("killed afterwards: %v", err)
		}
		synctest.Wait()
		if got := m.server.types(dies); got != "created started lost killed" {
			t.Errorf("reported after a kill: %q", got)
		}
		n.verify()
		if l := n.jour.Ledger(); l.Allocated.Sandboxes != l.Warm.Sandboxes {
			t.Errorf("ledger: %+v", l)
		}
	})
}

func TestAdoption(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 2
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) { r.AllowInternet = false })
		n.eventually("the pool is filled", func() bool { ready, filling := n.warmCount(); return ready == 2 && filling == 0 })
		warm := map[sandbox.ID]bool{}
		for _, g := range m.guests() {
			warm[g] = g != id
		}
		n.down()
		n = m.boot()
		synctest.Wait()
		if got := n.state(id); got != "running" {
			t.Fatalf("state: %s", got)
		}
		if m.net.policy(id).AllowInternet {
			t.Error("adoption gave it internet")
		}
		if got := m.server.types(id); got != "created started adopted" {
			t.Errorf("reported: %q", got)
		}
		if c, err := n.DialGuest(t.Context(), id, 80); err != nil {
			t.Error(err)
		} else {
			_ = c.Close()
		}
		if next := n.create(); !warm[next] {
			t.Errorf("the warm ones were not adopted: %s is new", next)
		}
		// Its end is seen and its timeout kept.
		if err := m.host.OOM(id); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := n.state(id); got != "failed: out of memory: the limit is 256 MiB" {
			t.Errorf("state: %s", got)
		}
		n.verify()
	})
}

// TestAnyMoment puts the machine into the states in which a process can leave it, and recovers.
func TestAnyMoment(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.load()
		ctx := t.Context()
		e := fake.New(m.host)
		guest := func(id sandbox.ID) {
			t.Helper()
			spec := engine.Spec{ID: id, RootFS: "/x", ScratchDir: "/s", Args: []string{"x"}, Limits: small()}
			if err := e.Start(ctx, spec); err != nil {
				t.Fatal(err)
			}
		}
		link := func(id sandbox.ID) netip.Addr {
			t.Helper()
			att, err := m.net.Acquire(ctx, id, guestnet.Policy{})
			if err != nil {
				t.Fatal(err)
			}
			return att.GuestAddr
		}
		record := func(warm, ready bool) journal.Record {
			t.Helper()
			r := n.newRecord(poolKey{digest: digestOf("one"), size: small()}, &snapshot.Manifest{})
			r.Warm, r.Ready = warm, ready
			if _, _, err := n.jour.Admit(ctx, r); err != nil {
				t.Fatal(err)
			}
			return r
		}
		running := func(r *journal.Record) {
			t.Helper()
			r.State = sandbox.StateRunning
			r.Generation++
			if _, err := n.jour.Put(ctx, *r, journal.Change{Type: "started", Time: now(), Sandbox: r.Sandbox}); err != nil {
				t.Fatal(err)
			}
		}
		record(false, false)          // admitted
		link(record(false, false).ID) // with a network
		half := record(false, false)  // with a guest
		link(half.ID)
		guest(half.ID)
		claimed := record(false, true) // claimed, not yet acknowledged
		link(claimed.ID)
		guest(claimed.ID)
		filling := record(true, false)
		link(filling.ID)
		guest(filling.ID)
		guest(sandbox.NewID(n.node)) // no record
		link(sandbox.NewID(n.node))
		stopping := record(false, false)
		link(stopping.ID)
		guest(stopping.ID)
		running(&stopping)
		stopping.State, stopping.Ending = sandbox.StateStopping, journal.Ending{State: sandbox.StateDeleted, Reason: "killed", Type: "killed"}
		if _, err := n.jour.Put(ctx, stopping); err != nil {
			t.Fatal(err)
		}
		netless := record(false, false) // its network is gone
		guest(netless.ID)
		running(&netless)
		guestless := record(false, false) // its guest is gone
		link(guestless.ID)
		running(&guestless)
		n.down()

		n = m.boot()
		synctest.Wait()
		n.verify()
		if got := m.guests(); len(got) != 0 {
			t.Errorf("guests: %v", got)
		}
		for id, want := range map[sandbox.ID]string{
			stopping.ID:  "deleted: killed",
			netless.ID:   "lost: the sandbox's network was gone after the node was restarted: link  is gone",
			guestless.ID: "lost: the sandbox's process ended while nobody watched it: its node was restarted or stopped",
		} {
			if got := n.state(id); got != want {
				t.Errorf("state %q, want %q", got, want)
			}
		}
		if l := n.jour.Ledger(); l.Allocated.Sandboxes != 0 {
			t.Errorf("ledger: %+v", l)
		}
	})
}

func TestAdoptedButSilent(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 1, 1
		n := m.boot()
		id := n.create()
		n.eventually("the pool is filled", func() bool { ready, _ := n.warmCount(); return ready == 1 })
		n.down()
		m.mu.Lock()
		m.silent = true
		m.mu.Unlock()
		n = m.boot()
		synctest.Wait()
		if got := n.state(id); got != "running" {
			t.Errorf("a busy sandbox: %s", got)
		}
		if ready, _ := n.warmCount(); ready != 0 {
			t.Error("a silent warm sandbox was kept")
		}
		m.mu.Lock()
		m.silent = false
		m.mu.Unlock()
		pass(time.Minute)
		n.verify()
	})
}

func TestStopAll(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 2
		n := m.boot()
		ids := []sandbox.ID{n.create(), n.create()}
		n.eventually("the pool is filled", func() bool { ready, filling := n.warmCount(); return ready == 2 && filling == 0 })
		n.stop()
		<-n.ended
		if err := n.StopAll(t.Context(), "the node is purged"); err != nil {
			t.Fatal(err)
		}
		n.verify()
		if got := m.guests(); len(got) != 0 {
			t.Errorf("guests: %v", got)
		}
		for _, id := range ids {
			if got := n.state(id); got != "deleted: the node is purged" {
				t.Errorf("state: %s", got)
			}
		}
		if _, err := n.Create(t.Context(), request()); err == nil {
			t.Error("created after Run had ended")
		}
		n.verify()
	})
}

// TestStorm kills the node's process again and again while clients create and kill, and checks that nothing that was
// acknowledged is forgotten, and nothing is left over.
func TestStorm(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 1, 3
		m.host.SetLatency(5 * time.Millisecond)
		var mu sync.Mutex
		acked := map[sandbox.ID]string{}
		for round := range 6 {
			n := m.boot()
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			for c := range 4 {
				wg.Go(func() {
					for i := 0; ctx.Err() == nil; i++ {
						resp, err := n.Create(ctx, request())
						if err != nil {
							continue
						}
						id := sandbox.ID(resp.GetSandbox().GetId())
						mu.Lock()
						acked[id] = "running"
						mu.Unlock()
						if (i+c)%2 == 0 && n.kill(id) == nil {
							mu.Lock()
							acked[id] = "deleted: killed"
							mu.Unlock()
						}
						pause(ctx, time.Millisecond)
					}
				})
			}
			pass(time.Duration(20+7*round) * time.Millisecond)
			// As if the process were gone: no clean-up has any effect on the machine or the journal from here on.
			if err := n.jour.Close(); err != nil {
				t.Error(err)
			}
			cancel()
			wg.Wait()
			n.down()
		}
		n := m.boot()
		pass(time.Second) // for the pool
		n.verify()
		for id, want := range acked {
			if got := n.state(id); got != want {
				t.Errorf("sandbox %s: %q, acknowledged was %q", id, got, want)
			}
		}
		if len(acked) < 20 {
			t.Errorf("only %d sandboxes: the storm was none", len(acked))
		}
	})
}

// TestComposedImageOfNobody is left by a build whose process ended between the image and its record.
func TestComposedImageOfNobody(t *testing.T) {
	bubble(t, func(m *machine) {
		kept, left := m.images.add("one"), m.images.add("composed")
		left.Base = kept.Digest
		m.images.have[left.Digest] = left
		m.boot()
		if _, err := m.images.Path(left.Digest); !isNotFound(err) {
			m.t.Errorf("the image that nothing names: %v; want it gone", err)
		}
		if _, err := m.images.Path(kept.Digest); err != nil {
			m.t.Error(err)
		}
	})
}
