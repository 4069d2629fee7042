// Package config is the one struct of settings: its defaults, where they come from, and what makes them valid.
//
// A setting comes from its flag, else from the environment, else from the file, else it has its default. No other package
// reads the environment. The package performs no I/O but reading the file; a Config is not changed after Load.
package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"time"

	"github.com/spf13/pflag"
)

// Config is every setting of the daemon. A field's name tag is its flag, its key in the file and, as CLOISTER_DATA_DIR for
// data-dir, its environment variable; its help tag is the text for people; group starts a section of the reference.
type Config struct {
	DataDir     string `name:"data-dir" group:"General" help:"directory for everything that Cloister keeps"`
	CacheDir    string `name:"cache-dir" help:"directory for downloads that may be deleted at any time; default: cache in the data directory"`
	Storage     string `name:"storage" help:"where sandboxes' files go: dir (the data directory), image (storage.img there, an XFS file system on which pause, resume, snapshot and fork share blocks instead of copying), or auto (what the data directory has; dir where it is new)"`
	StorageSize Size   `name:"storage-size" help:"size of storage.img, which takes only the space that is written; can be raised later; 0: four fifths of what is free when it is made"`
	NodeName    string `name:"node-name" help:"name of this machine in lists; default: its host name"`

	APIAddr        string `name:"api-addr" group:"Listening" help:"address of the E2B and /v1 API"`
	ProxyAddr      string `name:"proxy-addr" help:"address of the proxy for sandbox traffic; empty leaves it to proxies on other machines (cloister server only)"`
	DebugAddr      string `name:"debug-addr" help:"loopback address for pprof and unauthenticated metrics; empty switches it off"`
	Domain         string `name:"domain" help:"domain below which sandboxes have host names: PORT-ID.DOMAIN; may carry a port; empty accepts any"`
	PublicAPIURL   string `name:"public-api-url" help:"URL by which clients reach the API; default: from api-addr"`
	PublicProxyURL string `name:"public-proxy-url" help:"URL by which clients reach the proxy; default: from proxy-addr"`
	TLSCert        string `name:"tls-cert" help:"PEM file with the certificate chain of API and proxy; read again when it changes"`
	TLSKey         string `name:"tls-key" help:"PEM file with the certificate's private key"`
	ProxyHTTP1     string `name:"proxy-http1" help:"data path of HTTP/1.1 into sandboxes: fast, or standard, which is net/http's and slower"`
	InsecureListen bool   `name:"insecure-listen" help:"allow listening beyond loopback without TLS, for use behind a proxy that adds it"`

	ClusterAddr       string        `name:"cluster-addr" group:"Cluster" help:"address that joining machines and members reach a server on, with mutual TLS by the cluster's own authority; cloister up opens it once a join token was made"`
	ClusterAdvertise  string        `name:"cluster-advertise" help:"HOST:PORT of cluster-addr as other machines reach it; default: this machine's address on its default route"`
	Proxies           []string      `name:"proxies" help:"URLs, https://HOST:PORT, of proxies that this server dials because they cannot dial it; each waits on its link-addr; the port is 3005 where there is none (roles with a server only)"`
	LinkAddr          string        `name:"link-addr" help:"address that a proxy waits for its servers on, with mutual TLS, where it cannot dial them; they list it in proxies; empty: it dials (cloister proxy only)"`
	NodeAddr          string        `name:"node-addr" help:"address that proxies and other nodes reach a joined node on, with mutual TLS; empty where none can: then its traffic goes by way of the server"`
	NodeAddress       string        `name:"node-address" help:"HOST or HOST:PORT of node-addr as other machines reach it; default: this machine's address on its way to the server"`
	NodeLabels        []string      `name:"node-labels" help:"labels of this node, as KEY=VALUE"`
	CertificateLife   time.Duration `name:"certificate-life" help:"how long a member's certificate is valid; it is renewed at a half to two thirds of that"`
	CertificateGrace  time.Duration `name:"certificate-grace" help:"how long after the end of its certificate a member that was switched off or cut off comes back without a new token"`
	SnapshotReplicas  int           `name:"snapshot-replicas" help:"how many nodes keep what a sandbox is paused in, where there are so many; 1 keeps it on its own node alone"`
	TemplatePlacement string        `name:"template-placement" help:"which nodes have a template before it is asked for there: on_demand (none), all, or a number of nodes"`

	S3Endpoint  string `name:"s3-endpoint" group:"Bucket" help:"URL of an S3-compatible service that keeps copies of what sandboxes are paused in"`
	S3Bucket    string `name:"s3-bucket" help:"its bucket; empty keeps no copies there"`
	S3Region    string `name:"s3-region" help:"its region; empty asks the service"`
	S3AccessKey string `name:"s3-access-key" help:"its access key"`
	S3SecretKey string `name:"s3-secret-key" secret:"true" help:"its secret key"`
	S3Prefix    string `name:"s3-prefix" help:"what the names of all objects in the bucket begin with"`

	DefaultTemplate  string        `name:"default-template" group:"Templates" help:"template that the first start builds and that a create without one uses"`
	BaseSources      []string      `name:"base-sources" help:"sources of the default template, tried in order: registry reference, oci:PATH, docker-archive:PATH, dir:PATH, debian:SUITE"`
	RegistryTimeout  time.Duration `name:"registry-timeout" help:"how long a registry may take to answer before the next source is tried"`
	RegistryUsername string        `name:"registry-username" help:"user name for the registry of base-sources"`
	RegistryPassword string        `name:"registry-password" secret:"true" help:"password or token for the registry of base-sources"`

	SandboxCPU     float64       `name:"sandbox-cpu" group:"Sandboxes" help:"processors of a sandbox whose template says nothing"`
	SandboxMemory  Size          `name:"sandbox-memory" help:"memory of a sandbox whose template says nothing"`
	SandboxDisk    Size          `name:"sandbox-disk" help:"disk of a sandbox whose template says nothing"`
	MaxTimeout     time.Duration `name:"max-timeout" help:"longest time that a sandbox may ask for at once"`
	PoolMin        int           `name:"pool-min" help:"fewest warm sandboxes kept per template in use"`
	PoolMax        int           `name:"pool-max" help:"most warm sandboxes kept per template; 0 switches the pool off"`
	StartsAtOnce   int           `name:"starts-at-once" help:"cold starts under way at the same time; 0 means twice the number of cores"`
	MaxSandboxes   int           `name:"max-sandboxes" help:"most sandboxes on this machine, warm ones included"`
	ReservedMemory Size          `name:"reserved-memory" help:"memory that sandboxes never get"`
	ReservedDisk   Size          `name:"reserved-disk" help:"disk space that sandboxes never get"`

	OvercommitCPU    float64 `name:"overcommit-cpu" help:"processors admitted per processor of the machine: idle sandboxes use none"`
	OvercommitMemory float64 `name:"overcommit-memory" help:"memory admitted per byte that sandboxes may have; 1 admits only what can be used all at once"`
	OvercommitDisk   float64 `name:"overcommit-disk" help:"disk admitted per free byte; 1 admits only what can be written all at once"`

	SchedulerStrategy        string        `name:"scheduler-strategy" group:"Scheduling" help:"spread (least loaded node), binpack (fullest that has room), round_robin or sticky (the node that the sandbox's key had last); SIGHUP reads this section again"`
	SchedulerSample          int           `name:"scheduler-sample" help:"how many nodes that can take a sandbox are compared"`
	SchedulerPrioritySelect  int           `name:"scheduler-priority-select-num" help:"among how many of the best of them the first is drawn; 1 takes the best"`
	SchedulerLeastSelect     string        `name:"scheduler-least-select-name" help:"how it is drawn: random, or weighted by the score"`
	SchedulerMaxCreating     int           `name:"scheduler-max-creating" help:"creations under way at one node; beyond it other nodes are asked"`
	SchedulerMaxFailures     float64       `name:"scheduler-max-failures" help:"recent failures from which on a node is asked only where there is no other"`
	SchedulerFailureHalfLife time.Duration `name:"scheduler-failure-half-life" help:"time after which a failure counts half"`
	SchedulerWeights         []string      `name:"scheduler-weights" help:"what counts how much, as NAME=NUMBER of load, warm, creating, sandboxes, used_cpu, used_memory, image and affinity; a name that is left out has its default"`
	SchedulerOvercommit      []string      `name:"scheduler-overcommit" help:"factors of what nodes say that they have, as cpu=NUMBER, memory=NUMBER, disk=NUMBER; below 1 leaves a part free; a node's own admission has the last word"`
	SchedulerReserved        []string      `name:"scheduler-reserved" help:"what is left free on each node for sandboxes that resume there, as cpu=NUMBER, memory=SIZE, disk=SIZE"`
	NodeHeartbeat            time.Duration `name:"node-heartbeat" help:"longest time between two reports of a node; after 3 missed ones it is suspect and gets no new sandboxes"`
	NodeDownAfter            time.Duration `name:"node-down-after" help:"silence after which a node is down"`

	LifecyclePauseGrace time.Duration `name:"lifecycle-pause-grace" group:"Lifecycle" help:"how long requests that are open when a sandbox's timeout comes may go on before it is paused"`
	LifecycleRecheck    time.Duration `name:"lifecycle-recheck" help:"how soon a sandbox is looked at again that is in use beyond its timeout, or of which a proxy or a node could know more"`
	IdleCPU             float64       `name:"idle-cpu" help:"percent of a core from which on a sandbox whose timeout counts from its last use is in use though nobody talks to it; 0 leaves the processor out"`

	NetworkRange string   `name:"network-range" group:"Network" help:"private IPv4 range (/12 to /24) of sandbox addresses; two per sandbox"`
	NetworkDeny  []string `name:"network-deny" help:"IPv4 ranges that no sandbox may reach, beside loopback, link-local and the clouds' metadata services; empty opens the networks around the machine; the resolvers stay reachable"`
	Resolvers    []string `name:"resolvers" help:"IPv4 addresses of the name servers that sandboxes use; default: the machine's"`

	LogLevel        string        `name:"log-level" group:"Operation" help:"debug, info, warn or error"`
	LogFormat       string        `name:"log-format" help:"auto (text on a terminal, else JSON), text or json"`
	OTLPEndpoint    string        `name:"otlp-endpoint" help:"URL that OpenTelemetry traces are sent to by OTLP over HTTP; empty switches it off"`
	ShutdownGrace   time.Duration `name:"shutdown-grace" help:"how long requests under way may take after a stop was asked for"`
	ProxyDrainDelay time.Duration `name:"proxy-drain-delay" help:"how long a proxy that was told to stop goes on taking connections, with 503 on /readyz, so that load balancers see it before; a second signal ends it (cloister proxy only)"`
	EventsKept      time.Duration `name:"events-kept" help:"how long events are kept"`
	EventsKeptCount int           `name:"events-kept-count" help:"how many events are kept at most"`
}

