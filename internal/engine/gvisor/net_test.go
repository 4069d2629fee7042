package gvisor

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const guestPort = 9000

// hostSide and guestSide are the two ends of the wire with number n, in the range that is for measurements (RFC 2544). Each
// process has a part of its own, so that two can test at once.
func hostSide(n int) string  { return wireRange() + fmt.Sprintf("%d/30", 4*n+1) }
func guestSide(n int) string { return wireRange() + fmt.Sprintf("%d/30", 4*n+2) }

func wireRange() string { return fmt.Sprintf("198.%d.%d.", 18+os.Getpid()>>8&1, os.Getpid()&0xff) }

// wire is a network namespace that a guest's address lives in, joined to the machine by a veth pair.
type wire struct {
	path, address string
}

// newWire makes a network for one guest. Tests use one at a time.
func newWire(tb testing.TB) wire {
	tb.Helper()
	return newWireAt(tb, 0)
}

// newWireAt makes a network for one guest with addresses of its own, for n up to 63.
func newWireAt(tb testing.TB, n int) wire {
	tb.Helper()
	needHost(tb)
	if err := rangeIsFree(hostSide(n)); err != nil {
		tb.Fatal(err)
	}
	name := "gv" + string(sandbox.NewNodeID())
	done := make(chan error)
	go func() { done <- makeWire(name, n) }()
	if err := <-done; err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if link, err := netlink.LinkByName(name); err == nil {
			if err := netlink.LinkDel(link); err != nil {
				tb.Error(err)
			}
		}
		if err := netns.DeleteNamed(name); err != nil {
			tb.Error(err)
		}
	})
	return wire{path: "/run/netns/" + name, address: net.JoinHostPort(strings.TrimSuffix(guestSide(n), "/30"), strconv.Itoa(guestPort))}
}

// rangeIsFree refuses to take addresses away from the machine: only a default route may lead to the tests' range.
func rangeIsFree(address string) error {
	_, ours, err := net.ParseCIDR(address)
	if err != nil {
		return err
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if r.Gw != nil && ours.Contains(r.Gw) {
			return fmt.Errorf("the route %v has its gateway in the tests' range %v", r, ours)
		}
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			continue
		}
		if r.Dst.Contains(ours.IP) || ours.Contains(r.Dst.IP) {
			return fmt.Errorf("the route %v overlaps the tests' range %v", r, ours)
		}
	}
	return nil
}

// makeWire runs on a thread of its own, which ends with it.
func makeWire(name string, n int) error {
	runtime.LockOSThread()
	host, err := netns.Get()
	if err != nil {
		return err
	}
	defer func() { _ = host.Close() }() // nothing is lost
	inside, err := netns.NewNamed(name) // enters it
	if err != nil {
		return err
	}
	defer func() { _ = inside.Close() }() // nothing is lost
	if err := netns.Set(host); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(inside)}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	h, err := netlink.NewHandleAt(inside, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := raise(h, "eth0", guestSide(n)); err != nil {
		return err
	}
	if err := raise(h, "lo", "127.0.0.1/8"); err != nil {
		return err
	}
	own, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer own.Close()
	return raise(own, name, hostSide(n))
}

// raise gives a link an address and turns it on.
func raise(h *netlink.Handle, name, address string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	if err := h.AddrAdd(link, addr); err != nil && name != "lo" {
		return err
	}
	return h.LinkSetUp(link)
}

// renew gives the wire its address back, which gVisor takes from it for the guest, so that another guest can have it.
func (w wire) renew(tb testing.TB, n int) {
	tb.Helper()
	inside, err := netns.GetFromPath(w.path)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = inside.Close() }() // nothing is lost
	h, err := netlink.NewHandleAt(inside, unix.NETLINK_ROUTE)
	if err != nil {
		tb.Fatal(err)
	}
	defer h.Close()
	if err := raise(h, "eth0", guestSide(n)); err != nil {
		tb.Fatal(err)
	}
}

// ask gives the test program in the guest a command, and returns its answer.
func (w wire) ask(tb testing.TB, command string) string {
	tb.Helper()
	answer, err := w.try(tb, command)
	if err != nil {
		tb.Fatalf("%s: %v", command, err)
	}
	return answer
}

// tell gives the test program a command that ends the guest, so that no answer can be expected: nothing closes the
// connections of a guest that is gone.
func (w wire) tell(tb testing.TB, command string) {
	tb.Helper()
	conn, err := w.dial(tb)
	if err != nil {
		tb.Fatalf("%s: %v", command, err)
	}
	if _, err := fmt.Fprintln(conn, command); err != nil {
		tb.Errorf("%s: %v", command, err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
}

func (w wire) try(tb testing.TB, command string) (string, error) {
	tb.Helper()
	conn, err := w.dial(tb)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }() // nothing is lost
	if _, err := fmt.Fprintln(conn, command); err != nil {
		return "", err
	}
	var out []string
	sc := bufio.NewScanner(conn)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() && sc.Text() != "" {
		out = append(out, sc.Text())
	}
	return strings.Join(out, "\n"), sc.Err()
}

// dial repeats until the guest listens.
func (w wire) dial(tb testing.TB) (net.Conn, error) {
	tb.Helper()
	ctx := testContext(tb)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", w.address)
		if err == nil {
			return conn, conn.SetDeadline(time.Now().Add(time.Minute))
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-tick.C:
		}
	}
}
