package install

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// guestLinks is how the names of the guests' links on the machine start, nodeTables how their rules' tables do.
	guestLinks = "clo"
	nodeTables = "cloister_"
)

// networkFacts says what became of a throwaway link and table in a throwaway namespace.
type networkFacts struct{ space, link, table error }

func checkNftables(context.Context, Settings) []Finding {
	var f networkFacts
	f.space = inFreshNetwork(func() error {
		f.link = tryLink()
		f.table = tryTable()
		return nil
	})
	return judgeNetwork(f)
}

func tryLink() error {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	return nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "probe0"}, PeerName: "probe1"})
}

// tryTable makes a table with each kind of rule that a node uses.
func tryTable() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	t := conn.AddTable(&nftables.Table{Name: nodeTables + "probe", Family: nftables.TableFamilyINet})
	pair := nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)
	if err := conn.AddSet(&nftables.Set{Table: t, Name: "pairs", KeyType: pair}, nil); err != nil {
		return err
	}
	early := conn.AddChain(&nftables.Chain{
		Name: "early", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
	})
	conn.AddRule(&nftables.Rule{Table: t, Chain: early, Exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	late := conn.AddChain(&nftables.Chain{
		Name: "late", Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	conn.AddRule(&nftables.Rule{Table: t, Chain: late, Exprs: []expr.Any{&expr.Masq{}}})
	if err := conn.Flush(); err != nil {
		return err
	}
	conn.DelTable(t)
	return conn.Flush()
}

func judgeNetwork(f networkFacts) []Finding {
	if f.space != nil {
		return []Finding{fail("nftables", fmt.Sprintf("not tried: %v", f.space), "run as root, on a kernel with network namespaces")}
	}
	link, table := ok("links", "veth links can be made"), ok("nftables", "sets, address lookups, connection tracking and translation work")
	if f.link != nil {
		link = fail("links", fmt.Sprintf("a veth link cannot be made: %v", f.link), "modprobe veth (CONFIG_VETH)")
	}
	if f.table != nil {
		table = fail("nftables", fmt.Sprintf("a table with the needed rules cannot be made: %v", f.table),
			"modprobe -a nf_tables nft_ct nft_fib_inet nft_masq nft_chain_nat (CONFIG_NF_TABLES_INET, CONFIG_NFT_CT, CONFIG_NFT_FIB_INET, CONFIG_NFT_MASQ)")
	}
	return []Finding{link, table}
}

func checkForwarding(context.Context, Settings) []Finding {
	const path = "/proc/sys/net/ipv4/ip_forward"
	value, known := readNumber(path)
	return []Finding{judgeForwarding(value, known, unix.Access(path, unix.W_OK) == nil)}
}

func judgeForwarding(value int64, known, writable bool) Finding {
	const check = "ip forwarding"
	switch {
	case known && value == 1:
		return ok(check, "on")
	case writable:
		return ok(check, "off; Cloister switches net.ipv4.ip_forward on when it starts, and leaves it on")
	}
	return fail(check, "net.ipv4.ip_forward is off and cannot be changed from here", "on the machine itself: sysctl -w net.ipv4.ip_forward=1")
}

// firewall is another program's set of rules that sees forwarded packets.
type firewall struct {
	table string
	// drops means that what no rule accepts is dropped.
	drops bool
	// lists has the names of its chains that the owner of the machine may add to.
	chains []string
	// admits means that a rule names the guests' links.
	admits bool
	legacy bool
}

func checkFirewalls(ctx context.Context, s Settings) []Finding {
	walls, err := gatherFirewalls()
	if legacy, found := gatherLegacy(ctx); found {
		walls = append(walls, legacy)
	}
	return judgeFirewalls(walls, s.Range, err)
}

func gatherFirewalls() ([]firewall, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, err
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, err
	}
	byTable := make(map[nftables.Table][]*nftables.Chain)
	for _, c := range chains {
		if !strings.HasPrefix(c.Table.Name, nodeTables) {
			key := nftables.Table{Name: c.Table.Name, Family: c.Table.Family}
			byTable[key] = append(byTable[key], c)
		}
	}
	var out []firewall
	for t, list := range byTable {
		w := firewall{table: t.Name}
		forwards := false
		for _, c := range list {
			w.chains = append(w.chains, c.Name)
			if c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward && t.Family != nftables.TableFamilyBridge {
				forwards = true
				w.drops = w.drops || (c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop)
			}
		}
		w.drops = w.drops || t.Name == "firewalld" // rejects with its last rule, not its policy
		if !forwards || !w.drops || t.Family == nftables.TableFamilyIPv6 {
			continue
		}
		w.admits = slices.ContainsFunc(list, func(c *nftables.Chain) bool {
			rules, err := conn.GetRules(&t, c)
			return err == nil && slices.ContainsFunc(rules, func(r *nftables.Rule) bool { return namesGuests(r.Exprs) })
		})
		out = append(out, w)
	}
	slices.SortFunc(out, func(a, b firewall) int { return strings.Compare(a.table, b.table) })
	return out, nil
}

// namesGuests reports whether a rule looks for packets that come in over the guests' links.
func namesGuests(exprs []expr.Any) bool {
	incoming := false
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			incoming = e.Key == expr.MetaKeyIIFNAME
		case *expr.Cmp:
			if incoming && e.Op == expr.CmpOpEq && string(bytes.TrimRight(e.Data, "\x00")) == guestLinks {
				return true
			}
		}
	}
	return false
}

