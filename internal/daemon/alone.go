package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/api"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/history"
	"github.com/cloister-dev/cloister/internal/proxy"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// alone lets a node that joined answer its own socket by itself, whether or not a server is reached: a control of its own over
// what the node knows. What it does reaches the server with the node's reports, like everything else that happens there.
// What is the cluster's (templates, nodes, keys, tokens) it refuses and names the server.
//
// It begins once the node has the token secret, from its first registration ever.
type alone struct {
	d       *daemon
	node    *nodeRole
	history *history.History
	store   *aloneStore
	// secret is what was remembered when the process started; nil before the first registration.
	secret []byte

	mu      sync.Mutex
	present *answers
	// stale means that the node has to register again: its control then learns what the node has.
	stale bool
	// run starts the loops of what answers; nil until start.
	run func(*answers)
}

// answers is what answers for a node with one token secret.
type answers struct {
	control *control.Control
	handler http.Handler
	proxy   *proxy.Proxy
}

func (d *daemon) newAlone(ctx context.Context, node *nodeRole) (*alone, error) {
	hist, err := history.Open(ctx, history.Config{
		Path: d.path("node", "history.db"), Logger: d.log, MaxAge: d.cfg.EventsKept, MaxEvents: int64(d.cfg.EventsKeptCount),
	})
	if err != nil {
		return nil, fmt.Errorf("open the node's history: %w", err)
	}
	d.closers = append(d.closers, hist.Close)
	a := &alone{d: d, node: node, history: hist, store: newAloneStore(d.path("node", "templates.json"), d.member.servers)}
	if err := a.store.load(); err != nil {
		return nil, err
	}
	a.secret, err = os.ReadFile(a.secretPath())
	if errors.Is(err, os.ErrNotExist) {
		return a, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the token secret: %w", err)
	}
	return a, a.begin(ctx, a.secret)
}

func (a *alone) secretPath() string { return a.d.path("node", "token-secret") }

// remember keeps the secret that access tokens are derived from, for the time when no server can be asked.
func (a *alone) remember(secret []byte) error {
	if err := writeSecret(a.secretPath(), string(secret)); err != nil {
		return fmt.Errorf("remember the token secret: %w", err)
	}
	return a.begin(context.Background(), secret)
}

// begin makes the control that answers from now on.
func (a *alone) begin(ctx context.Context, secret []byte) error {
	st := a.store.with(secret)
	policy, err := schedulerPolicy(a.d.cfg)
	if err != nil {
		return err
	}
	ctl, err := control.New(ctx, control.Config{
		Agents: ownNode{a.node}, Templates: st, Nodes: st, Settings: st, Policies: st, Placements: st, Replicas: st, Intents: st, Pins: st,
		Secrets: st, Keys: st, History: events{a.history}, Log: a.d.log,
		Limits: control.Limits{
			MaxTimeout: a.d.cfg.MaxTimeout, DefaultResources: a.d.defaultResources(), SuspectAfter: a.d.cfg.SuspectAfter(),
			DownAfter: a.d.cfg.NodeDownAfter, SnapshotReplicas: 1, OneNode: true,
		},
		Policy: policy, UploadDir: a.d.path("node", "uploads"),
		About: control.About{Version: a.d.version, Member: a.d.member.membership},
	})
	if err != nil {
		return fmt.Errorf("build the node's own API: %w", err)
	}
	px, err := proxy.New(proxy.Config{Router: ctl, Dialer: a.node, Signatures: signer{ctl}, Logger: a.d.log})
	if err != nil {
		return fmt.Errorf("build the node's own proxy: %w", err)
	}
	next := &answers{control: ctl, handler: api.New(api.Config{Control: ctl, Auth: nobody{}, Log: a.d.log}), proxy: px}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.present = next
	if a.run != nil {
		a.run(next)
	}
	return nil
}

// start runs the control's loops, now or as soon as there is one, and keeps the templates fresh.
func (a *alone) start(ctx context.Context, loops *errgroup.Group) {
	loops.Go(func() error { return a.history.Run(ctx) })
	loops.Go(func() error { a.refresh(ctx); return nil })
	a.mu.Lock()
	defer a.mu.Unlock()
	a.run = func(n *answers) {
		loops.Go(func() error { return n.control.Run(ctx) })
		loops.Go(func() error { return n.control.RunProxy(ctx, n.proxy) })
	}
	if a.present != nil {
		a.run(a.present)
	}
}

func (a *alone) now() *answers {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.present
}

// ServeHTTP answers for the node.
func (a *alone) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := a.now()
	if n == nil || strings.HasPrefix(r.URL.Path, "/v1/tokens") {
		a.d.answerStatus(w, r)
		return
	}
	n.handler.ServeHTTP(w, r)
}

