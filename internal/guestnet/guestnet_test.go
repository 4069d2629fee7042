package guestnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) {
	if os.Getenv(stormSwitch) != "" { //nolint:forbidigo // how the test tells its child what it is
		storm()
	}
	goleak.VerifyTestMain(m)
}

func TestReach(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	a, b := l.acquire(m, "sandboxa", true), l.acquire(m, "sandboxb", true)
	web := l.serveIn(l.outside, outsideAddr+":0")
	inA, inB := l.serveGuest(a), l.serveGuest(b)

	for _, tc := range []struct {
		guest Attachment
		at    netip.AddrPort
	}{{a, inA}, {b, inB}} {
		seen, err := dial(tc.at)
		if err != nil || seen != tc.guest.Gateway {
			t.Errorf("machine to guest %s: seen as %s, %v, want its gateway %s", tc.at, seen, err, tc.guest.Gateway)
		}
	}
	l.wantReach(a, web, hostAddr)
	l.wantReach(b, web, hostAddr)
	l.wantNoReach(a, inB)
	l.wantNoReach(b, inA)
	// Addresses of the range without a sandbox answer at once.
	if _, err := dial(port("10.199.77.77", web)); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("machine to an address without a sandbox: %v, want %v", err, syscall.EHOSTUNREACH)
	}
	l.wantNoReach(a, port("10.199.77.77", web))
	// The outside may not open connections to guests, though it knows the way.
	l.in(l.outside, func() error {
		if _, err := dial(inA); err == nil {
			t.Errorf("the outside reaches guest %s", inA)
		}
		return nil
	})
}

func TestMachineIsOutOfReach(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	a, b := l.acquire(m, "sandboxa", true), l.acquire(m, "sandboxb", true)
	everywhere := l.serveIn(l.host, "0.0.0.0:0")
	for _, addr := range []string{hostAddr, a.Gateway.String(), b.Gateway.String()} {
		if _, err := dial(port(addr, everywhere)); err != nil {
			t.Errorf("machine to itself at %s: %v", addr, err)
		}
		l.wantNoReach(a, port(addr, everywhere))
	}
	// Metadata services: the machine reaches this one, a guest does not.
	meta := l.serveIn(l.outside, metadata+":0")
	if _, err := dial(meta); err != nil {
		t.Errorf("machine to %s: %v", meta, err)
	}
	l.wantNoReach(a, meta)
}

// TestPublishedPorts shows that a port of the machine that destination NAT leads elsewhere, as container engines do, is
// as much out of reach as the machine's own.
func TestPublishedPorts(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	a := l.acquire(m, "sandboxa", true)
	web := l.serveIn(l.outside, outsideAddr+":0")
	nft(t, fmt.Sprintf(`table ip others { chain pre { type nat hook prerouting priority -100;
		ip daddr %s tcp dport 8888 dnat to %s
}
}
`, hostAddr, web))
	published := netip.AddrPortFrom(netip.MustParseAddr(hostAddr), 8888)
	l.wantNoReach(a, published)
	must(t, m.fw.remove())
	l.wantReach(a, published, a.GuestAddr.String()) // the control: without our rules it is reachable
}

func TestDenied(t *testing.T) {
	l := newLab(t)
	meta := l.serveIn(l.outside, metadata+":53")
	web := l.serveIn(l.outside, outsideAddr+":0")
	m := l.manager(func(c *Config) {
		c.Denied = []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr(outsideAddr), 30)}
		c.Resolvers = []netip.Addr{meta.Addr()}
	})
	a := l.acquire(m, "sandboxa", true)
	l.wantNoReach(a, web)
	l.wantReach(a, meta, hostAddr) // a configured name server is reachable, on its port alone
	l.wantNoReach(a, netip.AddrPortFrom(meta.Addr(), web.Port()))
}

// TestDeniedAround denies everything private, the node's own range included: the machine must still reach its guests.
func TestDeniedAround(t *testing.T) {
	l := newLab(t)
	web := l.serveIn(l.outside, outsideAddr+":0")
	m := l.manager(func(c *Config) {
		c.Denied = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("198.51.0.0/16")}
	})
	a, b := l.acquire(m, "sandboxa", true), l.acquire(m, "sandboxb", true)
	inside := l.serveGuest(b)
	if _, err := dial(inside); err != nil {
		t.Errorf("machine to guest: %v", err)
	}
	l.wantNoReach(a, web)
	l.wantNoReach(a, inside)
}

