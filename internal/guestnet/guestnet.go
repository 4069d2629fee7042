package guestnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Config is what a Manager needs to know.
type Config struct {
	// Range is where guests get their addresses from: an IPv4 prefix of 8 to 28 bits. Each sandbox takes two addresses,
	// so that a /16 has room for 32,766.
	Range netip.Prefix
	// Name is the node's id, 6 characters of a-z and 0-9. It is part of the name of everything that the Manager makes.
	Name string
	// PoolSize is how many networks Run keeps ready; 0 makes each one when it is asked for.
	PoolSize int
	// Denied are further destinations that no guest may reach, such as the private networks around the machine. It may
	// cover Range: guests still answer the machine.
	Denied []netip.Prefix
	// Resolvers are the name servers that guests are told to use. Port 53 of these is reachable even where a metadata
	// service, which is always denied, has the same address.
	Resolvers []netip.Addr
	// MaxConnections is the most connections of one guest that the machine's connection tracking, which all share,
	// holds at a time; further ones are dropped. 0 is no limit.
	MaxConnections int
	// MTU of the guests' links in bytes; 0 takes that of the link to the outside.
	MTU    int
	Logger *slog.Logger
}

// Policy is what a sandbox may do on the network.
type Policy struct {
	// AllowInternet permits connections to the outside. Without it nothing leaves, also not of connections that are
	// open; only the machine itself still reaches the sandbox.
	AllowInternet bool
}

// Attachment is the network of one sandbox.
type Attachment struct {
	SandboxID sandbox.ID `json:"sandbox_id"`
	// NetNS is the path of the namespace, for the engine that starts the guest. It is good in this process's lifetime
	// until Release; from then on the guest's own processes lead to the namespace.
	NetNS string `json:"netns"`
	// Link is the name of the machine's end of the link.
	Link      string     `json:"link"`
	GuestAddr netip.Addr `json:"guest_addr"`
	// Gateway is the machine's address on the link, from which it dials the guest.
	Gateway netip.Addr `json:"gateway"`
}

// Usage counts the networks of a node.
type Usage struct {
	// Attached ones belong to sandboxes, Ready ones wait in the pool, Capacity is what the range has room for.
	Attached, Ready, Capacity int
}

// slot is one made network.
type slot struct {
	index int
	ns    netns.NsHandle // None for an adopted one
}

// Manager makes, hands out and takes away the networks of a node's sandboxes.
type Manager struct {
	cfg  Config
	plan plan
	log  *slog.Logger
	host netns.NsHandle
	wire *wire
	fw   *firewall
	// builders limits how many threads make networks at a time; the kernel does one after the other anyway.
	builders chan struct{}
	// wake asks Run to look at the pool.
	wake chan struct{}

	mu       sync.Mutex
	ledger   *ledger
	attached map[sandbox.ID]*slot // nil while it is being made
	ready    []*slot
	leaving  []*leaver
	prepared bool
}

// leaver is a released network whose link the kernel may not have taken away yet.
type leaver struct {
	index   int
	checked int
}

// New checks the configuration and opens what it needs; it changes nothing on the machine. Close ends it.
func New(cfg Config) (*Manager, error) {
	p, err := newPlan(cfg.Range, cfg.Name)
	if err != nil {
		return nil, err
	}
	if cfg.PoolSize < 0 || cfg.PoolSize > p.capacity()/2 {
		return nil, sandbox.Invalidf("network pool of %d: want 0 to %d, half of what range %s holds", cfg.PoolSize, p.capacity()/2, p.prefix)
	}
	if cfg.MaxConnections < 0 || cfg.MaxConnections > 1<<24 {
		return nil, sandbox.Invalidf("connections per guest %d: want 0 (no limit) to %d", cfg.MaxConnections, 1<<24)
	}
	if cfg.MTU != 0 && (cfg.MTU < 576 || cfg.MTU > 65535) {
		return nil, sandbox.Invalidf("guest MTU %d: want 0 (that of the uplink) or 576 to 65535", cfg.MTU)
	}
	host, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("open the machine's network namespace: %w", err)
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		_ = host.Close() // nothing was written
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	rules := ruleSet{plan: p, denied: cfg.Denied, resolvers: cfg.Resolvers, connections: cfg.MaxConnections}
	return &Manager{
		cfg: cfg, plan: p, log: log, host: host,
		wire:     &wire{plan: p, host: host, nl: nl, mtu: cfg.MTU},
		fw:       newFirewall(rules, host),
		builders: make(chan struct{}, 4),
		wake:     make(chan struct{}, 1),
		ledger:   newLedger(1, p.capacity(), rand.IntN(p.capacity())), //nolint:gosec // not a secret: spreads the addresses
		attached: make(map[sandbox.ID]*slot),
	}, nil
}

