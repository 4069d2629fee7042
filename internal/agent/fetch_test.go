package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/cloister-dev/cloister/internal/bucket"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// long is text that does not shrink to nothing.
func long(n int) string {
	raw := make([]byte, n/2)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(raw)
	return hex.EncodeToString(raw)
}

// pair is two nodes that reach each other, the first with an image, and a checkpoint of a sandbox with that much on its disk.
func pair(m, other *machine, size int) (n, to *node, w *wire) {
	w = newWire()
	w.image = m.realImages("image")
	other.realImages("")
	m.peers, other.peers = w, w
	n, to = m.boot(), other.boot()
	id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = w.image })
	m.put(id, "mem", long(size))
	_, err := n.save(id, "snap-1", kindMemory)
	m.check(err)
	return n, to, w
}

func (n *node) fetch(id string, replica bool, peers ...*agentv1.Peer) (*agentv1.FetchResponse, error) {
	return n.Fetch(n.m.t.Context(), &agentv1.FetchRequest{CheckpointId: id, Peers: peers, Replica: replica})
}

func TestFetchCheckpoint(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 3<<20)
		digest := w.image
		resp, err := to.fetch("snap-1", false, w.add(n)...)
		m.check(err)
		if c := resp.GetCheckpoint(); resp.GetMovedBytes() < 3<<20 || c.GetId() != "snap-1" || c.GetImageDigest() != digest {
			t.Errorf("answer: %v", resp)
		}
		dials := w.count()
		resp, err = to.fetch("snap-1", false, w.add(n)...)
		if err != nil || resp.GetMovedBytes() != 0 || w.count() != dials {
			t.Errorf("fetched again: %v, %v", resp, err)
		}
		n.down()
		id := to.create(from("snap-1"), func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
		if got := other.holds(id); got != "mem/"+long(3<<20) {
			t.Errorf("it holds %d bytes", len(got))
		}
		to.verify()
		to.down()
		to = other.boot()
		if r := other.server.registered; !cmp.Equal(r.GetCheckpointIds(), []string{"snap-1"}) || len(r.GetReplicaIds()) > 0 {
			t.Errorf("registered: %v", r)
		}
		_, err = to.RemoveCheckpoint(t.Context(), &agentv1.RemoveCheckpointRequest{CheckpointId: "snap-1"})
		m.check(err)
		m.check(to.kill(id))
		to.eventually("the image goes with its last user", func() bool { return len(to.digests()) == 1 })
	})
}

func (n *node) digests() (out []string) {
	list, err := n.images.List(context.Background())
	if err != nil {
		n.m.t.Fatal(err)
	}
	for _, im := range list {
		out = append(out, im.Digest)
	}
	return out
}

func TestFetchImage(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		other.cfg.WarmMin, other.cfg.WarmMax = 2, 2
		n, to, w := pair(m, other, 10)
		digest := w.image
		fetch := func() int64 {
			resp, err := to.Fetch(t.Context(), &agentv1.FetchRequest{
				ImageDigest: digest, TemplateId: template, Warm: toWireResources(small()), Peers: w.add(n),
			})
			m.check(err)
			return resp.GetMovedBytes()
		}
		if moved := fetch(); moved == 0 {
			t.Error("nothing moved")
		}
		if moved := fetch(); moved != 0 {
			t.Errorf("%d bytes moved again", moved)
		}
		to.eventually("the pool is filled", func() bool { ready, _ := to.warmCount(); return ready == 2 })
		to.verify()
		to.down()
		to = other.boot()
		if r := other.server.registered; !cmp.Equal(r.GetImageDigests(), []string{digest}) {
			t.Errorf("registered: %v", r.GetImageDigests())
		}
		_, err := to.RemoveTemplate(t.Context(), &agentv1.RemoveTemplateRequest{TemplateId: template, ImageDigest: digest})
		m.check(err)
		to.eventually("the image goes with its template", func() bool { return len(to.digests()) == 1 })
	})
}

// TestCreateFetches has several creates meet at a node that has neither the checkpoint nor its image.
func TestCreateFetches(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 1<<20)
		digest := w.image
		peers := w.add(n)
		lacking := func(r *agentv1.CreateRequest) { r.ImageDigest, r.Peers = digest, peers }
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				id := to.create(from("snap-1"), lacking)
				if got := other.holds(id); got != "mem/"+long(1<<20) {
					t.Errorf("it holds %d bytes", len(got))
				}
			})
		}
		wg.Wait()
		if w.count() != 2 {
			t.Errorf("%d connections for a checkpoint and an image", w.count())
		}
		to.create(lacking)
		if w.count() != 2 {
			t.Error("asked for what is here")
		}
		to.verify()
		req := request()
		req.CheckpointId, req.Peers, req.ImageDigest = "unknown", peers, digest
		if _, err := to.Create(t.Context(), req); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("from what nobody has: %v", err)
		}
	})
}

