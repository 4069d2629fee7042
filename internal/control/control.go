package control

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// agents reaches nodes. The second result is false while the node is not connected.
type agents interface {
	Agent(node sandbox.NodeID) (agentv1connect.AgentServiceClient, bool)
}

// templates keeps template records; every name finds one template. Update calls change with the newest record, and
// again when somebody else was faster.
type templates interface {
	CreateTemplate(ctx context.Context, t sandbox.Template) error
	Template(ctx context.Context, idOrName string) (sandbox.Template, error)
	UpdateTemplate(ctx context.Context, id sandbox.TemplateID, change func(*sandbox.Template) error) (sandbox.Template, error)
	DeleteTemplate(ctx context.Context, id sandbox.TemplateID) (sandbox.Template, error)
	Templates(ctx context.Context) ([]sandbox.Template, error)
}

// nodes keeps node records.
type nodes interface {
	PutNode(ctx context.Context, n sandbox.Node) error
	DeleteNode(ctx context.Context, id sandbox.NodeID) error
	Nodes(ctx context.Context) ([]sandbox.Node, error)
}

// settings keeps what administrators set for nodes.
type settings interface {
	NodeSettings(ctx context.Context) (map[sandbox.NodeID]sandbox.NodeSettings, error)
	UpdateNodeSettings(ctx context.Context, id sandbox.NodeID, change func(*sandbox.NodeSettings) error) (sandbox.NodeSettings, error)
	DeleteNodeSettings(ctx context.Context, id sandbox.NodeID) error
}

// secrets returns a secret of the cluster and makes it on first use.
type secrets interface {
	Secret(ctx context.Context, name string, size int) ([]byte, error)
}

// keys mints, lists and revokes API keys. CreateKey's string is the key itself, shown once.
type keys interface {
	CreateKey(ctx context.Context, name string) (Key, string, error)
	Keys(ctx context.Context) ([]Key, error)
	RevokeKey(ctx context.Context, id string) error
}

// history keeps events. An event with a node and a sequence that is already kept is not kept twice.
type history interface {
	Append(ctx context.Context, events []Event) error
	Query(ctx context.Context, q EventQuery) ([]Event, error)
}

// Limits is what a request may ask for, and what it gets where it does not ask.
type Limits struct {
	// MaxTimeout bounds a sandbox's life from its last timeout on; 24 h by default.
	MaxTimeout time.Duration
	// CreateDeadline bounds a create over all the nodes that are asked; 55 s by default, below the clients' 60.
	CreateDeadline time.Duration
	// CallDeadline bounds every other call of a node; 15 s by default.
	CallDeadline time.Duration
	// DefaultResources are those of a template that names none: 2 cores, 512 MiB, 4 GiB by default.
	DefaultResources sandbox.Resources
	// EndedFor and EndedMax bound how long and how many ended sandboxes stay findable: 1 h and 10,000 by default.
	EndedFor time.Duration
	EndedMax int
	// MaxBuilds bounds how many builds are under way at once: 20 by default.
	MaxBuilds int
	// MaxUpload and MaxUploads bound one upload and all of them, in bytes: 8 GiB and 32 GiB by default.
	MaxUpload  int64
	MaxUploads int64
	// SuspectAfter and DownAfter are how long a node may be silent: 6 s, which is 3 heartbeats, and 15 s by default.
	SuspectAfter time.Duration
	DownAfter    time.Duration
	// SnapshotReplicas is how many nodes keep what a sandbox is paused in, its own included, where there are so many:
	// 2 by default, and 1 keeps no copy.
	SnapshotReplicas int
	// Bucket means that nodes have a bucket to keep checkpoints in, beside the replicas.
	Bucket bool
	// TemplatePlacement is how many nodes get a template before it is asked for there: 0, which is the default, for none
	// and -1 for all. A template's own setting goes before it.
	TemplatePlacement int
	// OneNode means that this control is a node's own: a server keeps what has ended there, and knows what went elsewhere.
	OneNode bool
}