// The values of Storage.
const (
	StorageAuto  = "auto"
	StorageDir   = "dir"
	StorageImage = "image"
)

// The words of TemplatePlacement.
const (
	PlaceOnDemand = "on_demand"
	PlaceAll      = "all"
)

// leastStorage is the smallest StorageSize: XFS wants 300 MiB, and a template and a sandbox more.
const leastStorage = 512 << 20

// Default returns the settings that hold where nothing else is said.
func Default() *Config {
	return &Config{
		DataDir: "/var/lib/cloister", Storage: StorageAuto, APIAddr: "127.0.0.1:3000", ProxyAddr: "127.0.0.1:3002", ProxyHTTP1: "fast",
		ClusterAddr: ":3003", NodeAddr: ":3004", CertificateLife: 24 * time.Hour, CertificateGrace: 7 * 24 * time.Hour, SnapshotReplicas: 2, TemplatePlacement: PlaceOnDemand,
		S3Region:        "us-east-1",
		DefaultTemplate: "base", BaseSources: []string{"e2bdev/base:latest", "debian:bookworm"}, RegistryTimeout: 5 * time.Second,
		SandboxCPU: 2, SandboxMemory: 512 << 20, SandboxDisk: 10 << 30, MaxTimeout: 24 * time.Hour, IdleCPU: 10,
		PoolMin: 4, PoolMax: 32, MaxSandboxes: 2000, ReservedMemory: 1 << 30, ReservedDisk: 2 << 30,
		OvercommitCPU: 200, OvercommitMemory: 4, OvercommitDisk: 40,
		SchedulerStrategy: "spread", SchedulerSample: 8, SchedulerPrioritySelect: 1, SchedulerLeastSelect: "random",
		SchedulerMaxCreating: 1000, SchedulerMaxFailures: 5, SchedulerFailureHalfLife: 30 * time.Second,
		LifecyclePauseGrace: 5 * time.Second, LifecycleRecheck: time.Second,
		NodeHeartbeat: 2 * time.Second, NodeDownAfter: 15 * time.Second,
		NetworkRange: "10.231.0.0/16", NetworkDeny: []string{"10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"},
		LogLevel: "info", LogFormat: "auto", ShutdownGrace: 10 * time.Second, ProxyDrainDelay: 5 * time.Second,
		EventsKept: 30 * 24 * time.Hour, EventsKeptCount: 1_000_000,
	}
}

