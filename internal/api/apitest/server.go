package apitest

import (
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-dev/cloister/internal/api"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// BaseDigest is the image of the template "base" that every Cluster has, BaseID its id, BaseBuild its build.
const (
	BaseBuild  = "b45eb45e-0000-4000-8000-000000000000"
	BaseDigest = "sha256:b45e"
	BaseID     = sandbox.TemplateID("base0template0id0000")
)

// Cluster is a control over fakes.
type Cluster struct {
	Control *control.Control
	Records *Records
	Decided *Decided
	Agents  *Agents
	Node    *Node
	// Ahead is by how much nodes' clocks are ahead of the server's, as their reports say.
	Ahead time.Duration

	uploads string
	epochs  map[sandbox.NodeID]int64
	acked   map[sandbox.NodeID]int64
}

// NewCluster returns a cluster with one registered node and the template base. change may alter the configuration.
func NewCluster(tb testing.TB, change func(*control.Config)) *Cluster {
	tb.Helper()
	c := &Cluster{
		Records: NewRecords(), Decided: NewDecided(), Agents: &Agents{nodes: make(map[sandbox.NodeID]agentv1connect.AgentServiceClient)},
		Node: NewNode("aaaaaa"), epochs: make(map[sandbox.NodeID]int64), acked: make(map[sandbox.NodeID]int64),
	}
	c.uploads = tb.TempDir()
	now := time.Now().UTC()
	err := c.Records.CreateTemplate(tb.Context(), sandbox.Template{
		ID: BaseID, Kind: sandbox.TemplateBuilt, Names: []string{"base"}, CreatedAt: now, UpdatedAt: now,
		Tags: map[string]sandbox.Tag{sandbox.DefaultTag: {BuildID: BaseBuild, At: now}},
		Builds: []sandbox.Build{{
			ID: BaseBuild, State: sandbox.BuildReady, Tags: []string{sandbox.DefaultTag}, ImageDigest: BaseDigest, CreatedAt: now, FinishedAt: now,
			Resources: sandbox.Resources{MilliCPU: 2000, MemoryBytes: 512 << 20, DiskBytes: 4 << 30},
		}},
	})
	if err != nil {
		tb.Fatal(err)
	}
	c.Restart(tb, change)
	c.Join(tb, c.Node)
	return c
}

// Restart replaces the control by a fresh one over the same records; nodes must join again.
func (c *Cluster) Restart(tb testing.TB, change func(*control.Config)) {
	tb.Helper()
	cfg := control.Config{
		Agents: c.Agents, Templates: c.Records, Nodes: c.Records, Settings: c.Records, Policies: c.Records, Secrets: c.Records, Keys: c.Records, History: c.Records,
		Placements: c.Decided, Replicas: c.Decided, Intents: c.Decided, Pins: c.Decided, Stored: c.Decided,
		Log: slog.New(slog.DiscardHandler), Random: rand.NewPCG(1, 2), UploadDir: c.uploads,
		// Fake nodes report when a test tells them to, so their silence means nothing.
		Limits: control.Limits{SuspectAfter: 24 * time.Hour, DownAfter: 48 * time.Hour},
		About:  control.About{Version: "test", APIURL: "http://api.test", ProxyURL: "http://proxy.test"},
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if c.Control, err = control.New(tb.Context(), cfg); err != nil {
		tb.Fatal(err)
	}
}

// Join registers a node, connects it, and sends its full report.
func (c *Cluster) Join(tb testing.TB, n *Node) {
	tb.Helper()
	n.mu.Lock()
	n.moving.agents = c.Agents
	images := n.imageDigests()
	n.mu.Unlock()
	resp, err := c.Control.Register(tb.Context(), &nodev1.RegisterRequest{
		NodeId: string(n.ID), Name: "node-" + string(n.ID), Version: "test", Architecture: "amd64", Kernel: "6.1",
		Engines: []*nodev1.Engine{{Name: "gvisor", Version: n.EngineVersion}}, CpuFeatures: n.CPUFeatures, Capacity: resources(n.Capacity), ImageDigests: images,
		CheckpointIds: n.Checkpoints(), ReplicaIds: n.Replicas(),
	})
	if err != nil {
		tb.Fatal(err)
	}
	c.epochs[n.ID], c.acked[n.ID] = resp.GetEpoch(), resp.GetAcknowledgedSequence()
	c.Agents.Set(n.ID, n)
	if err := c.Report(tb, n, true); err != nil {
		tb.Fatal(err)
	}
}

// Report sends what a node has not sent yet; a full one also names every sandbox that it has.
func (c *Cluster) Report(tb testing.TB, n *Node, full bool) error {
	tb.Helper()
	changes := n.Changes(c.acked[n.ID])
	if full {
		changes = n.Standing()
	}
	resp, err := c.Control.Report(tb.Context(), &nodev1.ReportRequest{
		NodeId: string(n.ID), Epoch: c.epochs[n.ID], Changes: changes, Load: n.Load(), Full: full, Busy: n.Busy(),
		Time: timestamppb.New(time.Now().Add(c.Ahead)),
	})
	if err == nil {
		c.acked[n.ID] = resp.GetAcknowledgedSequence()
	}
	return err
}

// ReportChanges sends the given changes, whatever was sent before.
func (c *Cluster) ReportChanges(tb testing.TB, n *Node, changes []*nodev1.Change) error {
	tb.Helper()
	_, err := c.Control.Report(tb.Context(), &nodev1.ReportRequest{NodeId: string(n.ID), Epoch: c.epochs[n.ID], Changes: changes})
	return err
}

// Key makes an API key.
func (c *Cluster) Key(tb testing.TB) string {
	tb.Helper()
	_, secret, err := c.Records.CreateKey(tb.Context(), "test")
	if err != nil {
		tb.Fatal(err)
	}
	return secret
}

// Handler returns the API over the cluster.
func (c *Cluster) Handler() http.Handler {
	return api.New(api.Config{
		Control: c.Control, Auth: c.Records, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(),
	})
}

// Serve returns the URL of the API and a key for it.
func (c *Cluster) Serve(tb testing.TB) (url, key string) {
	tb.Helper()
	s := httptest.NewServer(c.Handler())
	tb.Cleanup(s.Close)
	return s.URL, c.Key(tb)
}