func TestForgedSource(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	a, b := l.acquire(m, "sandboxa", true), l.acquire(m, "sandboxb", true)
	var lc net.ListenConfig
	var server net.PacketConn
	l.in(l.outside, func() (err error) {
		server, err = lc.ListenPacket(t.Context(), "udp4", outsideAddr+":0")
		return err
	})
	t.Cleanup(func() { _ = server.Close() })
	send := func(from, text string) {
		t.Helper()
		must(t, l.enter(a, func() error {
			if from != a.GuestAddr.String() {
				addAddr(t, guestLink, from+"/32")
			}
			d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
			c, err := d.DialContext(context.Background(), "udp4", server.LocalAddr().String())
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			_, err = c.Write([]byte(text))
			return err
		}))
	}
	send(b.GuestAddr.String(), "as another guest")
	send("203.0.113.9", "as a stranger")
	send(hostAddr+"", "as the machine")
	send(a.GuestAddr.String(), "as itself")
	must(t, server.SetReadDeadline(time.Now().Add(5*time.Second)))
	var buf [64]byte
	n, _, err := server.ReadFrom(buf[:])
	if err != nil || string(buf[:n]) != "as itself" {
		t.Errorf("first packet that arrives: %q, %v, want the one with the guest's own address", buf[:n], err)
	}
}

func TestPolicyChangesAtOnce(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	ctx := t.Context()
	a := l.acquire(m, "sandboxa", false)
	web, inside := l.serveIn(l.outside, outsideAddr+":0"), l.serveGuest(a)
	l.wantNoReach(a, web)
	must(t, m.SetPolicy(ctx, "sandboxa", Policy{AllowInternet: true}))
	l.wantReach(a, web, hostAddr)
	var open net.Conn
	must(t, l.enter(a, func() (err error) {
		open, _, err = connect(web)
		return err
	}))
	defer func() { _ = open.Close() }()
	must(t, m.SetPolicy(ctx, "sandboxa", Policy{}))
	l.wantNoReach(a, web)
	if _, err := dial(inside); err != nil {
		t.Errorf("machine to a guest without internet: %v", err)
	}
	// What is sent on the open connection now is not even acknowledged.
	_, err := open.Write([]byte("x"))
	must(t, err)
	if n := unacknowledged(t, open); n == 0 {
		t.Error("an open connection goes on after the permission was taken away")
	}
	must(t, m.SetPolicy(ctx, "sandboxa", Policy{AllowInternet: true}))
	eventually(t, "the connection goes on", func() bool { return unacknowledged(t, open) == 0 })
	if err := m.SetPolicy(ctx, "nobody", Policy{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("SetPolicy of an unknown sandbox: %v, want %v", err, sandbox.ErrNotFound)
	}
}

func TestNamespace(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	a := l.acquire(m, "sandboxa", true)
	must(t, l.enter(a, func() error {
		link, err := netlink.LinkByName(guestLink)
		must(t, err)
		if link.Attrs().MTU != uplinkMTU {
			t.Errorf("MTU %d, want that of the uplink, %d", link.Attrs().MTU, uplinkMTU)
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		must(t, err)
		if len(addrs) != 1 || addrs[0].IPNet.String() != a.GuestAddr.String()+"/31" {
			t.Errorf("addresses %v, want %s/31 alone", addrs, a.GuestAddr)
		}
		neighbours, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_V4)
		must(t, err)
		if len(neighbours) != 1 || neighbours[0].State != netlink.NUD_PERMANENT || !neighbours[0].IP.Equal(a.Gateway.AsSlice()) {
			t.Errorf("neighbours %v, want the gateway, permanently", neighbours)
		}
		return nil
	}))
	link, err := netlink.LinkByName(a.Link)
	must(t, err)
	if v6, err := netlink.AddrList(link, netlink.FAMILY_V6); err != nil || len(v6) != 0 {
		t.Errorf("IPv6 addresses of %s: %v, %v, want none", a.Link, v6, err)
	}
}

func TestForwardingIsSwitchedOn(t *testing.T) {
	l := newLab(t)
	must(t, writeSetting(forwardSetting, "0"))
	m := l.manager()
	if got := readSetting(t, forwardSetting); got != "0" {
		t.Errorf("New sets %s to %s", forwardSetting, got)
	}
	must(t, m.Sweep(t.Context()))
	must(t, m.Purge(t.Context()))
	if got := readSetting(t, forwardSetting); got != "1" {
		t.Errorf("%s is %s after Sweep and Purge, want 1", forwardSetting, got)
	}
}

func readSetting(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/sys/net/" + name)
	must(t, err)
	return strings.TrimSpace(string(data))
}

func TestConnectionLimit(t *testing.T) {
	l := newLab(t)
	m := l.manager(func(c *Config) { c.MaxConnections = 4 })
	a, b := l.acquire(m, "sandboxa", true), l.acquire(m, "sandboxb", true)
	web := l.serveIn(l.outside, outsideAddr+":0")
	opened := 0
	must(t, l.enter(a, func() error {
		for range 6 {
			c, _, err := connect(web)
			if err != nil {
				return nil //nolint:nilerr // the limit is what the test is about
			}
			t.Cleanup(func() { _ = c.Close() })
			opened++
		}
		return nil
	}))
	if opened != 4 {
		t.Errorf("%d connections with a limit of 4", opened)
	}
	l.wantReach(b, web, hostAddr) // another guest's count is its own
}

func TestRangeIsFull(t *testing.T) {
	l := newLab(t)
	m := l.manager(func(c *Config) { c.Range = netip.MustParsePrefix("10.199.8.0/28") })
	ctx := t.Context()
	seen := make(map[netip.Addr]bool)
	for i := range 6 {
		a := l.acquire(m, sandbox.ID("s"+strconv.Itoa(i)), true)
		seen[a.GuestAddr] = true
	}
	if len(seen) != 6 {
		t.Fatalf("%d different addresses for 6 sandboxes", len(seen))
	}
	if _, err := m.Acquire(ctx, "more", Policy{}); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("seventh of six: %v, want %v", err, sandbox.ErrExhausted)
	}
	if _, err := m.Acquire(ctx, "s1", Policy{}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("second network of one sandbox: %v, want %v", err, sandbox.ErrConflict)
	}
	must(t, m.Release(ctx, "s3"))
	must(t, m.Release(ctx, "s3"))
	eventually(t, "the freed address can be had again", func() bool {
		m.reap()
		_, err := m.Acquire(ctx, "more", Policy{})
		return err == nil
	})
	if u := m.Usage(); u.Attached != 6 || u.Capacity != 6 {
		t.Errorf("usage %+v, want 6 of 6 attached", u)
	}
}

