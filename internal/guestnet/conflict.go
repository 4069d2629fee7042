package guestnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Conflict is one reason why a range of addresses should not be used on this machine.
type Conflict struct {
	// Kind is "interface", "route", "resolver" or "node".
	Kind string `json:"kind"`
	// Text says what overlaps, Remedy what to do.
	Text   string `json:"text"`
	Remedy string `json:"remedy"`
}

// claim is one use of addresses on this machine.
type claim struct {
	kind   string
	prefix netip.Prefix
	text   string
}

// Conflicts returns what on this machine uses addresses of the prefix: interfaces, routes, name servers, other nodes.
// What belongs to the node of the given name is left out.
func Conflicts(prefix netip.Prefix, name string) ([]Conflict, error) {
	claims, err := gatherClaims(name)
	if err != nil {
		return nil, err
	}
	return conflicts(prefix, claims), nil
}

// conflicts decides; it is pure.
func conflicts(prefix netip.Prefix, claims []claim) []Conflict {
	var out []Conflict
	for _, c := range claims {
		if !c.prefix.Overlaps(prefix) {
			continue
		}
		out = append(out, Conflict{
			Kind: c.kind, Text: fmt.Sprintf("%s overlaps the guest address range %s", c.text, prefix), Remedy: advise(prefix, claims),
		})
	}
	return out
}

// advise names a range of the same size that nothing uses.
func advise(prefix netip.Prefix, claims []claim) string {
	if free, ok := freeRange(prefix.Bits(), claims); ok {
		return fmt.Sprintf("choose another guest address range, such as %s, which nothing on this machine uses", free)
	}
	return "choose another, smaller guest address range, or free one of the private ranges"
}

// freeRange finds an unclaimed private range with the given prefix length, starting where other software seldom is.
func freeRange(length int, claims []claim) (netip.Prefix, bool) {
	for _, area := range []string{"10.64.0.0/10", "10.128.0.0/9", "100.64.0.0/10", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"} {
		a := netip.MustParsePrefix(area)
		if length < a.Bits() {
			continue
		}
		base := a.Addr().As4()
		for i := range min(1<<(length-a.Bits()), 4096) {
			var b [4]byte
			binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(base[:])+uint32(i)<<(32-length))
			candidate := netip.PrefixFrom(netip.AddrFrom4(b), length)
			taken := func(c claim) bool { return c.prefix.Overlaps(candidate) }
			if !slices.ContainsFunc(claims, taken) {
				return candidate, true
			}
		}
	}
	return netip.Prefix{}, false
}

func gatherClaims(name string) ([]claim, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer nl.Close()
	names, err := linkNames(nl)
	if err != nil {
		return nil, err
	}
	addrs, err := addressClaims(nl, names, name)
	if err != nil {
		return nil, err
	}
	routes, err := routeClaims(nl, names, name)
	if err != nil {
		return nil, err
	}
	nodes, err := nodeClaims(name)
	if err != nil {
		return nil, err
	}
	out := slices.Concat(nodes, addrs, routes)
	for _, r := range Resolvers(nil) {
		out = append(out, claim{"resolver", netip.PrefixFrom(r, r.BitLen()), "name server " + r.String()})
	}
	return out, nil
}

func linkNames(nl *netlink.Handle) (map[int]string, error) {
	links, err := nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := make(map[int]string, len(links))
	for _, l := range links {
		out[l.Attrs().Index] = l.Attrs().Name
	}
	return out, nil
}

func addressClaims(nl *netlink.Handle, names map[int]string, own string) ([]claim, error) {
	addrs, err := nl.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []claim
	for _, a := range addrs {
		link := names[a.LinkIndex]
		p, ok := toPrefix(a.IPNet)
		if !ok || isNodeLink(link, own) {
			continue
		}
		out = append(out, claim{"interface", p, fmt.Sprintf("interface %s with address %s", link, a.IPNet)})
	}
	return out, nil
}

func routeClaims(nl *netlink.Handle, names map[int]string, own string) ([]claim, error) {
	routes, err := nl.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []claim
	for _, r := range routes {
		p, ok := toPrefix(r.Dst)
		link := names[r.LinkIndex]
		// Halves of everything are how tunnels take the default route; ours and the local table repeat other claims.
		if !ok || p.Bits() <= 1 || r.Table == unix.RT_TABLE_LOCAL || r.Protocol == routeProtocol || r.Protocol == unix.RTPROT_KERNEL || isNodeLink(link, own) {
			continue
		}
		text := "route " + p.String()
		if r.Gw != nil {
			text += " via " + r.Gw.String()
		}
		if link != "" {
			text += " on " + link
		}
		out = append(out, claim{"route", p, text})
	}
	return out, nil
}

// isNodeLink reports whether the link is of a node: of the given one, or of another whose range is a claim by itself.
func isNodeLink(link, own string) bool {
	if own != "" && strings.HasPrefix(link, linkPrefix+own) {
		return true
	}
	return strings.HasPrefix(link, linkPrefix) && len(link) == len(linkPrefix)+nameLen+indexDigits
}

func nodeClaims(own string) ([]claim, error) {
	conn, err := dialNftables()
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.CloseLasting() }()
	ranges, err := nodeRanges(conn)
	if err != nil {
		return nil, err
	}
	var out []claim
	for table, prefixes := range ranges {
		node := strings.TrimPrefix(table, tablePrefix)
		if node == own {
			continue
		}
		for _, p := range prefixes {
			out = append(out, claim{"node", p, fmt.Sprintf("range %s of node %s on this machine", p, node)})
		}
	}
	return out, nil
}

// nodeRanges reads which ranges the nodes of this machine have, by table.
func nodeRanges(conn *nftables.Conn) (map[string][]netip.Prefix, error) {
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list nftables tables: %w", err)
	}
	out := make(map[string][]netip.Prefix)
	for _, t := range tables {
		if !strings.HasPrefix(t.Name, tablePrefix) {
			continue
		}
		set, err := conn.GetSetByName(t, setRange)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the range of table %s: %w", t.Name, err)
		}
		elements, err := conn.GetSetElements(set)
		if err != nil {
			return nil, fmt.Errorf("read the range of table %s: %w", t.Name, err)
		}
		out[t.Name] = parseIntervals(elements)
	}
	return out, nil
}

// parseIntervals is the inverse of intervalElements for spans that are prefixes.
func parseIntervals(elements []nftables.SetElement) []netip.Prefix {
	type bound struct {
		at  uint64
		end bool
	}
	var bounds []bound
	for _, e := range elements {
		if len(e.Key) == 4 {
			bounds = append(bounds, bound{uint64(binary.BigEndian.Uint32(e.Key)), e.IntervalEnd})
		}
	}
	slices.SortFunc(bounds, func(a, b bound) int { return int(int64(a.at) - int64(b.at)) }) //nolint:gosec // 32-bit values
	var out []netip.Prefix
	for i, b := range bounds {
		if b.end {
			continue
		}
		to := uint64(1) << 32
		if i+1 < len(bounds) {
			to = bounds[i+1].at
		}
		size := to - b.at
		if size == 0 || bits.OnesCount64(size) != 1 || b.at%size != 0 {
			continue
		}
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], uint32(b.at)) //nolint:gosec // below 2^32
		out = append(out, netip.PrefixFrom(netip.AddrFrom4(a), 33-bits.Len64(size)))
	}
	return out
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, size := n.Mask.Size()
	if !ok || size == 0 {
		return netip.Prefix{}, false
	}
	a = a.Unmap()
	return netip.PrefixFrom(a, ones-size+a.BitLen()).Masked(), true
}
