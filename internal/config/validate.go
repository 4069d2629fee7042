package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// validate returns everything that is wrong, each with the setting, its value and the remedy.
func (c *Config) validate() error {
	return errors.Join(c.validateListening(), c.validateSizes(), c.validateNetwork(), c.validateOperation(), c.validateCluster(), c.validateBucket())
}

func (c *Config) validateListening() error {
	errs := []error{c.validateAddr("api-addr", c.APIAddr)}
	if c.ProxyAddr != "" {
		errs = append(errs, c.validateAddr("proxy-addr", c.ProxyAddr))
	}
	if c.DebugAddr != "" {
		errs = append(errs, c.validateAddr("debug-addr", c.DebugAddr))
	}
	if c.APIAddr == c.ProxyAddr {
		errs = append(errs, fmt.Errorf("api-addr and proxy-addr are both %q: want two addresses", c.APIAddr))
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		errs = append(errs, fmt.Errorf("tls-cert %q and tls-key %q: want both or neither", c.TLSCert, c.TLSKey))
	}
	for _, u := range []struct{ name, url string }{{"public-api-url", c.PublicAPIURL}, {"public-proxy-url", c.PublicProxyURL}, {"otlp-endpoint", c.OTLPEndpoint}} {
		if p, err := url.Parse(u.url); u.url != "" && (err != nil || p.Host == "" || (p.Scheme != "http" && p.Scheme != "https")) {
			errs = append(errs, fmt.Errorf("%s %q: want http://HOST or https://HOST", u.name, u.url))
		}
	}
	if strings.ContainsAny(c.Domain, "/ @") || strings.HasPrefix(c.Domain, ".") {
		errs = append(errs, fmt.Errorf("domain %q: want a host name such as sandbox.example.org", c.Domain))
	}
	return errors.Join(errs...)
}

// validateAddr checks a listening address: what is reachable from elsewhere has TLS, and profiles never are.
func (c *Config) validateAddr(name, addr string) error {
	host, port, err := net.SplitHostPort(addr)
	switch {
	case err != nil || port == "":
		return fmt.Errorf("%s %q: want HOST:PORT, such as 127.0.0.1:3000", name, addr)
	case loopback(host):
		return nil
	case name == "debug-addr":
		return fmt.Errorf("debug-addr %q: profiles are served on loopback only, such as 127.0.0.1:6060", addr)
	case c.TLSCert == "" && !c.InsecureListen:
		return fmt.Errorf("%s %q is reachable from other machines without TLS: set tls-cert and tls-key (`cloister cert` makes them), "+
			"or insecure-listen where a proxy in front adds TLS", name, addr)
	}
	return nil
}

// loopback reports whether host stands for this machine only.
func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

func (c *Config) validateSizes() error {
	var errs []error
	least := func(ok bool, name string, value any, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s %v: want %s", name, value, want))
		}
	}
	least(slices.Contains([]string{"fast", "standard"}, c.ProxyHTTP1), "proxy-http1", strconv.Quote(c.ProxyHTTP1), "fast or standard")
	least(slices.Contains([]string{StorageAuto, StorageDir, StorageImage}, c.Storage), "storage", strconv.Quote(c.Storage), "auto, dir or image")
	least(c.StorageSize == 0 || c.StorageSize >= leastStorage, "storage-size", c.StorageSize.String(), "0, or at least 512MiB")
	least(c.StorageSize == 0 || c.Storage != StorageDir, "storage-size", c.StorageSize.String(), "0 with storage dir: only an image has a size")
	least(c.SandboxCPU >= 0.1 && c.SandboxCPU <= 256, "sandbox-cpu", c.SandboxCPU, "0.1 to 256")
	least(c.SandboxMemory >= 64<<20, "sandbox-memory", c.SandboxMemory.String(), "at least 64MiB")
	least(c.SandboxDisk >= 16<<20, "sandbox-disk", c.SandboxDisk.String(), "at least 16MiB")
	least(c.PoolMin >= 0, "pool-min", c.PoolMin, "0 or more")
	least(c.PoolMax == 0 || c.PoolMax >= c.PoolMin, "pool-max", c.PoolMax, "0, or at least pool-min")
	least(c.StartsAtOnce >= 0, "starts-at-once", c.StartsAtOnce, "0 or more")
	least(c.MaxSandboxes >= 1, "max-sandboxes", c.MaxSandboxes, "1 or more")
	least(c.OvercommitCPU >= 1 && c.OvercommitCPU <= 10_000, "overcommit-cpu", c.OvercommitCPU, "1 to 10000")
	least(c.OvercommitMemory >= 1 && c.OvercommitMemory <= 10_000, "overcommit-memory", c.OvercommitMemory, "1 to 10000")
	least(c.OvercommitDisk >= 1 && c.OvercommitDisk <= 10_000, "overcommit-disk", c.OvercommitDisk, "1 to 10000")
	least(c.IdleCPU >= 0 && c.IdleCPU <= 25_600, "idle-cpu", c.IdleCPU, "0 to 25600")
	least(c.LifecyclePauseGrace >= time.Millisecond && c.LifecyclePauseGrace <= 10*time.Second, "lifecycle-pause-grace", c.LifecyclePauseGrace, "1ms to 10s")
	least(c.LifecycleRecheck >= 10*time.Millisecond && c.LifecycleRecheck <= time.Minute, "lifecycle-recheck", c.LifecycleRecheck, "10ms to 1m")
	least(c.MaxTimeout > 0, "max-timeout", c.MaxTimeout, "more than 0")
	least(c.RegistryTimeout > 0, "registry-timeout", c.RegistryTimeout, "more than 0")
	least(c.DefaultTemplate != "", "default-template", `""`, "a name")
	least(len(c.BaseSources) > 0, "base-sources", "[]", "at least one source")
	return errors.Join(errs...)
}