func TestPool(t *testing.T) {
	l := newLab(t)
	m := l.manager(func(c *Config) { c.PoolSize = 3 })
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	full := func() bool { return m.Usage().Ready == 3 }
	eventually(t, "the pool is full", full)
	web := l.serveIn(l.outside, outsideAddr+":0")
	a, b := l.acquire(m, "sandboxa", true), l.acquire(m, "sandboxb", false)
	l.wantReach(a, web, hostAddr)
	l.wantNoReach(b, web)
	eventually(t, "the pool is full again", full)
	must(t, m.Release(ctx, "sandboxa"))
	eventually(t, "the link is gone", func() bool { return !hasLink(a.Link) })
	eventually(t, "the address is free", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.leaving) == 0
	})
	stop()
	must(t, <-ended)
	eventually(t, "only the sandbox's link is left", func() bool {
		links, err := m.wire.list()
		return err == nil && len(links) == 1
	})
}

func TestRulesComeBack(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	a := l.acquire(m, "sandboxa", true)
	web := l.serveIn(l.outside, outsideAddr+":0")
	everywhere := l.serveIn(l.host, "0.0.0.0:0")
	for _, damage := range []string{"flush ruleset\n", "flush chain inet cloister_" + labName + " input\n"} {
		nft(t, damage)
		if intact, _ := m.fw.intact(); intact {
			t.Errorf("after %q the rules count as intact", damage)
		}
		m.guard()
		if intact, err := m.fw.intact(); !intact {
			t.Errorf("after %q and guard: not intact, %v", damage, err)
		}
		l.wantReach(a, web, hostAddr)
		l.wantNoReach(a, port(hostAddr, everywhere))
	}
	// A change of one sandbox repairs the rest as well.
	nft(t, "flush ruleset\n")
	l.acquire(m, "sandboxb", false)
	l.wantReach(a, web, hostAddr)
}

// hold keeps a namespace alive as the processes of a guest do.
func (l *lab) hold(a Attachment) Attachment {
	l.tb.Helper()
	ns, err := netns.GetFromPath(a.NetNS)
	must(l.tb, err)
	l.tb.Cleanup(func() { _ = ns.Close() })
	a.NetNS = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns))
	return a
}