func (l Limits) withDefaults() Limits {
	setDefault(&l.MaxTimeout, 24*time.Hour)
	setDefault(&l.CreateDeadline, 55*time.Second)
	setDefault(&l.CallDeadline, 15*time.Second)
	setDefault(&l.EndedFor, time.Hour)
	setDefault(&l.EndedMax, 10_000)
	setDefault(&l.MaxBuilds, 20)
	setDefault(&l.MaxUpload, 8<<30)
	setDefault(&l.MaxUploads, 32<<30)
	setDefault(&l.SuspectAfter, 6*time.Second)
	setDefault(&l.DownAfter, 15*time.Second)
	setDefault(&l.SnapshotReplicas, 2)
	setDefault(&l.DefaultResources, sandbox.Resources{MilliCPU: 2000, MemoryBytes: 512 << 20, DiskBytes: 4 << 30})
	return l
}

func setDefault[T comparable](at *T, value T) {
	var zero T
	if *at == zero {
		*at = value
	}
}

// Config is what a Control is made of. Everything but Limits, Policy, About and Random is required.
type Config struct {
	Agents    agents
	Templates templates
	Nodes     nodes
	Settings  settings
	Policies  policies
	// Placements, Replicas, Intents and Pins keep what is decided about single sandboxes.
	Placements placements
	Replicas   replicas
	Intents    intents
	Pins       pins
	// Stored keeps what may be in the bucket; it is required where Limits say that there is one.
	Stored  stored
	Secrets secrets
	Keys    keys
	History history
	Log     *slog.Logger
	Limits  Limits
	Policy  scheduler.Policy
	About   About
	// Members, Tokens, Authority and Gate let machines join; without one of them nobody can. CertificateLife is how long a
	// member's certificate is good: 24 h by default.
	Members         members
	Tokens          tokens
	Authority       authority
	Gate            gate
	CertificateLife time.Duration
	// CertificateGrace is how long after the end of its certificate a member comes back without a new token: 7 days by default.
	CertificateGrace time.Duration
	// Presences keeps which proxies there are; without it only those count that report.
	Presences presences
	// Listed are the addresses of the proxies that this server dials, as ProxyReached is told of them; nothing counts as idle
	// before each of them was heard.
	Listed []string
	// Random picks the scheduler's samples; nil means one seeded by the system. It is called by one goroutine at a time.
	Random scheduler.Source
	// UploadDir is where the files are kept that builds copy from; it is made with the first of them.
	UploadDir string
}

// Control carries out what the API asks for.
type Control struct {
	agents    agents
	templates templates
	nodes     nodes
	settings  settings
	policies  policies
	keys      keys
	history   history
	log       *slog.Logger
	limits    Limits
	about     About
	started   time.Time
	joining   *joining

	placements placements
	replicas   replicas
	intents    intents
	pins       pins
	stored     stored

	index   *index
	fleet   *fleet
	noted   *noted
	busy    *busy
	strays  *strays
	drains  *drains
	copies  *copies
	catalog *catalog
	builds  *builds
	uploads *uploads
	finder  *finder
	saving  saving
	// routes numbers what changes for those who follow it; whole is the table as it is sent to them.
	routes   *routeLog
	whole    wholeTables
	wakes    *wakes
	activity *activity
	ends     *endings
	// attendance is which proxies there are, presences where that is kept.
	attendance *attendance
	presences  presences
	// sweeps hands what nodes registered with to Run.
	sweeps chan roll
	// lookups bounds how often an id that is not in the index is asked for at its node.
	lookups *rate.Limiter
	secret  []byte
}

const tokenSecretBytes = 32