// gatherLegacy asks the older packet filter, which has no list of chains that others can read.
func gatherLegacy(ctx context.Context) (firewall, bool) {
	if !slices.Contains(strings.Fields(string(readFile("/proc/net/ip_tables_names"))), "filter") {
		return firewall{}, false
	}
	for _, tool := range []string{"iptables-legacy", "iptables"} {
		out, err := exec.CommandContext(ctx, tool, "-w", "5", "-S").Output() //nolint:gosec // one of two names
		if err == nil {
			return parseLegacy(string(out)), true
		}
	}
	return firewall{table: "filter", legacy: true}, true
}

// parseLegacy reads what "iptables -S" prints.
func parseLegacy(text string) firewall {
	w := firewall{table: "filter", legacy: true}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) >= 3 && f[0] == "-P" && f[1] == "FORWARD":
			w.drops = f[2] != "ACCEPT"
		case len(f) >= 2 && f[0] == "-N":
			w.chains = append(w.chains, f[1])
		case len(f) > 2 && f[0] == "-A" && strings.Contains(line, "-i "+guestLinks+"+ "):
			w.admits = true
		}
	}
	return w
}

func judgeFirewalls(walls []firewall, guests netip.Prefix, err error) []Finding {
	const check = "firewall"
	if err != nil {
		return []Finding{warn(check, fmt.Sprintf("the machine's rules cannot be read: %v", err), "run as root, on a kernel with nftables")}
	}
	var out []Finding
	for _, w := range walls {
		if w.drops && !w.admits {
			out = append(out, warn(check, w.describe()+" drops forwarded packets: sandboxes cannot reach the outside", w.remedy(guests)))
		}
	}
	if len(out) == 0 {
		out = append(out, ok(check, "no other firewall drops the sandboxes' packets"))
	}
	return out
}

func (w firewall) describe() string {
	name := "nftables table " + w.table
	switch {
	case w.table == "firewalld":
		return "firewalld"
	case w.hasPrefix("ufw"):
		name = "ufw (table " + w.table + ")"
	case w.hasPrefix("DOCKER"):
		name = "Docker's firewall (table " + w.table + ")"
	}
	if w.legacy {
		name += ", of legacy iptables,"
	}
	return name
}

func (w firewall) hasPrefix(prefix string) bool {
	return slices.ContainsFunc(w.chains, func(c string) bool { return strings.HasPrefix(c, prefix) })
}

func (w firewall) remedy(guests netip.Prefix) string {
	tool := "iptables"
	if w.legacy {
		tool = "iptables-legacy"
	}
	admit := func(chain string) string {
		return fmt.Sprintf("%[1]s -I %[2]s -i %[3]s+ -j ACCEPT && %[1]s -I %[2]s -o %[3]s+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", tool, chain, guestLinks)
	}
	switch {
	case w.table == "firewalld":
		return "firewall-cmd --permanent --zone=trusted --add-interface=" + guestLinks + "+ && firewall-cmd --reload"
	case w.hasPrefix("ufw"):
		return "ufw route allow in on " + guestLinks + "+"
	case slices.Contains(w.chains, "DOCKER-USER"):
		return admit("DOCKER-USER")
	case w.table == "filter":
		return admit("FORWARD")
	}
	return fmt.Sprintf("in the forward chain of table %s accept packets with iifname \"%s*\", and replies to %s", w.table, guestLinks, guests)
}

func checkRange(_ context.Context, s Settings) []Finding {
	if s.Overlaps == nil {
		return nil
	}
	overlaps, err := s.Overlaps()
	return judgeRange(s.Range, overlaps, err)
}

func judgeRange(guests netip.Prefix, overlaps []Overlap, err error) []Finding {
	const check = "address range"
	if err != nil {
		return []Finding{warn(check, fmt.Sprintf("%s cannot be compared with what the machine uses: %v", guests, err), "run as root")}
	}
	var out []Finding
	for _, o := range overlaps {
		f := fail(check, o.Text, o.Remedy)
		if o.Kind == "route" {
			f.Level = LevelWarn // the guests' own routes are more specific, so only that part of the network is lost
		}
		out = append(out, f)
	}
	if len(out) == 0 {
		out = append(out, ok(check, fmt.Sprintf("nothing else uses %s", guests)))
	}
	return out
}

func checkResolvers(_ context.Context, s Settings) []Finding {
	if s.Resolvers == nil {
		return nil
	}
	return []Finding{judgeResolvers(s.Resolvers())}
}

func judgeResolvers(addrs []netip.Addr) Finding {
	const check = "name servers"
	if len(addrs) == 0 {
		return warn(check, "the machine's resolv.conf names no server that sandboxes can reach (they have IPv4, and no access to the machine itself)", "set name servers for the sandboxes in the configuration, such as 1.1.1.1")
	}
	names := make([]string, 0, len(addrs))
	for _, a := range addrs {
		names = append(names, a.String())
	}
	return ok(check, "sandboxes ask "+strings.Join(names, ", "))
}
