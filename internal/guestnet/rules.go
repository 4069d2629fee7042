package guestnet

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The names of the table's sets.
const (
	setGuests    = "guests"    // link . address: who may send what
	setInternet  = "internet"  // links that may open connections to the outside
	setDenied    = "denied"    // where no guest may go
	setResolvers = "resolvers" // name servers that guests may ask even where setDenied covers them
	setRange     = "range"     // the node's own range; other nodes of this machine read it
	setTracked   = "tracked"   // counts the tracked connections of each link
)

// nameBytes is the size of an interface name in a set's key.
const nameBytes = unix.IFNAMSIZ

// alwaysDenied are destinations that no guest needs and some of which hand out a machine's credentials.
//
//nolint:gochecknoglobals // a constant table
var alwaysDenied = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),     // link-local; metadata of most clouds
	netip.MustParsePrefix("192.0.0.192/32"),     // metadata, Oracle
	netip.MustParsePrefix("100.100.100.200/32"), // metadata, Alibaba
	netip.MustParsePrefix("168.63.129.16/32"),   // platform service, Azure
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("240.0.0.0/4"),
}

// ruleSet is the fixed part of a node's table.
type ruleSet struct {
	plan        plan
	denied      []netip.Prefix
	resolvers   []netip.Addr
	connections int // most tracked connections of one guest; 0 is no limit
}

// chain is one base chain with its rules.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority nftables.ChainPriority
	rules    [][]expr.Any
}

func (r ruleSet) tableRef() *nftables.Table {
	return &nftables.Table{Name: r.plan.table(), Family: nftables.TableFamilyINet}
}

// sets returns the table's sets with their fixed elements.
func (r ruleSet) sets() map[*nftables.Set][]nftables.SetElement {
	t := r.tableRef()
	ifname, addr := nftables.TypeIFName, nftables.TypeIPAddr
	pair := nftables.MustConcatSetType(ifname, addr)
	out := map[*nftables.Set][]nftables.SetElement{
		{Table: t, Name: setGuests, KeyType: pair}:                 nil,
		{Table: t, Name: setInternet, KeyType: ifname}:             nil,
		{Table: t, Name: setResolvers, KeyType: addr}:              addrElements(r.resolvers),
		{Table: t, Name: setDenied, KeyType: addr, Interval: true}: spanElements(r.deniedSpans()),
		{Table: t, Name: setRange, KeyType: addr, Interval: true}:  intervalElements([]netip.Prefix{r.plan.prefix}),
	}
	if r.connections > 0 {
		out[&nftables.Set{Table: t, Name: setTracked, KeyType: ifname, Dynamic: true, Size: 1 << 16}] = nil
	}
	return out
}

// chains returns the rules. Those of the first three look only at what comes from a guest; acceptance ends a chain of
// this table alone, so that other firewalls of the machine still have their say.
func (r ruleSet) chains() []chain {
	established := ctState(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	return []chain{
		// Before connection tracking: forged sources and hopeless destinations cost no entry.
		{"source", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw, [][]expr.Any{
			rule(iif(expr.CmpOpNeq, r.plan.own()), verdict(expr.VerdictAccept)),
			rule(ipv4(expr.CmpOpNeq), verdict(expr.VerdictDrop)),
			rule(r.forged(), verdict(expr.VerdictDrop)),
			rule(r.askingResolver(unix.IPPROTO_UDP), verdict(expr.VerdictAccept)),
			rule(r.askingResolver(unix.IPPROTO_TCP), verdict(expr.VerdictAccept)),
			rule(destination(setDenied), verdict(expr.VerdictDrop)),
		}},
		// Before the machine's own destination NAT, which would turn a published port of the machine into a forward.
		{"local", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle, r.local(established)},
		{"input", nftables.ChainTypeFilter, nftables.ChainHookInput, *nftables.ChainPriorityFilter - 10, [][]expr.Any{
			rule(iif(expr.CmpOpNeq, r.plan.own()), verdict(expr.VerdictAccept)),
			rule(established, verdict(expr.VerdictAccept)),
			rule(verdict(expr.VerdictDrop)),
		}},
		{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter - 10, [][]expr.Any{
			rule(iif(expr.CmpOpEq, r.plan.own()), oif(expr.CmpOpEq, linkPrefix), verdict(expr.VerdictDrop)),
			// Ahead of established: taking the permission away ends open connections too.
			rule(iif(expr.CmpOpEq, r.plan.own()), lookup(expr.MetaKeyIIFNAME, setInternet, true), verdict(expr.VerdictDrop)),
			rule(iif(expr.CmpOpEq, r.plan.own()), verdict(expr.VerdictAccept)),
			rule(oif(expr.CmpOpNeq, r.plan.own()), verdict(expr.VerdictAccept)),
			rule(established, verdict(expr.VerdictAccept)),
			rule(verdict(expr.VerdictDrop)),
		}},
		{"outside", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, [][]expr.Any{
			rule(source(setRange), oif(expr.CmpOpNeq, linkPrefix), []expr.Any{&expr.Masq{}}),
		}},
	}
}

func (r ruleSet) local(established []expr.Any) [][]expr.Any {
	out := [][]expr.Any{
		rule(iif(expr.CmpOpNeq, r.plan.own()), verdict(expr.VerdictAccept)),
		rule(established, verdict(expr.VerdictAccept)),
		rule(ctState(expr.CtStateBitINVALID), verdict(expr.VerdictDrop)),
		rule(destination(setRange), verdict(expr.VerdictDrop)), // unassigned ones too: who exists is nobody's business
		rule([]expr.Any{
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		}, verdict(expr.VerdictDrop)),
	}
	if r.connections <= 0 {
		return out
	}
	return append(out, rule(
		ctState(expr.CtStateBitNEW),
		[]expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
			&expr.Dynset{
				SrcRegKey: 1, SetName: setTracked, Operation: unix.NFT_DYNSET_OP_ADD,
				Exprs: []expr.Any{&expr.Connlimit{Count: uint32(r.connections), Flags: expr.NFT_CONNLIMIT_F_INV}}, //nolint:gosec // checked by New
			},
		},
		verdict(expr.VerdictDrop),
	))
}