func TestFetchReplica(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 10)
		digest := w.image
		id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
		m.put(id, "mem", "disk")
		m.check(n.pauseIt(id, kindMemory))
		saved := n.recordOf(id).Checkpoint
		resp, err := to.fetch(saved, true, w.add(n)...)
		if err != nil || resp.GetCheckpoint().GetSandboxId() != string(id) {
			t.Fatalf("%v, %v", resp, err)
		}
		_, err = to.RemoveCheckpoint(t.Context(), &agentv1.RemoveCheckpointRequest{CheckpointId: saved})
		m.check(err)
		to.down()
		to = other.boot()
		if r := other.server.registered; !cmp.Equal(r.GetReplicaIds(), []string{saved}) || len(r.GetCheckpointIds()) > 0 {
			t.Errorf("registered: %v", r)
		}
		req := request()
		req.CheckpointId, req.ImageDigest = saved, digest
		if _, err := to.Create(t.Context(), req); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("a fork of a replica: %v", err)
		}
		n.down()
		gen := n.recordOf(id).Generation + 1
		_, err = to.Receive(t.Context(), &agentv1.ReceiveRequest{CheckpointId: saved, Generation: gen})
		m.check(err)
		m.check(to.arrive(id, gen))
		if ids := to.replicas(); len(ids) > 0 {
			t.Errorf("still a replica: %v", ids)
		}
		_, err = to.Forget(t.Context(), &agentv1.ForgetRequest{Replica: saved})
		m.check(err)
		_, err = to.resumeIt(id)
		m.check(err)
		if got := other.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		to.verify()
	})
}

func TestForgetReplica(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 10)
		digest := w.image
		id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
		m.check(n.pauseIt(id, kindMemory))
		saved := n.recordOf(id).Checkpoint
		_, err := to.fetch(saved, true, w.add(n)...)
		m.check(err)
		for range 2 {
			_, err = to.Forget(t.Context(), &agentv1.ForgetRequest{Replica: saved})
			m.check(err)
		}
		_, err = n.Forget(t.Context(), &agentv1.ForgetRequest{Replica: saved})
		m.check(err)
		if ids := to.checkpoints(); len(ids) > 0 {
			t.Errorf("left: %v", ids)
		}
		to.eventually("the image goes with it", func() bool { return len(to.digests()) == 1 })
		n.verify()
	})
}

// TestFetchGoesOn loses every connection in the middle, and restarts the node that fetches, and at last asks another peer.
func TestFetchGoesOn(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		const size = 12 << 20
		n, to, w := pair(m, other, size)
		rng := rand.New(rand.NewPCG(1, 2))
		moved := 0
		w.spoil = func(c net.Conn) net.Conn {
			k := 1<<20 + rng.IntN(3<<20)
			moved += k
			return &breaking{c, k}
		}
		peers := w.add(n)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := to.Fetch(ctx, &agentv1.FetchRequest{CheckpointId: "snap-1", Peers: peers})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("fetched in no time: %v", err)
		}
		to.down()
		to = other.boot()
		if _, err := to.fetch("snap-1", false, peers...); err != nil {
			t.Fatal(err)
		}
		if w.dials < 4 || moved > size+w.dials*(2<<20) {
			t.Errorf("%d bytes in %d parts for %d", moved, w.dials, size)
		}
		third := newMachine(t)
		third.realImages("")
		third.peers = w
		w.spoil = nil
		last := third.boot()
		gone := &agentv1.Peer{NodeId: "nobody"}
		n.down()
		_, err = last.fetch("snap-1", false, append([]*agentv1.Peer{gone}, w.add(to)...)...)
		m.check(err)
		same := func(n *node) string {
			h, err := n.saves.Hold("snap-1")
			m.check(err)
			defer h.Release()
			var out strings.Builder
			m.check(sendFrames(t.Context(), &out, h, "", 0))
			return out.String()
		}
		if same(last) != same(to) {
			t.Error("the copy of the copy differs")
		}
	})
}