// Flags adds a flag for each setting, and --config for the file.
func Flags(fs *pflag.FlagSet) {
	fs.String("config", "", "YAML `file` with settings [CLOISTER_CONFIG]")
	Default().register(fs)
}

// register makes fs set c's fields.
func (c *Config) register(fs *pflag.FlagSet) {
	v := reflect.ValueOf(c).Elem()
	for i := range v.NumField() {
		tag := v.Type().Field(i).Tag
		name, help := tag.Get("name"), tag.Get("help")+" ["+envName(tag.Get("name"))+"]"
		switch at := v.Field(i).Addr().Interface().(type) {
		case *string:
			fs.StringVar(at, name, *at, help)
		case *bool:
			fs.BoolVar(at, name, *at, help)
		case *int:
			fs.IntVar(at, name, *at, help)
		case *float64:
			fs.Float64Var(at, name, *at, help)
		case *time.Duration:
			fs.DurationVar(at, name, *at, help)
		case *[]string:
			fs.StringSliceVar(at, name, *at, help)
		case *Size:
			fs.Var(at, name, help)
		default:
			panic(fmt.Sprintf("config: setting %s has a type that has no flag", name))
		}
	}
}

// ResolverAddrs returns Resolvers as addresses; Load has checked them.
func (c *Config) ResolverAddrs() []netip.Addr {
	out := make([]netip.Addr, 0, len(c.Resolvers))
	for _, r := range c.Resolvers {
		if a, err := netip.ParseAddr(r); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// DeniedRanges returns NetworkDeny as prefixes; Load has checked it.
func (c *Config) DeniedRanges() []netip.Prefix {
	out := make([]netip.Prefix, 0, len(c.NetworkDeny))
	for _, d := range c.NetworkDeny {
		if p, err := netip.ParsePrefix(d); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// Range returns NetworkRange as a prefix; Load has checked it.
func (c *Config) Range() netip.Prefix {
	p, err := netip.ParsePrefix(c.NetworkRange)
	if err != nil {
		return netip.Prefix{}
	}
	return p.Masked()
}