// Close frees what the Manager itself holds. Networks of running sandboxes stay, since their processes hold them.
func (m *Manager) Close() {
	m.mu.Lock()
	ready := m.ready
	m.ready = nil
	var open []netns.NsHandle
	for _, s := range m.attached {
		if s != nil {
			open = append(open, s.ns)
		}
	}
	clear(m.attached)
	m.mu.Unlock()
	for _, s := range ready {
		open = append(open, s.ns)
	}
	for i := range open {
		closeNamespace(&open[i])
	}
	m.fw.close()
	m.wire.nl.Close()
	_ = m.host.Close() // nothing was written
}

// Usage returns the present counts.
func (m *Manager) Usage() Usage {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Usage{Attached: len(m.attached), Ready: len(m.ready), Capacity: m.plan.capacity()}
}

// Acquire gives the sandbox a network. It returns ErrConflict when the sandbox has one, ErrExhausted when every address
// of the range is in use. Taking one from the pool changes one element of the rules at most; making one takes
// some milliseconds.
func (m *Manager) Acquire(ctx context.Context, id sandbox.ID, p Policy) (Attachment, error) {
	if err := m.prepare(ctx); err != nil {
		return Attachment{}, err
	}
	s, err := m.reserve(id)
	if err != nil {
		return Attachment{}, err
	}
	if s == nil {
		s, err = m.make(ctx)
	}
	if err == nil {
		err = m.fw.put(m.plan.link(s.index), permit{m.plan.guest(s.index), p.AllowInternet})
	}
	m.mu.Lock()
	if err == nil {
		m.attached[id] = s
	} else {
		delete(m.attached, id)
	}
	m.mu.Unlock()
	m.nudge()
	if err != nil {
		return Attachment{}, errors.Join(fmt.Errorf("give sandbox %s a network: %w", id, err), m.discard(s))
	}
	return m.describe(id, s), nil
}

// reserve keeps a place for the sandbox and takes a network from the pool, if there is one.
func (m *Manager) reserve(id sandbox.ID) (*slot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, has := m.attached[id]; has {
		return nil, sandbox.Conflictf("sandbox %s has a network already", id)
	}
	m.attached[id] = nil
	if len(m.ready) == 0 {
		return nil, nil //nolint:nilnil // no slot is the normal answer of an empty pool
	}
	s := m.ready[0]
	m.ready = m.ready[1:]
	return s, nil
}

