package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/agent"
	"github.com/cloister-dev/cloister/internal/bucket"
	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/engine/gvisor"
	"github.com/cloister-dev/cloister/internal/engine/gvisor/sentry"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
	"github.com/cloister-dev/cloister/internal/gen/node/v1/nodev1connect"
	"github.com/cloister-dev/cloister/internal/guest/binary"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// nodeRole is the part that runs sandboxes.
type nodeRole struct {
	journal *journal.Journal
	engine  *gvisor.Engine
	network *guestnet.Manager
	agent   *agent.Agent
	uplink  *uplink
	// alone answers for the node itself; nil where the server is in the same process.
	alone *alone
	// commands and artifacts are what others reach of the node.
	commands, artifacts http.Handler
}

func (d *daemon) buildNode(ctx context.Context) error {
	capacity, memory, err := capacityOf(d.cfg)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(d.path("node", "scratch"), 0o700); err != nil {
		return fmt.Errorf("make scratch directory: %w", err)
	}
	jr, err := d.openJournal(ctx, capacity)
	if err != nil {
		return err
	}
	parts, err := d.nodeParts(jr.NodeID(), memory)
	if err != nil {
		return err
	}
	d.closers = append(d.closers, func() error { parts.network.Close(); return nil })
	images, err := d.imageStore()
	if err != nil {
		return err
	}
	saves, err := snapshot.New(d.path("node", "snapshots"), d.log)
	if err != nil {
		return fmt.Errorf("open checkpoints: %w", err)
	}
	parts.journal = jr
	deps := agent.Deps{
		Journal: jr, Engine: parts.engine, Network: parts.network, Images: images, Snapshots: saves,
		Registerer: d.metrics, Logger: d.log,
	}
	cfg := d.agentConfig(capacity)
	if err := d.connectNode(ctx, parts, &cfg, &deps); err != nil {
		return err
	}
	if parts.agent, err = agent.New(cfg, deps); err != nil {
		return fmt.Errorf("build node: %w", err)
	}
	_, parts.commands = agentv1connect.NewAgentServiceHandler(parts.agent)
	parts.artifacts = parts.agent.Artifacts()
	d.node = parts
	if d.server != nil {
		d.server.fleet.local = parts
		d.cluster.addLocal(parts)
	}
	return d.held.nameNode(jr.NodeID())
}

// openJournal opens the node's journal; the node of a machine that joined has the member's id.
func (d *daemon) openJournal(ctx context.Context, capacity sandbox.Resources) (*journal.Journal, error) {
	known := d.held.holder.Node
	if d.member != nil {
		known = sandbox.NodeID(d.member.identity.Member().ID)
	}
	jr, err := journal.Open(ctx, journalPath(d.cfg.DataDir), journal.Options{Capacity: capacity, MaxSandboxes: d.cfg.MaxSandboxes, NodeID: known})
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	d.closers = append(d.closers, jr.Close)
	if d.member != nil && jr.NodeID() != known {
		return nil, sandbox.Conflictf("the journal in %s is that of node %s, and this machine joined as %s: `cloister leave --force` clears both; then join again",
			d.path("node"), jr.NodeID(), known)
	}
	return jr, nil
}

// connectNode gives the node its way to a server: in this process, or over the link.
func (d *daemon) connectNode(ctx context.Context, parts *nodeRole, cfg *agent.Config, deps *agent.Deps) error {
	if d.cfg.S3Bucket != "" {
		b, err := bucket.New(bucket.Config{
			Endpoint: d.cfg.S3Endpoint, Bucket: d.cfg.S3Bucket, Prefix: d.cfg.S3Prefix, Region: d.cfg.S3Region,
			AccessKey: d.cfg.S3AccessKey, SecretKey: d.cfg.S3SecretKey,
		})
		if err != nil {
			return fmt.Errorf("open bucket: %w", err)
		}
		deps.Bucket = b
	}
	if d.member == nil {
		parts.uplink = newUplink(d.server.control)
		deps.Server, deps.Peers = parts.uplink, d.cluster.links
		return nil
	}
	return d.connectMember(ctx, parts, cfg, deps)
}

// connectMember is connectNode for a machine that joined.
func (d *daemon) connectMember(ctx context.Context, parts *nodeRole, cfg *agent.Config, deps *agent.Deps) error {
	m := d.member
	parts.uplink = newUplink(nodev1connect.NewNodeServiceClient(m.link.HTTPClient(), link.BaseURL))
	parts.uplink.refused = m.refused
	deps.Server, deps.Peers = parts.uplink, m
	cfg.Name, cfg.Address = m.choices.Name, m.advertise
	cfg.Labels = maps.Clone(m.choices.Labels)
	set, err := d.cfg.Labels()
	if err != nil {
		return err
	}
	for k, v := range set {
		if cfg.Labels == nil {
			cfg.Labels = make(map[string]string)
		}
		cfg.Labels[k] = v
	}
	parts.alone, err = d.newAlone(ctx, parts)
	if err != nil {
		return err
	}
	cfg.TokenSecret = parts.alone.secret
	deps.Local, deps.RememberSecret = parts.alone, parts.alone.remember
	return nil
}

// maxConnections is how many connections of one sandbox the machine tracks: the table is shared by all.
const maxConnections = 4096

