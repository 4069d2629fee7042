// Package move_test moves sandboxes between two nodes of this machine, on the real engine.
package move_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/agent"
	"github.com/cloister-dev/cloister/internal/engine/gvisor"
	"github.com/cloister-dev/cloister/internal/engine/gvisor/sentry"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
	"github.com/cloister-dev/cloister/test/harness"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	mib    = 1 << 20
	port   = 49983
	heapMB = 64
)

func size() sandbox.Resources {
	return sandbox.Resources{MilliCPU: 1000, MemoryBytes: 256 * mib, DiskBytes: 256 * mib}
}

// server takes reports as a server does.
type server struct{}

func (server) Register(context.Context, *nodev1.RegisterRequest) (*nodev1.RegisterResponse, error) {
	return &nodev1.RegisterResponse{Epoch: 1, TokenSecret: []byte("0123456789abcdef0123456789abcdef")}, nil
}

func (server) Report(_ context.Context, r *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	var last int64
	for _, c := range r.GetChanges() {
		last = max(last, c.GetSequence())
	}
	return &nodev1.ReportResponse{AcknowledgedSequence: last}, nil
}

// node is one node of this machine.
type node struct {
	*agent.Agent
	tb     testing.TB
	images *image.Store
	// address is where the node answers the other one.
	address string
}

// peers connects to the other node, without what keeps strangers out between machines.
type peers struct{}

func (peers) DialPeer(ctx context.Context, _ sandbox.NodeID, address string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", address)
}

// answer lets the other node have what this one has, until the test ends.
func (n *node) answer() {
	n.tb.Helper()
	l, err := (&net.ListenConfig{}).Listen(n.tb.Context(), "tcp", "127.0.0.1:0")
	n.must(err)
	n.address = l.Addr().String()
	srv := &http.Server{Handler: n.Artifacts(), ReadHeaderTimeout: time.Minute}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.Serve(l) // ends with Close
	}()
	n.tb.Cleanup(func() {
		_ = srv.Close() // what is under way is not needed any more
		<-ended
	})
}

// newNode starts a node whose sandboxes have addresses of 10.150.<third>.0/24. It ends with the test, and its sandboxes too.
func newNode(tb testing.TB, third byte) *node {
	tb.Helper()
	harness.NeedRoot(tb)
	dir := tb.TempDir()
	n := &node{tb: tb}
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		n.must(os.Chmod(d, 0o711)) // the sentry, which is nobody, goes through
	}
	log := slog.New(slog.NewTextHandler(testWriter{tb}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	jr, err := journal.Open(tb.Context(), filepath.Join(dir, "journal.db"), journal.Options{
		Capacity: sandbox.Resources{MilliCPU: 16000, MemoryBytes: 16 << 30, DiskBytes: 16 << 30},
	})
	n.must(err)
	exe, err := sentry.Install(filepath.Join(dir, "bin"))
	n.must(err)
	eng, err := gvisor.New(gvisor.Config{ExePath: exe, Root: filepath.Join(dir, "gvisor"), CgroupParent: "cloister-" + string(jr.NodeID()), Logger: log})
	n.must(err)
	prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 150, third, 0}), 24)
	nets, err := guestnet.New(guestnet.Config{Range: prefix, Name: string(jr.NodeID()), PoolSize: 2, Logger: log})
	n.must(err)
	n.images, err = image.New(image.Config{Dir: filepath.Join(dir, "images"), Logger: log})
	n.must(err)
	saves, err := snapshot.New(filepath.Join(dir, "snapshots"), log)
	n.must(err)
	scratch := filepath.Join(dir, "scratch")
	n.must(os.Mkdir(scratch, 0o700))
	n.Agent, err = agent.New(agent.Config{ScratchDir: scratch, GuestArgs: []string{"/bin/guest"}, WarmMax: -1}, agent.Deps{
		Journal: jr, Engine: eng, Network: nets, Images: n.images, Snapshots: saves, Server: server{}, Peers: peers{}, Logger: log,
	})
	n.must(err)
	n.must(n.Recover(tb.Context()))
	n.answer()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 2)
	go func() { ended <- n.Run(ctx) }()
	go func() { ended <- nets.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				tb.Error(err)
			}
		}
		if err := n.StopAll(context.Background(), "the test is over"); err != nil {
			tb.Error(err)
		}
		if err := errors.Join(nets.Purge(context.Background()), eng.Purge(context.Background()), jr.Close()); err != nil {
			tb.Error(err)
		}
		nets.Close()
	})
	return n
}

type testWriter struct{ tb testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.tb.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func (n *node) must(err error) {
	n.tb.Helper()
	if err != nil {
		n.tb.Fatal(err)
	}
}

// build makes the image that the guest runs from, and returns its digest.
func (n *node) build(rootfs string) string {
	n.tb.Helper()
	im, err := n.images.Build(n.tb.Context(), image.Request{Sources: []string{"dir:" + rootfs}}, nil)
	n.must(err)
	return im.Digest
}

// rootfs returns a directory with the guest's program and nothing else.
func rootfs(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	cmd := exec.CommandContext(tb.Context(), "go", "build", "-o", filepath.Join(dir, "bin", "guest"), "./testdata/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build the guest: %v\n%s", err, out)
	}
	return dir
}

