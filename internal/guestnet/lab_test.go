package guestnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	labName  = "t1e2s3"
	labRange = "10.199.0.0/16"
	// The machine's and the outside's ends of the laboratory's uplink.
	hostAddr    = "198.51.100.2"
	outsideAddr = "198.51.100.1"
	metadata    = "169.254.169.254"
	uplinkMTU   = 1400
)

// lab is a machine of its own for one test: a network namespace that the test's goroutine lives in, and an outside that
// it reaches over an uplink.
type lab struct {
	tb      testing.TB
	host    netns.NsHandle
	outside netns.NsHandle
}

// newLab moves the test's goroutine into a fresh machine; its thread ends with the test.
func newLab(tb testing.TB) *lab {
	tb.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the switch of the test run
			tb.Fatal("needs root")
		}
		tb.Skip("needs root")
	}
	runtime.LockOSThread()
	l := &lab{tb: tb}
	var err error
	l.outside, err = netns.New()
	must(tb, err)
	setUp(tb, "lo")
	l.host, err = netns.New()
	must(tb, err)
	setUp(tb, "lo")
	must(tb, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "up0", MTU: uplinkMTU}, PeerName: "eth0", PeerNamespace: netlink.NsFd(l.outside),
	}))
	addAddr(tb, "up0", hostAddr+"/24")
	setUp(tb, "up0")
	must(tb, netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(outsideAddr)}))
	l.in(l.outside, func() error {
		addAddr(tb, "eth0", outsideAddr+"/24")
		addAddr(tb, "lo", metadata+"/32")
		setUp(tb, "eth0")
		// The outside knows the way to the guests, so that only the rules keep it away.
		return netlink.RouteAdd(&netlink.Route{Dst: ipNet(netip.MustParseAddr("10.0.0.0"), 8), Gw: net.ParseIP(hostAddr)})
	})
	tb.Cleanup(func() {
		_ = l.outside.Close()
		_ = l.host.Close()
	})
	return l
}

func (l *lab) in(ns netns.NsHandle, fn func() error) {
	l.tb.Helper()
	must(l.tb, inNamespace(ns, fn))
}

// enter runs fn inside an attachment's namespace, as a guest would.
func (l *lab) enter(a Attachment, fn func() error) error {
	l.tb.Helper()
	ns, err := netns.GetFromPath(a.NetNS)
	must(l.tb, err)
	defer func() { _ = ns.Close() }()
	return inNamespace(ns, fn)
}

func (l *lab) manager(change ...func(*Config)) *Manager {
	l.tb.Helper()
	cfg := Config{Range: netip.MustParsePrefix(labRange), Name: labName}
	for _, c := range change {
		c(&cfg)
	}
	m, err := New(cfg)
	must(l.tb, err)
	l.tb.Cleanup(m.Close)
	return m
}

func (l *lab) acquire(m *Manager, id sandbox.ID, internet bool) Attachment {
	l.tb.Helper()
	a, err := m.Acquire(l.tb.Context(), id, Policy{AllowInternet: internet})
	must(l.tb, err)
	return a
}

// serve answers each TCP connection to addr with the address that it came from. It is called inside a namespace.
func (l *lab) serve(addr string) (netip.AddrPort, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(l.tb.Context(), "tcp4", addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, c.RemoteAddr().String()+"\n")
			l.tb.Cleanup(func() { _ = c.Close() })
		}
	}()
	l.tb.Cleanup(func() {
		_ = ln.Close()
		<-done
	})
	return netip.MustParseAddrPort(ln.Addr().String()), nil
}

func (l *lab) serveIn(ns netns.NsHandle, addr string) netip.AddrPort {
	l.tb.Helper()
	var out netip.AddrPort
	l.in(ns, func() (err error) {
		out, err = l.serve(addr)
		return err
	})
	return out
}

// dial connects from the calling thread's namespace and returns who the server saw.
func dial(to netip.AddrPort) (netip.Addr, error) {
	c, seen, err := connect(to)
	if err == nil {
		err = c.Close()
	}
	return seen, err
}

func connect(to netip.AddrPort) (net.Conn, netip.Addr, error) {
	d := net.Dialer{Timeout: 400 * time.Millisecond}
	c, err := d.DialContext(context.Background(), "tcp4", to.String())
	if err != nil {
		return nil, netip.Addr{}, err
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Second))
	var line [64]byte
	n, err := c.Read(line[:])
	if err != nil {
		_ = c.Close()
		return nil, netip.Addr{}, err
	}
	seen, err := netip.ParseAddrPort(strings.TrimSpace(string(line[:n])))
	return c, seen.Addr(), err
}

// wantReach fails the test unless a guest's connection arrives, and from the address that is wanted.
func (l *lab) wantReach(a Attachment, to netip.AddrPort, from string) {
	l.tb.Helper()
	err := l.enter(a, func() error {
		seen, err := dial(to)
		if err == nil && seen.String() != from {
			return fmt.Errorf("server saw %s, want %s", seen, from)
		}
		return err
	})
	if err != nil {
		l.tb.Errorf("guest %s to %s: %v", a.GuestAddr, to, err)
	}
}

func (l *lab) wantNoReach(a Attachment, to netip.AddrPort) {
	l.tb.Helper()
	err := l.enter(a, func() error {
		_, err := dial(to)
		return err
	})
	if err == nil {
		l.tb.Errorf("guest %s reaches %s", a.GuestAddr, to)
	} else if !errors.Is(err, os.ErrDeadlineExceeded) && !isTimeout(err) {
		l.tb.Errorf("guest %s to %s: %v, want a timeout", a.GuestAddr, to, err)
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// eventually waits until a condition holds, without an opinion on how long that takes.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	limit := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-poll.C:
		case <-limit:
			tb.Fatalf("never happened: %s", what)
		}
	}
}

func hasLink(name string) bool {
	_, err := netlink.LinkByName(name)
	return err == nil
}

// nft runs the nft tool in the test's namespace.
func nft(tb testing.TB, script string) string {
	tb.Helper()
	path, err := exec.LookPath("nft")
	if err != nil {
		tb.Skip("needs the nft tool")
	}
	cmd := exec.CommandContext(tb.Context(), path, "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		tb.Fatalf("nft: %v: %s", err, out)
	}
	return string(out)
}

func setUp(tb testing.TB, name string) {
	tb.Helper()
	link, err := netlink.LinkByName(name)
	must(tb, err)
	must(tb, netlink.LinkSetUp(link))
}

func addAddr(tb testing.TB, link, cidr string) {
	tb.Helper()
	to, err := netlink.LinkByName(link)
	must(tb, err)
	addr, err := netlink.ParseAddr(cidr)
	must(tb, err)
	must(tb, netlink.AddrAdd(to, addr))
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// port returns addr with a's port.
func port(addr string, a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), a.Port())
}

// unacknowledged returns how many bytes of the connection the other side has not confirmed, a little after the last one
// was sent.
func unacknowledged(tb testing.TB, c net.Conn) int {
	tb.Helper()
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		tb.Fatalf("connection is a %T", c)
	}
	raw, err := tcp.SyscallConn()
	must(tb, err)
	<-time.After(100 * time.Millisecond)
	var n int
	var failed error
	must(tb, raw.Control(func(fd uintptr) { n, failed = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) }))
	must(tb, failed)
	return n
}

// serveGuest serves on a free port of the guest's address.
func (l *lab) serveGuest(a Attachment) netip.AddrPort {
	l.tb.Helper()
	var out netip.AddrPort
	must(l.tb, l.enter(a, func() (err error) {
		out, err = l.serve(a.GuestAddr.String() + ":0")
		return err
	}))
	return out
}