// nodeParts makes what the node's id names on this machine.
func (d *daemon) nodeParts(id sandbox.NodeID, memory int64) (*nodeRole, error) {
	exe, err := sentry.Install(d.path("node", "bin"))
	if err != nil {
		return nil, err
	}
	eng, err := gvisor.New(gvisor.Config{
		ExePath: exe,
		Root:    d.path("node", "gvisor"), CgroupParent: "cloister-" + string(id), MemoryBudgetBytes: memory, Logger: d.log,
	})
	if err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	networks, err := guestnet.New(guestnet.Config{
		Range: d.cfg.Range(), Name: string(id), PoolSize: d.cfg.PoolMax / 2, Resolvers: resolvers(d.cfg),
		Denied: d.cfg.DeniedRanges(), MaxConnections: maxConnections, Logger: d.log,
	})
	if err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	return &nodeRole{engine: eng, network: networks}, nil
}

func (d *daemon) imageStore() (*image.Store, error) {
	images, err := image.New(image.Config{
		Dir: d.path("node", "images"), CacheDir: d.cfg.CacheDir, Guest: binary.Bytes, Logger: d.log, AnswerTimeout: d.cfg.RegistryTimeout,
	})
	if err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	return images, nil
}

func (d *daemon) agentConfig(capacity sandbox.Resources) agent.Config {
	poolMax := d.cfg.PoolMax
	if poolMax == 0 {
		poolMax = -1 // the agent's word for no pool
	}
	return agent.Config{
		Name: d.cfg.NodeName, Version: d.version, Architecture: runtime.GOARCH, Kernel: kernel(),
		Capacity: capacity, ScratchDir: d.path("node", "scratch"), Resolvers: resolvers(d.cfg),
		FilesDir:    d.path("node", "files"),
		MaxStarting: d.cfg.StartsAtOnce, WarmMin: d.cfg.PoolMin, WarmMax: poolMax,
		ReportInterval: d.cfg.NodeHeartbeat, IdleCPUPercent: d.cfg.IdleCPU,
	}
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// capacityOf returns what sandboxes of this machine may be promised, and the memory in bytes that they may really use.
func capacityOf(cfg *config.Config) (sandbox.Resources, int64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return sandbox.Resources{}, 0, fmt.Errorf("read memory size: %w", err)
	}
	free, err := freeForNode(cfg.DataDir)
	if err != nil {
		return sandbox.Resources{}, 0, err
	}
	total := int64(info.Totalram) * int64(info.Unit) //nolint:gosec // no machine has 2^63 bytes
	memory := total - int64(cfg.ReservedMemory)
	if memory < int64(cfg.SandboxMemory) {
		return sandbox.Resources{}, 0, sandbox.Invalidf("this machine has %d MiB of memory, reserved-memory keeps %s: no sandbox of %s fits; lower one of them",
			total>>20, cfg.ReservedMemory.String(), cfg.SandboxMemory.String())
	}
	disk := free - int64(cfg.ReservedDisk)
	return sandbox.Resources{
		MilliCPU:    int64(float64(runtime.NumCPU()) * 1000 * cfg.OvercommitCPU),
		MemoryBytes: int64(float64(memory) * cfg.OvercommitMemory),
		DiskBytes:   int64(float64(max(disk, 0)) * cfg.OvercommitDisk),
	}, memory, nil
}

// start brings back what an earlier process left running, then runs the node's loops.
func (n *nodeRole) start(ctx context.Context, loops *errgroup.Group) error {
	if n.alone != nil {
		n.alone.start(ctx, loops)
	}
	if err := n.agent.Recover(ctx); err != nil {
		return fmt.Errorf("recover node: %w", err)
	}
	loops.Go(func() error { return n.network.Run(ctx) })
	loops.Go(func() error { return n.agent.Run(ctx) })
	return nil
}

// roomEvery is how often the free disk space is compared with what is admitted.
const roomEvery = 10 * time.Second

// followRoom admits more once space is free that was not when the daemon started, until ctx ends.
func (d *daemon) followRoom(ctx context.Context) error {
	tick := time.NewTicker(roomEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now, _, err := capacityOf(d.cfg)
		if err == nil && now.DiskBytes > d.node.journal.Ledger().Capacity.DiskBytes {
			err = d.node.journal.RaiseCapacity(ctx, now)
		}
		if err != nil && ctx.Err() == nil {
			d.log.WarnContext(ctx, "free disk space not taken into account", slog.Any("err", err))
		}
	}
}

func journalPath(dataDir string) string { return filepath.Join(dataDir, "node", "journal.db") }

// dialFor connects to a port of a sandbox for another member.
func (n *nodeRole) dialFor(ctx context.Context, _ sandbox.Member, id sandbox.ID, port uint16) (net.Conn, error) {
	return n.agent.DialGuest(ctx, id, port)
}

// DialGuest connects to a port of a sandbox, for the node's own API.
func (n *nodeRole) DialGuest(ctx context.Context, node sandbox.NodeID, id sandbox.ID, port uint16) (net.Conn, error) {
	if node != n.agent.NodeID() {
		return nil, sandbox.NotFoundf("sandbox %s is on node %s, this is %s: ask a server", id, node, n.agent.NodeID())
	}
	return n.agent.DialLocal(ctx, id, port)
}
