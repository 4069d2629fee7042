package agent

import (
	"errors"
	"testing"
	"testing/synctest"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestMoveFetches has the checkpoint and the image come from the node that the sandbox departs from.
func TestMoveFetches(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 1<<20)
		digest := w.image
		peers := w.add(n)
		for range 5 { // only one of them is asked for
			decoy := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
			m.check(n.pauseIt(decoy, kindMemory))
		}
		id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
		m.put(id, "mem", "disk")
		p, err := n.depart(id)
		m.check(err)
		gen := p.GetSandbox().GetGeneration() + 1
		resp, err := to.Receive(t.Context(), &agentv1.ReceiveRequest{Parcel: p, Generation: gen, Peers: peers})
		m.check(err)
		if resp.GetMovedBytes() == 0 || !resp.GetSandbox().GetReceived() {
			t.Errorf("answer: %v", resp)
		}
		m.check(to.arrive(id, gen))
		m.check(n.forget(id, gen))
		if got := other.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		n.verify()
		to.verify()
		if got := to.replicas(); len(got) > 0 {
			t.Errorf("replicas: %v", got)
		}
	})
}

// TestReceiveOfAReplica brings a paused sandbox back whose node is lost, and has that come back with its stale copy.
func TestReceiveOfAReplica(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 1<<20)
		digest := w.image
		peers := w.add(n)
		for range 5 {
			decoy := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
			m.check(n.pauseIt(decoy, kindMemory))
		}
		id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
		m.put(id, "mem", "disk")
		m.check(n.pauseIt(id, kindMemory))
		r := n.recordOf(id)
		_, err := to.fetch(r.Checkpoint, true, peers...)
		m.check(err)
		n.down()

		gen := r.Generation + 1
		receive := func(generation int64) error {
			_, err := to.Receive(t.Context(), &agentv1.ReceiveRequest{CheckpointId: r.Checkpoint, Generation: generation})
			return err
		}
		if err := receive(r.Generation); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("received with a generation that it had: %v", err)
		}
		m.check(receive(gen))
		m.check(to.forget(id, gen+1))
		synctest.Wait()
		if got := to.replicas(); len(got) != 1 {
			t.Errorf("replicas after it was given up: %v", got)
		}
		m.check(receive(gen))
		m.check(to.arrive(id, gen))
		if got := to.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
		_, err = to.Forget(t.Context(), &agentv1.ForgetRequest{Replica: r.Checkpoint})
		m.check(err)
		_, err = to.resumeIt(id)
		m.check(err)
		if got := other.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		to.verify()

		n = m.boot()
		m.check(n.forget(id, gen))
		if _, err := n.Get(t.Context(), &agentv1.GetRequest{Id: string(id)}); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("the stale copy: %v", err)
		}
		n.verify()
	})
}

// TestReplicaOfWhatIsHere has a node keep a replica of what it has something left of already.
func TestReplicaOfWhatIsHere(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 10)
		peers := w.add(n)
		id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = w.image })
		m.check(n.pauseIt(id, kindMemory))
		saved := n.recordOf(id).Checkpoint
		for _, replica := range []bool{false, true} {
			if _, err := to.fetch(saved, replica, peers...); err != nil {
				t.Fatalf("replica %t: %v", replica, err)
			}
		}
		synctest.Wait()
		if got := to.replicas(); len(got) != 1 || got[0] != saved {
			t.Errorf("replicas: %v; want %s", got, saved)
		}
		if _, err := n.fetch(saved, true, w.add(to)...); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("a replica of its own sandbox: %v", err)
		}
		if got := n.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
	})
}