// serveTraffic carries requests into the node's sandboxes.
func (a *alone) serveTraffic(w http.ResponseWriter, r *http.Request) {
	n := a.now()
	if n == nil {
		a.d.answerStatus(w, r)
		return
	}
	n.proxy.ServeHTTP(w, r)
}

func (a *alone) takes() (*control.Control, error) {
	n := a.now()
	if n == nil {
		return nil, sandbox.Unavailablef("the node has not registered with a server yet")
	}
	return n.control, nil
}

// Register takes the node's registration. Checkpoints of templates that are not known here are left out: a control removes
// what nobody can need from a node, and here nobody knows that.
func (a *alone) Register(ctx context.Context, req *nodev1.RegisterRequest) (*nodev1.RegisterResponse, error) {
	c, err := a.takes()
	if err != nil {
		return nil, err
	}
	own := &nodev1.RegisterRequest{
		NodeId: req.GetNodeId(), Name: req.GetName(), Version: req.GetVersion(), Architecture: req.GetArchitecture(), Kernel: req.GetKernel(),
		Engines: req.GetEngines(), Capacity: req.GetCapacity(), Labels: req.GetLabels(), ImageDigests: req.GetImageDigests(),
		CheckpointIds: a.store.knownBuilds(req.GetCheckpointIds()), CpuFeatures: req.GetCpuFeatures(), Machine: req.GetMachine(),
	}
	return c.Register(ctx, own)
}

// Report takes what the node reports.
func (a *alone) Report(ctx context.Context, req *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	c, err := a.takes()
	if err != nil {
		return nil, err
	}
	if a.again() {
		return nil, sandbox.Conflictf("the templates of the cluster have changed: register again")
	}
	return c.Report(ctx, req)
}

// again reports, once, that the node has to register again.
func (a *alone) again() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.stale
	a.stale = false
	return was
}

// refreshEvery is how often the server is asked whether the templates have changed, and refreshTimeout bounds one question.
const (
	refreshEvery   = 5 * time.Second
	refreshTimeout = 10 * time.Second
)

// refresh keeps the copy of the cluster's templates fresh while a server is reached, until ctx ends.
func (a *alone) refresh(ctx context.Context) {
	for sleepUntil(ctx, time.Now().Add(refreshEvery)) {
		if !a.d.member.link.Connected() {
			continue
		}
		if err := a.refreshOnce(ctx); err != nil && ctx.Err() == nil {
			a.d.log.DebugContext(ctx, "templates not refreshed", slog.Any("err", err))
		}
	}
}

func (a *alone) refreshOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	resp, err := a.d.member.members.Templates(ctx, &clusterv1.TemplatesRequest{Version: a.store.version()})
	if err != nil || resp.GetSame() {
		return err
	}
	all := make([]sandbox.Template, 0, len(resp.GetTemplates()))
	for _, text := range resp.GetTemplates() {
		var t sandbox.Template
		if err := json.Unmarshal(text, &t); err != nil {
			return fmt.Errorf("read a template: %w", err)
		}
		all = append(all, t)
	}
	if err := a.store.replace(resp.GetVersion(), all); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stale = true
	return nil
}

// nobody has a key: the socket needs none, and nothing else leads here.
type nobody struct{}

// Authenticate refuses every key.
func (nobody) Authenticate(context.Context, string) (string, error) {
	return "", sandbox.Deniedf("keys are the cluster's: ask its server")
}

// ownStatus is what the machine says of itself without asking anybody.
func (d *daemon) ownStatus() client.Status {
	m := d.member.membership()
	st := client.Status{Version: d.version, StartedAt: d.begun.UTC(), Ready: d.ready.Load(), Member: &client.Member{
		Role: string(m.Role), ID: m.ID, Name: m.Name, ClusterID: m.ClusterID, Servers: m.Servers, Connected: m.Connected,
		CertificateExpiresAt: m.ExpiresAt.UTC(),
	}}
	if d.proxy != nil {
		st.ProxyURL = d.cfg.PublicProxyURL
	}
	return st
}

// answerStatus tells who the machine is, where nothing else can be asked: of a proxy, and of a node before its first
// registration.
func (d *daemon) answerStatus(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if r.Method != http.MethodGet || r.URL.Path != "/v1/status" {
		m := d.member.membership()
		w.WriteHeader(http.StatusNotImplemented)
		_ = json.NewEncoder(w).Encode(map[string]any{
			"code":    http.StatusNotImplemented,
			"message": fmt.Sprintf("this machine is a %s: ask the server at %s", m.Role, strings.Join(m.Servers, ", ")),
		})
		return
	}
	_ = json.NewEncoder(w).Encode(d.ownStatus()) // who has gone needs no answer
}
