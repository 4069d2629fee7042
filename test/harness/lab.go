package harness

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A lab's things are named labPrefix, the test process's id, the number of the lab in it, and what they are.
const (
	labPrefix = "cloisterlab-"
	netnsDir  = "/run/netns"
	// bridgeLink is the switch that a lab's machines are plugged into.
	bridgeLink = "switch"
	// blockRules drop what the sets name. They are the switch's, so that no machine notices but by what does not arrive.
	blockRules = `table bridge lab {
	set pairs { type ipv4_addr . ipv4_addr; }
	set lonely { type ipv4_addr; }
	set mute { type ipv4_addr . ipv4_addr; }
	chain forward {
		type filter hook forward priority 0;
		ip saddr . ip daddr @pairs drop
		ip saddr @lonely drop
		ip daddr @lonely drop
		ip saddr . ip daddr @mute tcp flags & (syn | ack) == syn drop
	}
}`
)

// Lab is a network of machines of its own: each machine is a network namespace, the switch between them too. Nothing of it
// is in the network of the machine that the test runs on.
type Lab struct {
	tb     testing.TB
	prefix string
	next   byte
	// disk is the size of each machine's own disk; empty for none.
	disk string
	// machines by name.
	machines map[string]*Machine
}

// labs counts the labs of this test process.
var labs atomic.Int32 //nolint:gochecknoglobals // unique within the process

// NewLab makes an empty lab, which goes with all of its machines when the test ends. What a killed run left is removed first.
func NewLab(tb testing.TB) *Lab {
	tb.Helper()
	NeedRoot(tb)
	removeLeftovers(tb)
	l := &Lab{
		tb: tb, prefix: fmt.Sprintf("%s%d-%d-", labPrefix, os.Getpid(), labs.Add(1)),
		next: 10, machines: make(map[string]*Machine),
	}
	tb.Cleanup(l.remove)
	l.space(bridgeLink)
	l.ip("-n", l.prefix+bridgeLink, "link", "add", bridgeLink, "type", "bridge")
	l.ip("-n", l.prefix+bridgeLink, "addr", "add", "10.99.0.1/24", "dev", bridgeLink)
	l.ip("-n", l.prefix+bridgeLink, "link", "set", bridgeLink, "up")
	l.block(blockRules)
	return l
}

// space makes a namespace with its loopback up.
func (l *Lab) space(name string) {
	l.tb.Helper()
	l.ip("netns", "add", l.prefix+name)
	l.ip("-n", l.prefix+name, "link", "set", "lo", "up")
}

// Machine adds a machine that every other one can dial, at an address of 10.99.0.0/24.
func (l *Lab) Machine(name string) *Machine {
	l.tb.Helper()
	m := l.newMachine(name)
	l.space(name)
	l.plug(name, m.Addr)
	return m
}

// NAT adds a machine that can dial the others and cannot be dialed: a router translates its address to one of the lab's.
func (l *Lab) NAT(name string) *Machine {
	l.tb.Helper()
	m := l.newMachine(name)
	router := name + "-router"
	l.space(router)
	l.plug(router, m.Addr)
	l.space(name)
	number := m.Addr.As4()[3]
	inside, outside := fmt.Sprintf("10.98.%d.2", number), fmt.Sprintf("10.98.%d.1", number)
	l.ip("-n", l.prefix+router, "link", "add", "inside", "type", "veth", "peer", "name", "eth0", "netns", l.prefix+name)
	l.ip("-n", l.prefix+router, "addr", "add", outside+"/24", "dev", "inside")
	l.ip("-n", l.prefix+router, "link", "set", "inside", "up")
	l.ip("-n", l.prefix+name, "addr", "add", inside+"/24", "dev", "eth0")
	l.ip("-n", l.prefix+name, "link", "set", "eth0", "up")
	l.ip("-n", l.prefix+name, "route", "add", "default", "via", outside)
	err := l.inside(router, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) })
	if err != nil {
		l.tb.Fatal(err)
	}
	l.rules(router, `table ip lab {
	chain post { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }
	chain forward { type filter hook forward priority 0; ct state established,related accept; iifname "eth0" drop; }
}`)
	return m
}

func (l *Lab) newMachine(name string) *Machine {
	l.tb.Helper()
	if l.machines[name] != nil || name == bridgeLink {
		l.tb.Fatalf("a second machine %s", name)
	}
	dir, err := os.MkdirTemp("/var/tmp", l.prefix+name+"-") // on a disk: /tmp may be memory
	if err != nil {
		l.tb.Fatal(err)
	}
	m := &Machine{Name: name, Addr: netip.AddrFrom4([4]byte{10, 99, 0, l.next}), Dir: dir, lab: l, binary: Binary(l.tb)}
	l.next++
	l.machines[name] = m
	if l.disk != "" {
		m.disk(l.disk)
	}
	return m
}

