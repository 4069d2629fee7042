package guestnet

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// linkPrefix starts the name of each host-side link of any node on this machine.
	linkPrefix = "clo"
	// tablePrefix starts the name of each node's nftables table.
	tablePrefix = "cloister_"
	// guestLink is the link's name inside the namespace.
	guestLink = "eth0"

	nameLen     = 6
	indexDigits = 6 // with linkPrefix and nameLen this fills the kernel's 15 characters
	minBits     = 8
	maxBits     = 28
)

var plainName = regexp.MustCompile(`^[a-z0-9]{6}$`)

// plan turns indexes into addresses and names. Index i owns the i-th pair of the range: the even address is the
// machine's end and the guest's gateway, the odd one is the guest. The first and last pair stay unused, since they hold
// the addresses that people expect to be the network and the broadcast address.
type plan struct {
	prefix netip.Prefix
	name   string
}

func newPlan(prefix netip.Prefix, name string) (plan, error) {
	if !plainName.MatchString(name) {
		return plan{}, sandbox.Invalidf("network name %.80q: want %d characters of a-z and 0-9", name, nameLen)
	}
	if !prefix.IsValid() || !prefix.Addr().Is4() {
		return plan{}, sandbox.Invalidf("guest address range %q: want an IPv4 prefix such as 10.88.0.0/16", prefix)
	}
	if prefix.Bits() < minBits || prefix.Bits() > maxBits {
		return plan{}, sandbox.Invalidf("guest address range %s: want a prefix length from %d to %d", prefix, minBits, maxBits)
	}
	if prefix != prefix.Masked() {
		return plan{}, sandbox.Invalidf("guest address range %s has host bits set: want %s", prefix, prefix.Masked())
	}
	return plan{prefix: prefix, name: name}, nil
}

// pairs returns how many indexes exist; valid ones are 1 to pairs-2.
func (p plan) pairs() int { return 1 << (31 - p.prefix.Bits()) }

func (p plan) capacity() int { return p.pairs() - 2 }

func (p plan) valid(index int) bool { return index >= 1 && index <= p.capacity() }

func (p plan) gateway(index int) netip.Addr { return p.addr(2 * index) }

func (p plan) guest(index int) netip.Addr { return p.addr(2*index + 1) }

func (p plan) addr(offset int) netip.Addr {
	base := p.prefix.Addr().As4()
	var out [4]byte
	binary.BigEndian.PutUint32(out[:], binary.BigEndian.Uint32(base[:])+uint32(offset)) //nolint:gosec // offset < 2^24
	return netip.AddrFrom4(out)
}

// indexOf returns the index whose guest address is a.
func (p plan) indexOf(a netip.Addr) (int, error) {
	if !a.Is4() || !p.prefix.Contains(a) {
		return 0, sandbox.Invalidf("guest address %s is not in the node's range %s", a, p.prefix)
	}
	base, b := p.prefix.Addr().As4(), a.As4()
	offset := int(binary.BigEndian.Uint32(b[:]) - binary.BigEndian.Uint32(base[:]))
	if offset%2 == 0 || !p.valid(offset/2) {
		return 0, sandbox.Invalidf("address %s of range %s is never a guest's", a, p.prefix)
	}
	return offset / 2, nil
}

// own is the prefix of the names of the node's links.
func (p plan) own() string { return linkPrefix + p.name }

func (p plan) table() string { return tablePrefix + p.name }

func (p plan) link(index int) string { return fmt.Sprintf("%s%0*x", p.own(), indexDigits, index) }

// parseLink is the inverse of link; ok is false for a link that is not this node's.
func (p plan) parseLink(name string) (index int, ok bool) {
	digits, own := strings.CutPrefix(name, p.own())
	if !own || len(digits) != indexDigits {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 16, 32)
	return int(n), err == nil
}

// mac returns the hardware address of one end of a link. A fixed one keeps udev from choosing another later, which
// would turn the permanent neighbour entries wrong.
func (p plan) mac(index int, end byte) net.HardwareAddr {
	out := net.HardwareAddr{end, 0xc1, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(out[2:], uint32(index)) //nolint:gosec // index < 2^23
	return out
}

// The first octet of hardware addresses: locally administered, not multicast.
const (
	hostEnd  = 0x0a
	guestEnd = 0x0e
)

func ipNet(a netip.Addr, bits int) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
}