// forged matches a pair of link and source address that is no guest's.
func (r ruleSet) forged() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG_1},
		&expr.Payload{DestRegister: unix.NFT_REG_2, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
		&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: setGuests, Invert: true},
	}
}

func (r ruleSet) askingResolver(protocol byte) []expr.Any {
	return slices.Concat(destination(setResolvers), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocol}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 53}},
	})
}

func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

// iif matches the start of the incoming interface's name.
func iif(op expr.CmpOp, prefix string) []expr.Any { return nameMatch(expr.MetaKeyIIFNAME, op, prefix) }

// oif matches the start of the outgoing interface's name.
func oif(op expr.CmpOp, prefix string) []expr.Any { return nameMatch(expr.MetaKeyOIFNAME, op, prefix) }

func nameMatch(key expr.MetaKey, op expr.CmpOp, prefix string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: []byte(prefix)},
	}
}

func ipv4(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
	}
}

// destination matches IPv4 packets to an address in the set.
func destination(set string) []expr.Any { return address(16, set) }

// source matches IPv4 packets from an address in the set.
func source(set string) []expr.Any { return address(12, set) }

func address(offset uint32, set string) []expr.Any {
	return slices.Concat(ipv4(expr.CmpOpEq), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: set},
	})
}

func lookup(key expr.MetaKey, set string, invert bool) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: set, Invert: invert},
	}
}

// ctState matches connections in any of the states.
func ctState(states uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(states), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// nameKey is an interface's name as a set's key.
func nameKey(link string) []byte {
	key := make([]byte, nameBytes)
	copy(key, link)
	return key
}

func addrElements(addrs []netip.Addr) []nftables.SetElement {
	var out []nftables.SetElement
	for _, a := range addrs {
		if a.Is4() {
			out = append(out, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	return out
}

// intervalElements turns prefixes, which may overlap, into the kernel's form: the start of each disjoint interval and
// the first address after it.
func intervalElements(prefixes []netip.Prefix) []nftables.SetElement {
	return spanElements(spans(prefixes))
}

func spanElements(list []span) []nftables.SetElement {
	var out []nftables.SetElement
	for _, s := range list {
		out = append(out, nftables.SetElement{Key: key32(s.from)})
		if s.to <= 0xffffffff {
			out = append(out, nftables.SetElement{Key: key32(s.to), IntervalEnd: true})
		}
	}
	return out
}

// span is the addresses from, from+1, … to-1.
type span struct{ from, to uint64 }

// deniedSpans returns where no guest may go. The node's own range stays out: a guest's answers to the machine go there, and
// the other chains see to it that nothing else does.
func (r ruleSet) deniedSpans() []span {
	return without(spans(append(slices.Clone(alwaysDenied), r.denied...)), spans([]netip.Prefix{r.plan.prefix}))
}

// without returns what of the disjoint, ordered spans is in none of holes.
func without(list, holes []span) []span {
	for _, h := range holes {
		var rest []span
		for _, s := range list {
			if s.from < h.from {
				rest = append(rest, span{s.from, min(s.to, h.from)})
			}
			if s.to > h.to {
				rest = append(rest, span{max(s.from, h.to), s.to})
			}
		}
		list = rest
	}
	return list
}

// spans returns the disjoint, ordered spans that the IPv4 prefixes cover.
func spans(prefixes []netip.Prefix) []span {
	all := make([]span, 0, len(prefixes))
	for _, p := range prefixes {
		if !p.Addr().Is4() {
			continue
		}
		base := p.Masked().Addr().As4()
		from := uint64(binary.BigEndian.Uint32(base[:]))
		all = append(all, span{from, from + 1<<(32-p.Bits())})
	}
	slices.SortFunc(all, func(a, b span) int { return int(int64(a.from) - int64(b.from)) }) //nolint:gosec // 32-bit values
	var out []span
	for _, s := range all {
		if n := len(out); n > 0 && s.from <= out[n-1].to {
			out[n-1].to = max(out[n-1].to, s.to)
			continue
		}
		out = append(out, s)
	}
	return out
}

func key32(v uint64) []byte { return binary.BigEndian.AppendUint32(nil, uint32(v)) } //nolint:gosec // below 2^32
