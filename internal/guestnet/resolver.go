package guestnet

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
)

const (
	resolverFile = "/etc/resolv.conf"
	// upstreamFile is where systemd-resolved keeps what its local stub asks.
	upstreamFile = "/run/systemd/resolve/resolv.conf"
	// resolverLimit is how many name servers a guest's C library looks at.
	resolverLimit = 3
	// fileLimit is how much of a resolver file is read.
	fileLimit = 64 << 10
)

// Resolvers returns the machine's name servers that a guest can use, at most three: IPv4, not on this machine itself,
// where guests must not go. Where resolv.conf names none but a local stub, systemd-resolved's upstream servers count;
// where those are none either, the fallback is returned.
func Resolvers(fallback []netip.Addr) []netip.Addr {
	local := localAddrs()
	for _, path := range []string{resolverFile, upstreamFile} {
		data, err := os.ReadFile(path) //nolint:gosec // one of two constants
		if err != nil {
			continue
		}
		if usable := usableResolvers(parseResolvers(data), local); len(usable) > 0 {
			return usable
		}
	}
	return slices.Clone(fallback)
}

// parseResolvers reads the "nameserver" lines of a resolv.conf.
func parseResolvers(data []byte) []netip.Addr {
	var out []netip.Addr
	for line := range bytes.Lines(data[:min(len(data), fileLimit)]) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

// usableResolvers keeps what guests can reach.
func usableResolvers(all, local []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		unusable := !a.Is4() || a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || slices.Contains(local, a)
		if !unusable && !slices.Contains(out, a) && len(out) < resolverLimit {
			out = append(out, a)
		}
	}
	return out
}

// localAddrs returns this machine's own addresses.
func localAddrs() []netip.Addr {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil // then none is left out
	}
	var out []netip.Addr
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, addr.Unmap())
			}
		}
	}
	return out
}