func TestFetchThatFails(t *testing.T) {
	bubbles(t, func(m, other *machine) {
		t := m.t
		n, to, w := pair(m, other, 1<<20)
		digest := w.image
		peers := w.add(n)
		gone := &agentv1.Peer{NodeId: "nobody"}
		for name, c := range map[string]struct {
			req  *agentv1.FetchRequest
			code connect.Code
		}{
			"nothing":        {&agentv1.FetchRequest{Peers: peers}, connect.CodeInvalidArgument},
			"both":           {&agentv1.FetchRequest{CheckpointId: "snap-1", ImageDigest: digest}, connect.CodeInvalidArgument},
			"bad id":         {&agentv1.FetchRequest{CheckpointId: "../x", Peers: peers}, connect.CodeInvalidArgument},
			"bad digest":     {&agentv1.FetchRequest{ImageDigest: "sha256:../x", Peers: peers}, connect.CodeInvalidArgument},
			"nobody":         {&agentv1.FetchRequest{CheckpointId: "snap-1"}, connect.CodeNotFound},
			"itself":         {&agentv1.FetchRequest{CheckpointId: "snap-1", Peers: w.add(to)}, connect.CodeNotFound},
			"no bucket":      {&agentv1.FetchRequest{CheckpointId: "snap-1", Bucket: true}, connect.CodeNotFound},
			"unknown":        {&agentv1.FetchRequest{CheckpointId: "snap-2", Peers: peers}, connect.CodeNotFound},
			"unknown image":  {&agentv1.FetchRequest{ImageDigest: digestOf("x"), Peers: peers}, connect.CodeNotFound},
			"peer is gone":   {&agentv1.FetchRequest{CheckpointId: "snap-1", Peers: []*agentv1.Peer{gone}}, connect.CodeUnavailable},
			"gone, or never": {&agentv1.FetchRequest{CheckpointId: "snap-2", Peers: append(peers, gone)}, connect.CodeUnavailable},
		} {
			if _, err := to.Fetch(t.Context(), c.req); connect.CodeOf(err) != c.code {
				t.Errorf("%s: %v, want code %v", name, err, c.code)
			}
		}
		w.spoil = func(c net.Conn) net.Conn { return &silent{Conn: c, closed: make(chan struct{})} }
		began := time.Now()
		if _, err := to.fetch("snap-1", false, peers...); connect.CodeOf(err) != connect.CodeUnavailable || time.Since(began) > 5*stallTimeout {
			t.Errorf("from a peer that says nothing, after %v: %v", time.Since(began), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := to.Fetch(ctx, &agentv1.FetchRequest{CheckpointId: "snap-1", Peers: peers}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("nobody waits any more: %v", err)
		}
		synctest.Wait()
		w.spoil = nil
		_, err := to.fetch("snap-1", false, peers...)
		m.check(err)
	})
}

// silent is a connection on which nothing comes.
type silent struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (s *silent) Read([]byte) (int, error) {
	<-s.closed
	return 0, net.ErrClosed
}

func (s *silent) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.Conn.Close()
}

// TestBucket writes a paused sandbox to a real service's copy in memory, and brings it back where nobody else has it.
func TestBucket(t *testing.T) {
	backend := s3mem.New()
	if err := backend.CreateBucket("kept"); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(gofakes3.New(backend, gofakes3.WithLogger(gofakes3.DiscardLog())).Server())
	defer srv.Close()
	b, err := bucket.New(bucket.Config{
		Endpoint: srv.URL, Bucket: "kept", Prefix: "c", Region: "us-east-1", AccessKey: "key", SecretKey: "secret", Transport: srv.Client().Transport,
	})
	if err != nil {
		t.Fatal(err)
	}
	m, other := newMachine(t), newMachine(t)
	m.bucket, other.bucket = b, b
	n, to, w := pair(m, other, 6<<20)
	digest := w.image
	id := n.create(func(r *agentv1.CreateRequest) { r.ImageDigest = digest })
	m.put(id, "mem", "disk")
	m.check(n.pauseIt(id, kindMemory))
	saved := n.recordOf(id).Checkpoint
	store := func(id string) int64 {
		resp, err := n.Store(t.Context(), &agentv1.StoreRequest{CheckpointId: id})
		m.check(err)
		return resp.GetMovedBytes()
	}
	if moved := store("snap-1"); moved < 6<<20 {
		t.Errorf("%d bytes moved", moved)
	}
	if moved := store("snap-1"); moved != 0 {
		t.Errorf("%d bytes moved again", moved)
	}
	if moved := store(saved); moved == 0 || moved > 1<<20 {
		t.Errorf("%d bytes moved of a small one whose image is there", moved)
	}
	gen := n.recordOf(id).Generation + 1
	n.down()
	_, err = to.Receive(t.Context(), &agentv1.ReceiveRequest{CheckpointId: saved, Bucket: true, Generation: gen})
	m.check(err)
	m.check(to.arrive(id, gen))
	_, err = to.resumeIt(id)
	m.check(err)
	if got := other.holds(id); got != "mem/disk" {
		t.Errorf("it holds %s", got)
	}
	req := from("snap-1")
	fork := to.create(req, func(r *agentv1.CreateRequest) { r.ImageDigest, r.Bucket = digest, true })
	if got := other.holds(fork); got != "mem/"+long(6<<20) {
		t.Errorf("a fork holds %d bytes", len(got))
	}
	for i, id := range []string{saved, "snap-1", "snap-1"} {
		_, err := to.RemoveCheckpoint(t.Context(), &agentv1.RemoveCheckpointRequest{CheckpointId: id, Bucket: true})
		m.check(err)
		left, err := b.List(t.Context(), "")
		if err != nil || i == 0 && len(left) < 4 || i > 0 && len(left) > 0 {
			t.Errorf("left in the bucket after %d: %v, %v", i, left, err)
		}
	}
	to.verify()
	if _, err := to.fetch("other", false); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("fetched what was never there: %v", err)
	}
}

// FuzzHead reads the head of an answer that nobody has checked.
func FuzzHead(f *testing.F) {
	f.Add("\x00\x00\x00\x02{}rest")
	f.Add("\xff\xff\xff\xff")
	f.Fuzz(func(t *testing.T, raw string) {
		const most = 64
		head, err := readArtifactHead(strings.NewReader(raw), most)
		if err == nil && (len(head) > most || !strings.HasPrefix(raw[4:], string(head))) {
			t.Errorf("head %q", head)
		}
	})
}