// New returns a Control that knows the stored nodes and no sandbox yet: those come with the nodes' reports. It reads
// the store, and starts nothing.
func New(ctx context.Context, cfg Config) (*Control, error) {
	secret, err := cfg.Secrets.Secret(ctx, "sandbox-access-token", tokenSecretBytes)
	if err != nil {
		return nil, fmt.Errorf("read the token secret: %w", err)
	}
	known, err := cfg.Nodes.Nodes(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the known nodes: %w", err)
	}
	wanted, err := cfg.Settings.NodeSettings(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the settings of nodes: %w", err)
	}
	if cfg.Random == nil {
		cfg.Random = rand.NewPCG(rand.Uint64(), rand.Uint64()) //nolint:gosec // balances load, guards nothing
	}
	limits := cfg.Limits.withDefaults()
	c := &Control{
		agents: cfg.Agents, templates: cfg.Templates, nodes: cfg.Nodes,
		settings: cfg.Settings, policies: cfg.Policies, keys: cfg.Keys, history: cfg.History,
		log: cfg.Log, limits: limits, about: cfg.About, started: time.Now(), secret: secret,
		joining:    newJoining(&cfg),
		placements: cfg.Placements, replicas: cfg.Replicas, intents: cfg.Intents, pins: cfg.Pins, stored: cfg.Stored,
		index:   newIndex(limits.EndedFor, limits.EndedMax),
		noted:   newNoted(),
		busy:    newBusy(),
		strays:  newStrays(),
		drains:  newDrains(),
		copies:  newCopies(),
		fleet:   newFleet(cfg.Policy, cfg.Random, limits),
		catalog: newCatalog(),
		builds:  newBuilds(limits.MaxBuilds),
		uploads: newUploads(cfg.UploadDir, limits.MaxUpload, limits.MaxUploads),
		finder:  newFinder(),
		routes:  newRouteLog(), wakes: newWakes(), activity: newActivity(time.Now(), cfg.Presences == nil, cfg.Listed),
		ends:       newEndings(),
		attendance: newAttendance(), presences: cfg.Presences,
		sweeps:  make(chan roll, maxSweeps),
		lookups: rate.NewLimiter(200, 200),
	}
	c.index.routes, c.fleet.routes = c.routes, c.routes
	for _, n := range known {
		c.fleet.restore(n, wanted[n.ID], c.started)
	}
	if err := c.loadNoted(ctx); err != nil {
		return nil, err
	}
	return c, c.loadPolicy(ctx)
}

// pruneEvery is how often ended sandboxes are forgotten.
const pruneEvery = time.Minute

// Run follows builds and forgets ended sandboxes until ctx ends; it returns when its goroutines have.
func (c *Control) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.runBuilds(ctx) })
	g.Go(func() error { c.runSweeps(ctx); return nil })
	g.Go(func() error { c.watchNodes(ctx); return nil })
	g.Go(func() error { c.runLeavers(ctx); return nil })
	g.Go(func() error { c.runSettle(ctx); return nil })
	g.Go(func() error { c.runDrains(ctx); return nil })
	g.Go(func() error { c.runReplicas(ctx); return nil })
	g.Go(func() error { return c.runUploads(ctx) })
	g.Go(func() error { <-ctx.Done(); c.wakes.close(); return nil })
	g.Go(func() error { c.runPresences(ctx); return nil })
	g.Go(func() error {
		tick := time.NewTicker(pruneEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case now := <-tick.C:
				c.index.prune(now)
				c.whole.prune()
				c.ends.keep(c.activity.prune(now, c.index.has), c.index.has)
			}
		}
	})
	if err := g.Wait(); err != nil {
		return fmt.Errorf("run control: %w", err)
	}
	return nil
}

// agent returns the client of a node, or ErrUnavailable.
func (c *Control) agent(node sandbox.NodeID) (agentv1connect.AgentServiceClient, error) {
	a, ok := c.agents.Agent(node)
	if !ok {
		return nil, sandbox.Unavailablef("node %s is not connected", node)
	}
	return a, nil
}