// plug connects a namespace to the switch.
func (l *Lab) plug(name string, addr netip.Addr) {
	l.tb.Helper()
	port := fmt.Sprintf("p%d", addr.As4()[3])
	l.ip("-n", l.prefix+bridgeLink, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", l.prefix+name)
	l.ip("-n", l.prefix+bridgeLink, "link", "set", port, "master", bridgeLink, "up")
	l.ip("-n", l.prefix+name, "addr", "add", addr.String()+"/24", "dev", "eth0")
	l.ip("-n", l.prefix+name, "link", "set", "eth0", "up")
	l.ip("-n", l.prefix+name, "route", "add", "default", "via", "10.99.0.1")
}

// Partition cuts two machines off from each other.
func (l *Lab) Partition(a, b *Machine) {
	l.tb.Helper()
	l.PartitionOneWay(a, b)
	l.PartitionOneWay(b, a)
}

// PartitionOneWay drops what a sends to b; what b sends to a arrives.
func (l *Lab) PartitionOneWay(a, b *Machine) {
	l.tb.Helper()
	l.block(fmt.Sprintf("add element bridge lab pairs { %s . %s }", a.Addr, b.Addr))
}

// Mute keeps a from opening connections to b, as a firewall does; those that b opens work. Heal leaves it.
func (l *Lab) Mute(a, b *Machine) {
	l.tb.Helper()
	l.block(fmt.Sprintf("add element bridge lab mute { %s . %s }", a.Addr, b.Addr))
}

// Isolate cuts a machine off from every other.
func (l *Lab) Isolate(m *Machine) {
	l.tb.Helper()
	l.block(fmt.Sprintf("add element bridge lab lonely { %s }", m.Addr))
}

// Mend undoes Partition and PartitionOneWay between two machines, as far as there was one.
func (l *Lab) Mend(a, b *Machine) {
	l.tb.Helper()
	for _, pair := range [][2]*Machine{{a, b}, {b, a}} { // added first: what is not there cannot be deleted
		l.PartitionOneWay(pair[0], pair[1])
		l.block(fmt.Sprintf("delete element bridge lab pairs { %s . %s }", pair[0].Addr, pair[1].Addr))
	}
}

// Rejoin undoes Isolate.
func (l *Lab) Rejoin(m *Machine) {
	l.tb.Helper()
	l.block(fmt.Sprintf("delete element bridge lab lonely { %s }", m.Addr))
}

// Heal undoes every partition.
func (l *Lab) Heal() {
	l.tb.Helper()
	l.block("flush set bridge lab pairs; flush set bridge lab lonely")
}

func (l *Lab) block(rules string) {
	l.tb.Helper()
	l.rules(bridgeLink, rules)
}

// rules loads nftables rules in a namespace.
func (l *Lab) rules(name, text string) {
	l.tb.Helper()
	err := l.inside(name, func() error {
		cmd := exec.CommandContext(context.Background(), "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, bytes.TrimSpace(out))
		}
		return nil
	})
	if err != nil {
		l.tb.Fatal(err)
	}
}

// inside runs fn on a thread in a namespace of the lab. Processes that fn starts are in it, too.
func (l *Lab) inside(name string, fn func() error) error {
	return inNamespace(filepath.Join(netnsDir, l.prefix+name), fn)
}

// inNamespace runs fn on a thread that is in a network namespace. It is never the process's main thread: others read the
// process's namespace from there. A thread that cannot return ends.
func inNamespace(path string, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- inNamespace(path, fn) // this goroutine keeps the main thread, so that the next one gets another
			runtime.UnlockOSThread()
			return
		}
		home, err := netns.Get()
		if err != nil {
			done <- fmt.Errorf("open the thread's network namespace: %w", err)
			return
		}
		defer func() { _ = home.Close() }()
		there, err := netns.GetFromPath(path)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open network namespace %s: %w", path, err)
			return
		}
		defer func() { _ = there.Close() }()
		if err = netns.Set(there); err == nil {
			err = fn()
		}
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// ip runs one command of iproute2.
func (l *Lab) ip(args ...string) {
	l.tb.Helper()
	if out, err := exec.CommandContext(context.Background(), "ip", args...).CombinedOutput(); err != nil { //nolint:gosec // the lab's own commands
		l.tb.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
}

// remove takes everything away, whatever state it is in.
func (l *Lab) remove() {
	for _, m := range l.machines {
		m.remove()
	}
	removeSpaces(l.tb, l.prefix)
}

// removeSpaces removes the namespaces whose name starts with prefix; what runs in them ends first.
func removeSpaces(tb testing.TB, prefix string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	names, err := filepath.Glob(filepath.Join(netnsDir, prefix+"*"))
	if err != nil {
		tb.Error(err)
	}
	for _, path := range names {
		name := filepath.Base(path)
		out, err := exec.CommandContext(ctx, "ip", "netns", "pids", name).Output() //nolint:gosec // a name of ours
		if err != nil {
			tb.Logf("list processes of %s: %v", name, err)
		}
		for text := range strings.FieldsSeq(string(out)) {
			if pid, err := strconv.Atoi(text); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by itself
			}
		}
		if out, err := exec.CommandContext(ctx, "ip", "netns", "del", name).CombinedOutput(); err != nil { //nolint:gosec // a name of ours
			tb.Errorf("remove namespace %s: %v: %s", name, err, bytes.TrimSpace(out))
		}
	}
}

// removeLeftovers removes what test processes left that have ended: namespaces, what runs in them, and directories.
func removeLeftovers(tb testing.TB) {
	tb.Helper()
	for _, pattern := range []string{filepath.Join(netnsDir, labPrefix+"*"), filepath.Join("/var/tmp", labPrefix+"*")} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			tb.Fatal(err)
		}
		for _, path := range paths {
			owner, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), labPrefix), "-")
			pid, err := strconv.Atoi(owner)
			if err != nil || pid == os.Getpid() || syscall.Kill(pid, 0) == nil {
				continue // somebody's who still runs
			}
			tb.Logf("removing %s, which a killed test left", path)
			if strings.HasPrefix(path, netnsDir) {
				removeSpaces(tb, filepath.Base(path))
				continue
			}
			end(tb, path)
			purge(tb, path)
		}
	}
}
