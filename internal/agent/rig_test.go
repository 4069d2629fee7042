package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/fake"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/node/v1/nodev1connect"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

const (
	mib      = 1 << 20
	template = "tmplbase"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func digestOf(name string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(name))) }

func small() sandbox.Resources {
	return sandbox.Resources{MilliCPU: 500, MemoryBytes: 256 * mib, DiskBytes: 1024 * mib}
}

func times(r sandbox.Resources, n int64) sandbox.Resources {
	return sandbox.Resources{MilliCPU: r.MilliCPU * n, MemoryBytes: r.MemoryBytes * n, DiskBytes: r.DiskBytes * n}
}

// machine is what stays when a node's process ends: guests, networks, images, the journal's file, and the server.
type machine struct {
	t      testing.TB
	dir    string
	host   *fake.Host
	net    *fakeNet
	images *fakeImages
	server *fakeServer
	cfg    Config
	opt    journal.Options
	// guest answers requests in place of the agent inside; the body is closed by whoever calls it.
	mu     sync.Mutex
	guest  func(id sandbox.ID, r *http.Request) (status int, body string)
	inits  map[sandbox.ID]initBody
	silent bool // guests accept and never answer
	// loopback, if set, has the connections on which ports of a guest's loopback are asked for.
	loopback func(c net.Conn, r *http.Request)
	dials    int
	// engine and saves may put something in front of the engine and the checkpoints.
	engine  func(engine.Engine) engine.Engine
	network func(*fakeNet) network
	// files may have images with contents; peers and bucket are where artifacts come from.
	files  func(*fakeImages) images
	peers  peers
	near   *wire // in place of peers, where all nodes are
	bucket bucketStore
	saves  func(checkpoints) checkpoints
	logger *slog.Logger
	// local, if set, is told the same as server; remember takes the token secret.
	local    *fakeServer
	remember func([]byte) error
}

func newMachine(tb testing.TB) *machine {
	tb.Helper()
	m := &machine{
		t: tb, dir: tb.TempDir(), host: fake.NewHost(), net: newFakeNet(), images: &fakeImages{have: map[string]image.Image{}},
		server: &fakeServer{secret: []byte("0123456789abcdef0123456789abcdef")}, inits: map[sandbox.ID]initBody{},
		opt:    journal.Options{Capacity: times(small(), 100)},
		engine: func(e engine.Engine) engine.Engine { return e }, saves: func(c checkpoints) checkpoints { return c },
		network: func(f *fakeNet) network { return f }, files: func(f *fakeImages) images { return f },
		cfg: Config{ScratchDir: "/scratch", Name: "one", WarmMax: -1, MemoryPressure: func() bool { return false }},
	}
	started := time.Now()
	m.cfg.SinceBoot = func() (string, time.Duration) { return "boot", time.Since(started) }
	m.images.add("one")
	return m
}

// node is one process of the node.
type node struct {
	*Agent
	m      *machine
	stop   context.CancelFunc
	ended  chan struct{}
	jour   *journal.Journal
	closed bool
}