func (c *Config) validateNetwork() error {
	var errs []error
	p, err := netip.ParsePrefix(c.NetworkRange)
	if err != nil || !p.Addr().Is4() || !p.Masked().Addr().IsPrivate() || !lastAddr(p).IsPrivate() || p.Bits() < 12 || p.Bits() > 24 {
		errs = append(errs, fmt.Errorf("network-range %q: want a private IPv4 range of /12 to /24, such as 10.231.0.0/16", c.NetworkRange))
	}
	for _, r := range c.Resolvers {
		if a, err := netip.ParseAddr(r); err != nil || !a.Is4() || a.IsLoopback() {
			errs = append(errs, fmt.Errorf("resolvers: %q: want IPv4 addresses that sandboxes can reach, not loopback", r))
		}
	}
	for _, d := range c.NetworkDeny {
		if p, err := netip.ParsePrefix(d); err != nil || !p.Addr().Is4() {
			errs = append(errs, fmt.Errorf("network-deny: %q: want IPv4 ranges, such as 192.168.0.0/16", d))
		}
	}
	return errors.Join(errs...)
}

// lastAddr returns the last address of a range: the private ranges differ in width, so a range is private where it begins
// and ends so.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// maxDrainDelay bounds ProxyDrainDelay.
const maxDrainDelay = 10 * time.Minute

// missedBeats is after how many missing reports a node is suspect.
const missedBeats = 3

// SuspectAfter returns after how much silence a node is suspect.
func (c *Config) SuspectAfter() time.Duration { return missedBeats * c.NodeHeartbeat }

func (c *Config) validateOperation() error {
	var errs []error
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		errs = append(errs, fmt.Errorf("log-level %q: want debug, info, warn or error", c.LogLevel))
	}
	if !slices.Contains([]string{"auto", "text", "json"}, c.LogFormat) {
		errs = append(errs, fmt.Errorf("log-format %q: want auto, text or json", c.LogFormat))
	}
	if c.ShutdownGrace < 0 {
		errs = append(errs, fmt.Errorf("shutdown-grace %s: want 0 or more", c.ShutdownGrace))
	}
	if c.ProxyDrainDelay < 0 || c.ProxyDrainDelay > maxDrainDelay {
		errs = append(errs, fmt.Errorf("proxy-drain-delay %s: want 0s to %s", c.ProxyDrainDelay, maxDrainDelay))
	}
	if c.NodeHeartbeat < 100*time.Millisecond || c.NodeHeartbeat > time.Minute {
		errs = append(errs, fmt.Errorf("node-heartbeat %s: want 100ms to 1m", c.NodeHeartbeat))
	}
	if c.NodeDownAfter <= missedBeats*c.NodeHeartbeat {
		errs = append(errs, fmt.Errorf("node-down-after %s: want more than %d times node-heartbeat, which is %s", c.NodeDownAfter, missedBeats, c.NodeHeartbeat))
	}
	if c.EventsKept <= 0 || c.EventsKeptCount <= 0 {
		errs = append(errs, fmt.Errorf("events-kept %s and events-kept-count %d: want more than 0", c.EventsKept, c.EventsKeptCount))
	}
	return errors.Join(errs...)
}