func TestRecovery(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	web := l.serveIn(l.outside, outsideAddr+":0")
	first := l.manager()
	lives := l.hold(l.acquire(first, "lives", true))
	closed := l.hold(l.acquire(first, "closed", false))
	unknown := l.hold(l.acquire(first, "unknown", true))
	died := l.acquire(first, "died", true)
	first.Close() // all that a process leaves when it is killed
	eventually(t, "the dead guest's link is gone", func() bool { return !hasLink(died.Link) })
	l.wantReach(lives, web, hostAddr) // nobody watches, and it works

	second := l.manager()
	must(t, second.Adopt(ctx, lives, Policy{AllowInternet: true}))
	must(t, second.Adopt(ctx, closed, Policy{}))
	if err := second.Adopt(ctx, died, Policy{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("adopt what is gone: %v, want %v", err, sandbox.ErrNotFound)
	}
	if err := second.Adopt(ctx, lives, Policy{}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("adopt twice: %v, want %v", err, sandbox.ErrConflict)
	}
	must(t, second.Sweep(ctx))
	if hasLink(unknown.Link) {
		t.Errorf("link %s of an unknown sandbox is still there", unknown.Link)
	}
	l.wantReach(lives, web, hostAddr)
	l.wantNoReach(closed, web)
	must(t, second.SetPolicy(ctx, "closed", Policy{AllowInternet: true}))
	l.wantReach(closed, web, hostAddr)
	fresh := l.acquire(second, "fresh", true)
	if fresh.GuestAddr == lives.GuestAddr || fresh.GuestAddr == closed.GuestAddr {
		t.Errorf("address %s was handed out twice", fresh.GuestAddr)
	}
	// What still holds a released network does not keep it.
	must(t, second.Release(ctx, "lives"))
	eventually(t, "the link of a released, held network is removed", func() bool {
		second.reap()
		return !hasLink(lives.Link)
	})
}

func TestAdoptChecks(t *testing.T) {
	l := newLab(t)
	m := l.manager()
	a := l.acquire(m, "sandboxa", true)
	for name, change := range map[string]func(*Attachment){
		"foreign range":  func(a *Attachment) { a.GuestAddr = netip.MustParseAddr("10.1.0.3") },
		"not a guest":    func(a *Attachment) { a.GuestAddr = a.Gateway },
		"no address":     func(a *Attachment) { a.GuestAddr = netip.Addr{} },
		"another's link": func(a *Attachment) { a.Link = "eth0" },
	} {
		bad := a
		change(&bad)
		if err := m.Adopt(t.Context(), bad, Policy{}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want %v", name, err, sandbox.ErrInvalid)
		}
	}
}

func TestPurgeLeavesOthersAlone(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	mine := l.manager()
	other := l.manager(func(c *Config) { c.Name, c.Range = "t1e2s4", netip.MustParsePrefix("10.198.0.0/16") })
	web := l.serveIn(l.outside, outsideAddr+":0")
	a, b := l.acquire(mine, "sandboxa", true), l.acquire(other, "sandboxb", true)
	l.wantNoReach(a, l.serveGuest(b)) // guests of two nodes of one machine
	nft(t, "table inet bystander { set s { type ipv4_addr\n}\n}\n")
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "clothes0"}, PeerName: "clothes1"}))

	must(t, mine.Purge(ctx))
	must(t, mine.Purge(ctx))
	if hasLink(a.Link) {
		t.Errorf("link %s is still there", a.Link)
	}
	l.wantReach(b, web, hostAddr)
	for _, link := range []string{b.Link, "clothes0", "up0"} {
		if !hasLink(link) {
			t.Errorf("link %s, another's, is gone", link)
		}
	}
	tables := nft(t, "list tables\n")
	for table, want := range map[string]bool{"bystander": true, "cloister_t1e2s4": true, "cloister_" + labName: false} {
		if strings.Contains(tables, table) != want {
			t.Errorf("table %s is there: %v, want %v; tables: %s", table, !want, want, tables)
		}
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	must(t, err)
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() == labRange {
			t.Errorf("route %v is still there", r)
		}
	}
}

func TestOverlap(t *testing.T) {
	l := newLab(t)
	first := l.manager()
	l.acquire(first, "sandboxa", true)
	second := l.manager(func(c *Config) { c.Name, c.Range = "t1e2s4", netip.MustParsePrefix("10.199.128.0/20") })
	if _, err := second.Acquire(t.Context(), "sandboxb", Policy{}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("second node in the first one's range: %v, want %v", err, sandbox.ErrConflict)
	}
	for name, want := range map[string]int{labName: 0, "t1e2s4": 1, "": 1} {
		got, err := Conflicts(first.plan.prefix, name)
		must(t, err)
		if len(got) != want {
			t.Errorf("conflicts seen by node %q: %+v, want %d", name, got, want)
		}
	}
	must(t, netlink.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParseAddr("10.200.0.0"), 15), Gw: net.ParseIP(outsideAddr)}))
	for prefix, kind := range map[string]string{"10.201.0.0/16": "route", "198.51.0.0/16": "interface"} {
		got, err := Conflicts(netip.MustParsePrefix(prefix), "")
		must(t, err)
		if len(got) != 1 || got[0].Kind != kind || !strings.Contains(got[0].Remedy, "10.64.0.0/16") {
			t.Errorf("conflicts of %s: %+v, want one of kind %s that advises 10.64.0.0/16", prefix, got, kind)
		}
	}
}

func TestRangeCanChange(t *testing.T) {
	l := newLab(t)
	first := l.manager()
	must(t, first.Sweep(t.Context()))
	first.Close()
	second := l.manager(func(c *Config) { c.Range = netip.MustParsePrefix("10.198.0.0/16") })
	must(t, second.Sweep(t.Context()))
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	must(t, err)
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() == labRange {
			t.Errorf("the earlier range's route %v is still there", r)
		}
	}
}