// create starts a sandbox that holds a known pattern in its memory.
func (n *node) create(digest string) sandbox.ID {
	n.tb.Helper()
	r := size()
	req := &agentv1.CreateRequest{
		TemplateId: "base", ImageDigest: digest, AllowInternet: true, Env: map[string]string{"HEAP": strconv.Itoa(heapMB)},
		Resources: &agentv1.Resources{MilliCpu: r.MilliCPU, MemoryBytes: r.MemoryBytes, DiskBytes: r.DiskBytes},
	}
	for {
		resp, err := n.Create(n.tb.Context(), req)
		if err != nil && strings.Contains(err.Error(), "not registered") {
			continue
		}
		n.must(err)
		return sandbox.ID(resp.GetSandbox().GetId())
	}
}

// ask returns what the sandbox says that it holds.
func (n *node) ask(id sandbox.ID) string {
	n.tb.Helper()
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return n.DialGuest(ctx, id, port) }}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(n.tb.Context(), http.MethodGet, "http://sandbox/held", nil)
	n.must(err)
	resp, err := t.RoundTrip(req)
	n.must(err)
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	n.must(err)
	return string(text)
}

// times are how long the parts of a move took.
type times struct{ depart, receive, arrive time.Duration }

// move takes a sandbox to another node.
func (n *node) move(to *node, id sandbox.ID) (t times) {
	n.tb.Helper()
	ctx := n.tb.Context()
	took := stopwatch()
	resp, err := n.Depart(ctx, &agentv1.DepartRequest{Id: string(id)})
	n.must(err)
	t.depart = took()
	p := resp.GetParcel()
	gen := p.GetSandbox().GetGeneration() + 1
	_, err = to.Receive(ctx, &agentv1.ReceiveRequest{
		Parcel: p, Generation: gen, Peers: []*agentv1.Peer{{NodeId: string(n.NodeID()), Address: n.address}},
	})
	n.must(err)
	t.receive = took()
	_, err = to.Arrive(ctx, &agentv1.ArriveRequest{Id: string(id), Generation: gen})
	n.must(err)
	t.arrive = took()
	_, err = n.Forget(ctx, &agentv1.ForgetRequest{Id: string(id), Below: gen})
	n.must(err)
	return t
}

func stopwatch() func() time.Duration {
	last := time.Now()
	return func() time.Duration {
		d := time.Since(last)
		last = time.Now()
		return d
	}
}

// pattern is the guest's.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

// TestMove moves a sandbox there and back: memory, an open file and a listening socket go along.
func TestMove(t *testing.T) {
	root := rootfs(t)
	n, to := newNode(t, 64), newNode(t, 65)
	digest := n.build(root)
	id := n.create(digest)
	want := fmt.Sprintf("%x", sha256.Sum256(pattern(heapMB*mib)))
	lines := fmt.Sprintf("written before, %d MiB\n", heapMB)
	for i, here := range []*node{n, to, n, to} {
		lines += fmt.Sprintf("asked %d\n", i+1)
		if got, all := here.ask(id), fmt.Sprintf("%s %d %q", want, i+1, lines); got != all {
			t.Errorf("after %d moves it says %s, want %s", i, got, all)
		}
		there := map[*node]*node{n: to, to: n}[here]
		took := here.move(there, id)
		t.Logf("move %d: %+v", i, took)
		if _, err := here.DialGuest(t.Context(), id, port); err == nil {
			t.Error("it answers where it was")
		}
	}
	p, err := n.Depart(t.Context(), &agentv1.DepartRequest{Id: string(id)})
	n.must(err)
	_, err = n.Return(t.Context(), &agentv1.ReturnRequest{Id: string(id), Generation: p.GetParcel().GetSandbox().GetGeneration() + 7})
	n.must(err)
	if got := n.ask(id); !strings.HasPrefix(got, want) {
		t.Errorf("after it returned it says %s", got)
	}
}

// BenchmarkMove measures for how long a sandbox with a heap of 64 MiB that does not compress stands still in a move between two
// nodes that have the image.
func BenchmarkMove(b *testing.B) {
	root := rootfs(b)
	n, to := newNode(b, 66), newNode(b, 67)
	digest := n.build(root)
	id := n.create(digest)
	n.move(to, id) // the image comes along
	n, to = to, n
	var sum times
	for b.Loop() {
		t := n.move(to, id)
		sum.depart, sum.receive, sum.arrive = sum.depart+t.depart, sum.receive+t.receive, sum.arrive+t.arrive
		n, to = to, n
	}
	for name, d := range map[string]time.Duration{"depart-ms": sum.depart, "receive-ms": sum.receive, "arrive-ms": sum.arrive} {
		b.ReportMetric(float64(d.Microseconds())/1000/float64(b.N), name)
	}
}