// make makes a network, trying other indexes where the link of an earlier sandbox is still there.
func (m *Manager) make(ctx context.Context) (*slot, error) {
	select {
	case m.builders <- struct{}{}:
		defer func() { <-m.builders }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for range 8 {
		m.mu.Lock()
		index, ok := m.ledger.take()
		if !ok {
			index, ok = m.takeLeaver()
		}
		attached := len(m.attached)
		m.mu.Unlock()
		if !ok {
			return nil, sandbox.Exhaustedf("all %d addresses of range %s are in use, %d by sandboxes", m.plan.capacity(), m.plan.prefix, attached)
		}
		ns, err := m.wire.build(index)
		if err == nil {
			return &slot{index: index, ns: ns}, nil
		}
		m.mu.Lock()
		m.ledger.free(index)
		m.mu.Unlock()
		if !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	return nil, sandbox.Unavailablef("links of ended sandboxes are still being removed")
}

// takeLeaver takes the index that left first, when no other is free. It needs mu.
func (m *Manager) takeLeaver() (int, bool) {
	if len(m.leaving) == 0 {
		return 0, false
	}
	l := m.leaving[0]
	m.leaving = m.leaving[1:]
	return l.index, true
}

// discard takes away a network that no sandbox got.
func (m *Manager) discard(s *slot) error {
	if s == nil {
		return nil
	}
	err := m.fw.drop(m.plan.link(s.index))
	closeNamespace(&s.ns)
	m.mu.Lock()
	m.leaving = append(m.leaving, &leaver{index: s.index})
	m.mu.Unlock()
	return err
}

// SetPolicy changes what a sandbox may do; open connections follow at once.
func (m *Manager) SetPolicy(_ context.Context, id sandbox.ID, p Policy) error {
	m.mu.Lock()
	s := m.attached[id]
	m.mu.Unlock()
	if s == nil {
		return sandbox.NotFoundf("sandbox %s has no network", id)
	}
	if err := m.fw.put(m.plan.link(s.index), permit{m.plan.guest(s.index), p.AllowInternet}); err != nil {
		return fmt.Errorf("set network policy of sandbox %s: %w", id, err)
	}
	return nil
}

// Adopt takes over a network that an earlier process made and whose guest still runs. It returns ErrNotFound when the
// network is gone, ErrInvalid when it is not of this node, ErrConflict when another sandbox has it.
func (m *Manager) Adopt(_ context.Context, a Attachment, p Policy) error {
	index, err := m.plan.indexOf(a.GuestAddr)
	if err != nil {
		return fmt.Errorf("adopt network of sandbox %s: %w", a.SandboxID, err)
	}
	if want := m.plan.link(index); a.Link != want {
		return sandbox.Invalidf("adopt network of sandbox %s: link %.40q, want %s", a.SandboxID, a.Link, want)
	}
	number, err := m.wire.find(index)
	if err != nil {
		return fmt.Errorf("adopt network of sandbox %s: %w", a.SandboxID, err)
	}
	if number == 0 {
		return sandbox.NotFoundf("adopt network of sandbox %s: link %s is gone", a.SandboxID, a.Link)
	}
	m.mu.Lock()
	_, has := m.attached[a.SandboxID]
	if has || !m.ledger.claim(index) {
		m.mu.Unlock()
		return sandbox.Conflictf("adopt network of sandbox %s: %s is in use, or the sandbox has a network", a.SandboxID, a.GuestAddr)
	}
	m.attached[a.SandboxID] = &slot{index: index, ns: netns.None()}
	prepared := m.prepared
	m.mu.Unlock()
	want := permit{m.plan.guest(index), p.AllowInternet}
	if !prepared {
		m.fw.expect(a.Link, want) // Sweep replaces the table once, for all of them
		return nil
	}
	if err := m.fw.put(a.Link, want); err != nil {
		return fmt.Errorf("adopt network of sandbox %s: %w", a.SandboxID, err)
	}
	return nil
}

// Release takes the sandbox's network away. The kernel removes link and namespace in the background, once the
// guest's processes are gone. Releasing what is not there is no error.
func (m *Manager) Release(_ context.Context, id sandbox.ID) error {
	m.mu.Lock()
	s := m.attached[id]
	if s != nil {
		delete(m.attached, id)
	}
	m.mu.Unlock()
	if s == nil {
		return nil
	}
	err := m.discard(s)
	m.nudge()
	if err != nil {
		return fmt.Errorf("release network of sandbox %s: %w", id, err)
	}
	return nil
}

// nudge wakes Run; one wake-up is enough for all that happened before it looks.
func (m *Manager) nudge() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *Manager) describe(id sandbox.ID, s *slot) Attachment {
	return Attachment{
		SandboxID: id,
		NetNS:     fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(s.ns)),
		Link:      m.plan.link(s.index),
		GuestAddr: m.plan.guest(s.index),
		Gateway:   m.plan.gateway(s.index),
	}
}

func closeNamespace(ns *netns.NsHandle) {
	if ns.IsOpen() {
		_ = ns.Close() // nothing was written
	}
}
