package guestnet

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// routeProtocol marks routes as ours; the numbers up to 191 belong to others by custom.
	routeProtocol = 199
	defaultMTU    = 1500
)

// wire makes and removes namespaces and links. It keeps no state; its methods are safe for concurrent use.
type wire struct {
	plan plan
	host netns.NsHandle
	nl   *netlink.Handle // in host
	mtu  int             // 0 follows the uplink
}

// build makes the namespace and the link of an index and returns the open namespace. ErrExist (as unix.EEXIST) means
// that a link of that index is still there. After an error nothing is left.
func (w *wire) build(index int) (netns.NsHandle, error) {
	ns := netns.None()
	err := onThread(func() error {
		made, err := netns.New()
		if err != nil {
			return fmt.Errorf("create network namespace: %w", err)
		}
		if err := w.furnish(index, made); err != nil {
			_ = made.Close() // the namespace and both ends of the link end with it
			return err
		}
		ns = made
		return nil
	})
	return ns, err
}

// furnish runs on a thread inside the new namespace and leaves it in the machine's.
func (w *wire) furnish(index int, ns netns.NsHandle) error {
	inside, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in the namespace: %w", err)
	}
	defer inside.Close()
	// IPv4 alone on the link, while ::1 stays on the loopback interface.
	if err := writeSetting("ipv6/conf/default/disable_ipv6", "1"); err != nil {
		return err
	}
	if err := netns.Set(w.host); err != nil {
		return fmt.Errorf("return to the machine's network namespace: %w", err)
	}
	mtu := w.uplinkMTU()
	err = w.nl.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{
			Name: w.plan.link(index), MTU: mtu, HardwareAddr: w.plan.mac(index, hostEnd),
		},
		PeerName: guestLink, PeerMTU: uint32(mtu), PeerHardwareAddr: w.plan.mac(index, guestEnd), //nolint:gosec // an MTU
		PeerNamespace: netlink.NsFd(ns),
	})
	if err != nil {
		return fmt.Errorf("create link %s: %w", w.plan.link(index), err)
	}
	if err := w.furnishHost(index); err != nil {
		return err
	}
	if err := w.furnishGuest(inside, index); err != nil {
		return err
	}
	awaitCarrier(w.nl, w.plan.link(index))
	awaitCarrier(inside, guestLink)
	return nil
}

// awaitCarrier waits until a link takes packets: the end that was set up first does so a little after the other one, and
// drops until then what would be sent again a second later. A link that takes long is used all the same.
func awaitCarrier(nl *netlink.Handle, name string) {
	poll := time.NewTicker(200 * time.Microsecond)
	defer poll.Stop()
	limit := time.NewTimer(time.Second)
	defer limit.Stop()
	for {
		link, err := nl.LinkByName(name)
		if err != nil || link.Attrs().OperState == netlink.OperUp {
			return
		}
		select {
		case <-poll.C:
		case <-limit.C:
			return
		}
	}
}

// furnishHost configures the machine's end of the link.
func (w *wire) furnishHost(index int) error {
	name := w.plan.link(index)
	link, err := w.nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	for _, s := range [][2]string{
		{"ipv6/conf/" + name + "/disable_ipv6", "1"},
		{"ipv4/conf/" + name + "/rp_filter", "1"},
		{"ipv4/conf/" + name + "/send_redirects", "0"},
	} {
		if err := writeSetting(s[0], s[1]); err != nil {
			return err
		}
	}
	if err := w.nl.AddrAdd(link, &netlink.Addr{IPNet: ipNet(w.plan.gateway(index), 31)}); err != nil {
		return fmt.Errorf("add address %s to %s: %w", w.plan.gateway(index), name, err)
	}
	if err := w.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return permanentNeighbour(w.nl, link, w.plan.guest(index).AsSlice(), w.plan.mac(index, guestEnd))
}

// furnishGuest configures the namespace's side.
func (w *wire) furnishGuest(inside *netlink.Handle, index int) error {
	lo, err := inside.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	link, err := inside.LinkByName(guestLink)
	if err != nil {
		return fmt.Errorf("find the guest's link: %w", err)
	}
	if err := inside.AddrAdd(link, &netlink.Addr{IPNet: ipNet(w.plan.guest(index), 31)}); err != nil {
		return fmt.Errorf("add guest address %s: %w", w.plan.guest(index), err)
	}
	if err := errors.Join(inside.LinkSetUp(lo), inside.LinkSetUp(link)); err != nil {
		return fmt.Errorf("set the namespace's links up: %w", err)
	}
	gateway := w.plan.gateway(index).AsSlice()
	if err := inside.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway}); err != nil {
		return fmt.Errorf("add default route by %s: %w", w.plan.gateway(index), err)
	}
	return permanentNeighbour(inside, link, gateway, w.plan.mac(index, hostEnd))
}

// permanentNeighbour spares the first packet a question, and the kernel's table of neighbours, which holds 1,024
// learned entries by default and any number of permanent ones.
func permanentNeighbour(nl *netlink.Handle, link netlink.Link, ip net.IP, mac net.HardwareAddr) error {
	err := nl.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac,
	})
	if err != nil {
		return fmt.Errorf("add neighbour %s: %w", ip, err)
	}
	return nil
}

// uplinkMTU returns the size of packet that reaches the outside: what the guests' links get, since a larger one
// depends on messages that many networks drop.
func (w *wire) uplinkMTU() int {
	if w.mtu > 0 {
		return w.mtu
	}
	routes, err := w.nl.RouteGet(net.IPv4(1, 0, 0, 1)) // any address of the outside; nothing is sent
	if err != nil || len(routes) == 0 {
		return defaultMTU
	}
	link, err := w.nl.LinkByIndex(routes[0].LinkIndex)
	if err != nil || link.Attrs().MTU < 576 || link.Attrs().Flags&net.FlagLoopback != 0 {
		return defaultMTU
	}
	return min(link.Attrs().MTU, 9000)
}

// find returns the kernel's number of an index's link; 0 means that there is none.
func (w *wire) find(index int) (int, error) {
	link, err := w.nl.LinkByName(w.plan.link(index))
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("find link %s: %w", w.plan.link(index), err)
	}
	return link.Attrs().Index, nil
}

// list returns the node's links: the kernel's number by index.
func (w *wire) list() (map[int]int, error) {
	links, err := w.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := make(map[int]int)
	for _, l := range links {
		if index, ok := w.plan.parseLink(l.Attrs().Name); ok && l.Type() == "veth" {
			out[index] = l.Attrs().Index
		}
	}
	return out, nil
}

// remove deletes a link by the kernel's number, so that a new link of the same name is never hit.
func (w *wire) remove(number int) error {
	err := w.nl.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: number}})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %d: %w", number, err)
	}
	return nil
}

// guardRange makes addresses of the range that no sandbox has answer at once with "unreachable", instead of sending
// packets for them to the machine's own gateway.
func (w *wire) guardRange() error {
	err := w.nl.RouteReplace(w.rangeRoute())
	if err != nil {
		return fmt.Errorf("add unreachable route %s: %w", w.plan.prefix, err)
	}
	return nil
}

func (w *wire) unguardRange() error {
	err := w.nl.RouteDel(w.rangeRoute())
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("delete unreachable route %s: %w", w.plan.prefix, err)
	}
	return nil
}

func (w *wire) rangeRoute() *netlink.Route {
	return &netlink.Route{
		Dst: ipNet(w.plan.prefix.Addr(), w.plan.prefix.Bits()), Type: unix.RTN_UNREACHABLE, Protocol: routeProtocol,
	}
}
