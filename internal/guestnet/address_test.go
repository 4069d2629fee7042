package guestnet

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestPlan(t *testing.T) {
	p, err := newPlan(netip.MustParsePrefix("10.64.0.0/16"), "abc123")
	must(t, err)
	if got := p.capacity(); got != 32766 {
		t.Errorf("capacity %d, want 32766", got)
	}
	for index, want := range map[int][3]string{
		1:     {"10.64.0.2", "10.64.0.3", "cloabc123000001"},
		32766: {"10.64.255.252", "10.64.255.253", "cloabc123007ffe"},
	} {
		got := [3]string{p.gateway(index).String(), p.guest(index).String(), p.link(index)}
		if got != want {
			t.Errorf("index %d: %v, want %v", index, got, want)
		}
		if back, err := p.indexOf(p.guest(index)); back != index || err != nil {
			t.Errorf("index of %s: %d, %v, want %d", p.guest(index), back, err, index)
		}
		if back, ok := p.parseLink(p.link(index)); back != index || !ok {
			t.Errorf("index of link %s: %d, %v, want %d", p.link(index), back, ok, index)
		}
		if len(p.link(index)) > 15 {
			t.Errorf("link name %s is longer than the kernel allows", p.link(index))
		}
	}
	for _, foreign := range []string{"eth0", "cloabc124000001", "cloabc12300001", "cloabc123zzzzzz", "cloabc1230000011", ""} {
		if _, ok := p.parseLink(foreign); ok {
			t.Errorf("link %q counts as this node's", foreign)
		}
	}
	for _, a := range []string{"10.64.0.0", "10.64.0.1", "10.64.0.2", "10.64.255.255", "10.65.0.3", "fd00::3"} {
		if _, err := p.indexOf(netip.MustParseAddr(a)); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("index of %s: %v, want %v", a, err, sandbox.ErrInvalid)
		}
	}
}

func TestNewChecks(t *testing.T) {
	good := Config{Range: netip.MustParsePrefix("10.64.0.0/16"), Name: "abc123"}
	for name, change := range map[string]func(*Config){
		"short name":    func(c *Config) { c.Name = "abc" },
		"odd name":      func(c *Config) { c.Name = "abc12*" },
		"no range":      func(c *Config) { c.Range = netip.Prefix{} },
		"IPv6":          func(c *Config) { c.Range = netip.MustParsePrefix("fd00::/64") },
		"host bits":     func(c *Config) { c.Range = netip.MustParsePrefix("10.64.0.1/16") },
		"too small":     func(c *Config) { c.Range = netip.MustParsePrefix("10.64.0.0/29") },
		"too large":     func(c *Config) { c.Range = netip.MustParsePrefix("8.0.0.0/7") },
		"negative pool": func(c *Config) { c.PoolSize = -1 },
		"huge pool":     func(c *Config) { c.PoolSize = 20000 },
		"small MTU":     func(c *Config) { c.MTU = 100 },
		"connections":   func(c *Config) { c.MaxConnections = -1 },
	} {
		c := good
		change(&c)
		if m, err := New(c); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, %v, want %v", name, m, err, sandbox.ErrInvalid)
		}
	}
}

func TestLedger(t *testing.T) {
	l := newLedger(1, 4, 2)
	var got []int
	for range 4 {
		index, ok := l.take()
		if !ok {
			t.Fatalf("nothing left after %v", got)
		}
		got = append(got, index)
	}
	if want := []int{3, 4, 1, 2}; !slices.Equal(got, want) {
		t.Errorf("taken %v, want %v", got, want)
	}
	if index, ok := l.take(); ok {
		t.Errorf("a fifth of four: %d", index)
	}
	l.free(4)
	l.free(1)
	l.free(1)
	if !l.claim(4) || l.claim(4) {
		t.Error("a free index is claimed once")
	}
	if index, ok := l.take(); index != 1 || !ok {
		t.Errorf("got %d, %v, want 1, since 4 was claimed", index, ok)
	}
	if _, ok := l.take(); ok {
		t.Error("an index was handed out twice")
	}
	if !l.holds(1) || l.holds(9) {
		t.Error("holds is wrong")
	}
}

func TestLedgerRestsTheOldestLongest(t *testing.T) {
	l := newLedger(1, 3, 0)
	for range 3 {
		l.take()
	}
	l.free(2)
	l.free(3)
	l.free(1)
	var got []int
	for range 3 {
		index, _ := l.take()
		got = append(got, index)
	}
	if want := []int{2, 3, 1}; !slices.Equal(got, want) {
		t.Errorf("taken %v, want %v", got, want)
	}
}

func TestSpans(t *testing.T) {
	var in []netip.Prefix
	for _, p := range []string{"224.0.0.0/4", "10.0.0.0/8", "10.1.0.0/16", "240.0.0.0/4", "0.0.0.0/8", "fd00::/8"} {
		in = append(in, netip.MustParsePrefix(p))
	}
	want := []span{{0, 1 << 24}, {10 << 24, 11 << 24}, {224 << 24, 1 << 32}}
	if diff := cmp.Diff(want, spans(in), cmp.AllowUnexported(span{})); diff != "" {
		t.Error(diff)
	}
	for _, text := range []string{"10.64.0.0/16", "10.0.0.0/8", "192.168.7.16/28", "240.0.0.0/4"} {
		p := netip.MustParsePrefix(text)
		got := parseIntervals(intervalElements([]netip.Prefix{p}))
		if !slices.Equal(got, []netip.Prefix{p}) {
			t.Errorf("%s comes back as %v", p, got)
		}
	}
}

func TestConflictDecision(t *testing.T) {
	claims := []claim{
		{"route", netip.MustParsePrefix("10.0.0.0/8"), "route 10.0.0.0/8 via 192.0.2.1"},
		{"interface", netip.MustParsePrefix("100.64.0.0/10"), "interface tailscale0"},
	}
	if got := conflicts(netip.MustParsePrefix("192.168.0.0/16"), claims); got != nil {
		t.Errorf("conflicts of a free range: %v", got)
	}
	want := []Conflict{{
		"route", "route 10.0.0.0/8 via 192.0.2.1 overlaps the guest address range 10.64.0.0/16",
		"choose another guest address range, such as 172.16.0.0/16, which nothing on this machine uses",
	}}
	if diff := cmp.Diff(want, conflicts(netip.MustParsePrefix("10.64.0.0/16"), claims)); diff != "" {
		t.Error(diff)
	}
	if _, ok := freeRange(8, []claim{{"route", netip.MustParsePrefix("10.0.0.0/8"), ""}}); ok {
		t.Error("a second private /8 was found")
	}
}

func TestWithout(t *testing.T) {
	list := []span{{10, 20}, {30, 40}, {50, 60}}
	for _, tc := range []struct {
		name  string
		holes []span
		want  []span
	}{
		{"nothing", nil, list},
		{"in the middle", []span{{12, 14}}, []span{{10, 12}, {14, 20}, {30, 40}, {50, 60}}},
		{"one as a whole", []span{{30, 40}}, []span{{10, 20}, {50, 60}}},
		{"across", []span{{15, 55}}, []span{{10, 15}, {55, 60}}},
		{"beside", []span{{20, 30}}, list},
		{"all", []span{{0, 100}}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, without(list, tc.holes), cmp.AllowUnexported(span{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}