// boot starts the node's process, as after a machine's or a daemon's start.
func (m *machine) boot() *node {
	m.t.Helper()
	n := m.load()
	if m.near != nil {
		m.near.add(n)
	}
	if err := n.Recover(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
	n.run()
	return n
}

// load makes the node without Recover and Run.
func (m *machine) load() *node {
	m.t.Helper()
	j, err := journal.Open(m.t.Context(), filepath.Join(m.dir, "journal.db"), m.opt)
	if err != nil {
		m.t.Fatal(err)
	}
	m.net.restart()
	store, err := snapshot.New(filepath.Join(m.dir, "snapshots"), nil)
	if err != nil {
		m.t.Fatal(err)
	}
	var local nodev1connect.NodeServiceClient
	if m.local != nil {
		local = m.local
	}
	others := m.peers
	if others == nil && m.near != nil {
		others = m.near
	}
	a, err := New(m.cfg, Deps{
		Local: local, RememberSecret: m.remember,
		Journal: j, Engine: m.engine(fake.New(m.host)), Network: m.network(m.net), Images: m.files(m.images), Peers: others, Bucket: m.bucket, Snapshots: m.saves(store), Server: m.server,
		Dial: m.dial, Registerer: prometheus.NewRegistry(), Logger: m.logger,
	})
	if err != nil {
		m.t.Fatal(err)
	}
	n := &node{Agent: a, m: m, jour: j, ended: make(chan struct{})}
	m.t.Cleanup(n.down)
	return n
}

func (n *node) run() {
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	go func() {
		defer close(n.ended)
		if err := n.Run(ctx); err != nil {
			n.m.t.Error(err)
		}
	}()
	n.eventually("registered", func() bool { return n.secret.Load() != nil })
}

// down ends the process and leaves the sandboxes running.
func (n *node) down() {
	if n.closed {
		return
	}
	n.closed = true
	if n.stop != nil {
		n.stop()
		<-n.ended
	}
	if err := n.jour.Close(); err != nil {
		n.m.t.Error(err)
	}
}

// eventually waits until the condition holds. In a synctest bubble, waiting costs no time.
func (n *node) eventually(what string, ok func() bool) {
	n.m.t.Helper()
	for range 20000 {
		if ok() {
			return
		}
		t := time.NewTimer(time.Millisecond)
		<-t.C
	}
	n.m.t.Fatalf("never: %s", what)
}

func request() *agentv1.CreateRequest {
	return &agentv1.CreateRequest{
		TemplateId: template, TemplateName: "base", ImageDigest: digestOf("one"), Resources: toWireResources(small()),
		Metadata: map[string]string{"who": "me"}, Env: map[string]string{"A": "1"}, Timeout: durationpb.New(5 * time.Minute),
		Secure: true, AllowInternet: true,
	}
}

// create creates a sandbox and returns its id.
func (n *node) create(change ...func(*agentv1.CreateRequest)) sandbox.ID {
	n.m.t.Helper()
	req := request()
	for _, f := range change {
		f(req)
	}
	resp, err := n.Create(context.Background(), req)
	if err != nil {
		n.m.t.Fatal(err)
	}
	if s := resp.GetSandbox().GetState(); s != agentv1.State_STATE_RUNNING {
		n.m.t.Fatalf("created sandbox is %v", s)
	}
	return sandbox.ID(resp.GetSandbox().GetId())
}

func (n *node) state(id sandbox.ID) string {
	resp, err := n.Get(context.Background(), &agentv1.GetRequest{Id: string(id)})
	if err != nil {
		return err.Error()
	}
	s := strings.ToLower(strings.TrimPrefix(resp.GetSandbox().GetState().String(), "STATE_"))
	if r := resp.GetSandbox().GetReason(); r != "" {
		s += ": " + r
	}
	return s
}

func (n *node) kill(id sandbox.ID) error {
	_, err := n.Kill(context.Background(), &agentv1.KillRequest{Id: string(id), Reason: "killed"})
	return err
}

// guests returns the ids of the guests that the machine has.
func (m *machine) guests() []sandbox.ID {
	list, err := fake.New(m.host).List(context.Background())
	if err != nil {
		m.t.Fatal(err)
	}
	var ids []sandbox.ID
	for _, g := range list {
		ids = append(ids, g.ID)
	}
	return ids
}

// verify checks what must hold whenever nothing is under way: ledger, guests, networks and records agree.
func (n *node) verify() {
	n.m.t.Helper()
	recs, err := n.jour.Records(context.Background())
	if err != nil {
		n.m.t.Fatal(err)
	}
	var want []sandbox.ID
	var sum sandbox.Resources
	owned := map[string]bool{}
	for _, r := range recs {
		sum = sum.Add(r.Held())
		switch {
		case r.State == sandbox.StatePaused:
			owned[r.Checkpoint] = true
		case r.State == sandbox.StateMigrating:
			switch {
			case r.Received && stands(&r), stands(&r) && slices.Contains(n.m.guests(), r.ID): // one that departed may have ended
				want = append(want, r.ID)
			case !stands(&r):
				owned[r.Checkpoint] = true
			}
		case !r.State.Ended():
			want = append(want, r.ID)
		}
	}
	n.eventually("what sandboxes were paused in is deleted", func() bool { return len(n.pauses()) <= len(owned) })
	for _, id := range n.pauses() {
		if !owned[id] {
			n.m.t.Errorf("checkpoint %s belongs to nobody", id)
		}
		delete(owned, id)
	}
	for id := range owned {
		n.m.t.Errorf("checkpoint %q, which a sandbox is paused in, is gone", id)
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, n.m.guests()); diff != "" {
		n.m.t.Errorf("guests (-records +machine):\n%s", diff)
	}
	if diff := cmp.Diff(want, n.m.net.ids()); diff != "" {
		n.m.t.Errorf("networks (-records +machine):\n%s", diff)
	}
	if got := n.jour.Ledger().Allocated.Resources; got != sum {
		n.m.t.Errorf("allocated %+v, records say %+v", got, sum)
	}
	if w, age := n.gate.waiting(); w != 0 {
		n.m.t.Errorf("%d creates wait for %v", w, age)
	}
}

// pauses returns the checkpoints that sandboxes are paused in.
func (n *node) pauses() (ids []string) {
	for _, m := range n.saves.List() {
		if m.Pause {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// truncate empties every file of a directory.
func (m *machine) truncate(dir string) {
	m.t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range list {
		if err := os.Truncate(filepath.Join(dir, e.Name()), 0); err != nil {
			m.t.Fatal(err)
		}
	}
}

// removeAll deletes something of the machine's directory.
func (m *machine) removeAll(name ...string) {
	m.t.Helper()
	if err := os.RemoveAll(filepath.Join(append([]string{m.dir}, name...)...)); err != nil {
		m.t.Fatal(err)
	}
}

// dial connects to a guest of the machine, as the kernel would.
func (m *machine) dial(ctx context.Context, _, address string) (net.Conn, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	id, ok := m.net.owner(ap.Addr())
	running := false
	if list, err := fake.New(m.host).List(ctx); err == nil {
		for _, g := range list {
			running = running || g.ID == id && g.Running
		}
	}
	m.mu.Lock()
	m.dials++
	silent := m.silent
	m.mu.Unlock()
	if !ok || !running || ap.Port() == 1 {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	near, far := net.Pipe()
	go m.serve(id, far, silent)
	return near, nil
}

func (m *machine) serve(id sandbox.ID, c net.Conn, silent bool) {
	defer func() { _ = c.Close() }()
	r := bufio.NewReader(c)
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if silent {
			_, _ = io.Copy(io.Discard, c)
			return
		}
		if req.URL.Path == "/loopback" && m.loopback != nil {
			m.loopback(c, req)
			return
		}
		status, body := m.answer(id, req)
		resp := &http.Response{
			StatusCode: status, ProtoMajor: 1, ProtoMinor: 1, ContentLength: int64(len(body)), Header: headersOf(req, status),
			Body: io.NopCloser(strings.NewReader(body)), Request: req,
		}
		if err := resp.Write(c); err != nil {
			return
		}
	}
}

func (m *machine) answer(id sandbox.ID, r *http.Request) (int, string) {
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.guest != nil {
		if status, text := m.guest(id, r); status != 0 {
			return status, text
		}
	}
	switch r.Method + " " + r.URL.Path {
	case "GET /health":
		return http.StatusNoContent, ""
	case "POST /init":
		var b initBody
		if err := json.Unmarshal(body, &b); err != nil {
			return http.StatusBadRequest, err.Error()
		}
		m.inits[id] = b
		return http.StatusNoContent, ""
	case "GET /logs":
		if want := m.inits[id].AccessToken; r.Header.Get("X-Access-Token") != want {
			return http.StatusUnauthorized, `{"code":401,"message":"wrong token"}`
		}
		return http.StatusOK, `[{"time":"2000-01-01T00:00:00Z","level":"info","logger":"envd","message":"early"},
			{"time":"2100-01-01T00:00:00Z","level":"odd","message":"late","fields":{"a":"b"}}]`
	}
	return http.StatusNotFound, ""
}

func (m *machine) onGuest(f func(id sandbox.ID, r *http.Request) (int, string)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.guest = f
}

func (m *machine) init(id sandbox.ID) initBody {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.inits[id]
}

// bubble runs a test on a machine, with a clock of its own.
func bubble(t *testing.T, f func(m *machine)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(newMachine(t)) })
}

var errTest = errors.New("as the test wants it")
