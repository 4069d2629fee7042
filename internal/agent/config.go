package agent

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/gen/node/v1/nodev1connect"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Config is what can be set. The zero value of a field means its default, where one is named.
type Config struct {
	// Name, Version, Architecture, Kernel and Labels are what the node says of itself when it registers.
	Name, Version, Architecture, Kernel string
	Labels                              map[string]string
	// Address is the HOST:PORT on which the node answers other members; empty where it cannot be dialed.
	Address string
	// CPUFeatures and Machine are what the processor and the machine have, before over-commit and reserve. Defaults: what the
	// kernel says.
	CPUFeatures []string
	Machine     sandbox.Resources
	// TokenSecret is what access tokens are derived from, as a server said earlier: with it, the node creates sandboxes
	// before it has reached a server. A registration replaces it.
	TokenSecret []byte
	// Capacity is what sandboxes may hold; the journal enforces it.
	Capacity sandbox.Resources
	// ScratchDir is the directory on the file system that takes what guests write.
	ScratchDir string
	// Resolvers are the name servers that sandboxes use; empty leaves the image's own.
	Resolvers []netip.Addr

	// GuestArgs is the first process of a sandbox. Default: /usr/local/bin/cloister-guest.
	GuestArgs []string
	// GuestPort is where the agent inside listens. Default: 49983.
	GuestPort uint16
	// GuestVersion is the version of the E2B agent contract that it speaks. Default: 0.6.13.
	GuestVersion string

	// MaxStarting is how many cold starts run at once. Default: twice the cores.
	MaxStarting int
	// MaxWaiting is how many more may wait for their turn. Default: 1,000.
	MaxWaiting int
	// CreateTimeout bounds a create, its wait included. Default: 60 s.
	CreateTimeout time.Duration
	// GuestTimeout bounds the time from the start of a guest to the first answer of the agent inside. Default: 30 s.
	GuestTimeout time.Duration
	// ClaimTimeout bounds the handing over of a warm sandbox before another is tried. Default: 2 s.
	ClaimTimeout time.Duration
	// StopTimeout bounds one attempt to end a sandbox. Default: 20 s.
	StopTimeout time.Duration

	// WarmMin and WarmMax bound the number of warm sandboxes per image and size that was asked for lately. Defaults: 2
	// and 16; a negative WarmMax switches the pool off.
	WarmMin, WarmMax int
	// WarmKeep is for how long after its last use a pool is kept up. Default: 1 h.
	WarmKeep time.Duration
	// WarmIdle is for how long after its last use a pool keeps more than it needs. Default: 1 min.
	WarmIdle time.Duration
	// MemoryPressure reports whether the machine is short of memory; the pool is then given back. Default: the kernel's
	// pressure and available memory, see MemoryPressure.
	MemoryPressure func() bool
	// SinceBoot names the machine's last start and says what the clock shows that counts from it and that nobody sets. Default:
	// what the kernel says.
	SinceBoot func() (id string, up time.Duration)

	// FilesDir is the directory of what builds copy from, and of what they work on. Empty refuses files and steps.
	FilesDir string
	// MaxBuilds is how many builds run at once; more wait in line. Default: the cores.
	MaxBuilds int

	// PauseTimeout bounds a pause, a snapshot, and the restoring of a rollback. Default: 5 min.
	PauseTimeout time.Duration

	// SampleInterval is the time between two samples of each sandbox's use, and Samples how many of them are kept.
	// Defaults: 5 s and 360.
	SampleInterval time.Duration
	Samples        int
	// IdleCPUPercent is how much of a core a sandbox whose end moves with its use must use to be in use, in percent; 0 or
	// less leaves the processor out.
	IdleCPUPercent float64
	// ReportInterval is the longest time between two reports. Default: 5 s.
	ReportInterval time.Duration
	// Retention is for how long an ended sandbox is remembered, at least until the server knows. Default: 10 min.
	Retention time.Duration
}

// Deps is what an Agent works with. All fields but Peers, Bucket, Dial, Registerer and Logger are required.
type Deps struct {
	Journal *journal.Journal
	Engine  engine.Engine
	Network network
	Images  images
	// Snapshots keeps checkpoints; the Agent calls its Recover.
	Snapshots checkpoints
	Server    nodev1connect.NodeServiceClient
	// Local is a second server, in this process, that is told the same. What it acknowledges is between it and the node: only
	// Server decides when a change need not be kept.
	Local nodev1connect.NodeServiceClient
	// RememberSecret keeps a secret, for Config.TokenSecret of the node's next life; called when a registration brings another
	// one. The node goes on when it fails, and calls it again with the next registration.
	RememberSecret func(secret []byte) error
	// Peers connects to other nodes, for images and checkpoints that they have. Nil: there are none.
	Peers peers
	// Bucket keeps checkpoints for the case that nodes are lost. Nil: there is none.
	Bucket bucketStore
	// Dial connects to guests. Default: a net.Dialer.
	Dial       func(ctx context.Context, network, address string) (net.Conn, error)
	Registerer prometheus.Registerer
	Logger     *slog.Logger
}

func withDefaults(c Config) Config {
	if len(c.GuestArgs) == 0 {
		c.GuestArgs = []string{"/usr/local/bin/cloister-guest"}
	}
	if c.GuestVersion == "" {
		c.GuestVersion = "0.6.13"
	}
	if c.MemoryPressure == nil {
		c.MemoryPressure = MemoryPressure
	}
	if c.SinceBoot == nil {
		c.SinceBoot = sinceBoot
	}
	if c.CPUFeatures == nil {
		info, _ := os.ReadFile("/proc/cpuinfo")
		c.CPUFeatures = processorFeatures(info)
	}
	if c.Machine == (sandbox.Resources{}) {
		c.Machine = machineOf(c.ScratchDir)
	}
	orDefault(&c.GuestPort, 49983)
	orDefault(&c.MaxStarting, 2*runtime.GOMAXPROCS(0))
	orDefault(&c.MaxWaiting, 1000)
	orDefault(&c.CreateTimeout, time.Minute)
	orDefault(&c.GuestTimeout, 30*time.Second)
	orDefault(&c.ClaimTimeout, 2*time.Second)
	orDefault(&c.StopTimeout, 20*time.Second)
	orDefault(&c.MaxBuilds, runtime.GOMAXPROCS(0))
	orDefault(&c.PauseTimeout, 5*time.Minute)
	orDefault(&c.WarmMin, 2)
	orDefault(&c.WarmMax, 16)
	orDefault(&c.WarmKeep, time.Hour)
	orDefault(&c.WarmIdle, time.Minute)
	orDefault(&c.SampleInterval, 5*time.Second)
	orDefault(&c.Samples, 360)
	orDefault(&c.ReportInterval, 5*time.Second)
	orDefault(&c.Retention, 10*time.Minute)
	c.WarmMax = max(0, c.WarmMax)
	c.WarmMin = max(0, min(c.WarmMin, c.WarmMax))
	return c
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
