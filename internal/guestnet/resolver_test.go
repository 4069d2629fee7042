package guestnet

import (
	"net/netip"
	"slices"
	"testing"
)

func TestResolverChoice(t *testing.T) {
	const file = "# comment\nsearch example.org\nnameserver 127.0.0.53\nnameserver 192.0.2.1\n  nameserver 192.0.2.2 # second\n" +
		"nameserver fe80::1%eth0\nnameserver 192.0.2.1\nnameserver ::ffff:192.0.2.3\nnameserver 0.0.0.0\nnameserver x\nnameserver\n" +
		"nameserver 192.0.2.4\nnameserver 192.0.2.5\n"
	local := []netip.Addr{netip.MustParseAddr("192.0.2.2")}
	got := usableResolvers(parseResolvers([]byte(file)), local)
	want := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.3"), netip.MustParseAddr("192.0.2.4")}
	if !slices.Equal(got, want) {
		t.Errorf("resolvers %v, want %v", got, want)
	}
}

func FuzzParseResolvers(f *testing.F) {
	f.Add([]byte("nameserver 1.1.1.1\n"))
	f.Add([]byte("nameserver fe80::1%eth0"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, a := range usableResolvers(parseResolvers(data), nil) {
			if !a.Is4() || a.IsLoopback() {
				t.Errorf("%s is of no use to a guest", a)
			}
		}
	})
}
