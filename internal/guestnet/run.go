package guestnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// tick is how often Run looks after the table and the links of ended sandboxes.
	tick = 2 * time.Second
	// patience is how many ticks the kernel gets to remove a link by itself.
	patience = 1
	// forwardSetting is the one setting of the machine that this package changes.
	forwardSetting = "ipv4/ip_forward"
)

// Run keeps the pool full, puts the rules back when somebody else removed them, and finishes what Release began. It
// blocks until ctx is done; then the pool is emptied.
func (m *Manager) Run(ctx context.Context) error {
	if err := m.prepare(ctx); err != nil {
		return err
	}
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		m.fill(ctx)
		select {
		case <-ctx.Done():
			m.drain()
			return nil
		case <-m.wake:
		case <-ticker.C:
			m.reap()
			m.guard()
		}
	}
}

// fill makes networks until the pool is full or one cannot be made.
func (m *Manager) fill(ctx context.Context) {
	for ctx.Err() == nil {
		m.mu.Lock()
		missing := m.cfg.PoolSize - len(m.ready)
		m.mu.Unlock()
		if missing <= 0 {
			return
		}
		s, err := m.make(ctx)
		if err == nil {
			// Outside allowed: the most frequent answer costs nothing when the network is handed out.
			err = m.fw.put(m.plan.link(s.index), permit{m.plan.guest(s.index), true})
		}
		if err != nil {
			err = errors.Join(err, m.discard(s))
			if ctx.Err() == nil && !errors.Is(err, sandbox.ErrExhausted) {
				m.log.WarnContext(ctx, "network pool not filled", slog.Int("missing", missing), slog.Any("err", err))
			}
			return
		}
		m.mu.Lock()
		m.ready = append(m.ready, s)
		m.mu.Unlock()
	}
}

func (m *Manager) drain() {
	m.mu.Lock()
	ready := m.ready
	m.ready = nil
	m.mu.Unlock()
	for _, s := range ready {
		if err := m.discard(s); err != nil {
			m.log.Warn("pooled network not removed", slog.String("link", m.plan.link(s.index)), slog.Any("err", err))
		}
	}
}

// reap frees the indexes whose links are gone and removes the links that something still holds.
func (m *Manager) reap() {
	m.mu.Lock()
	leaving := slices.Clone(m.leaving)
	m.mu.Unlock()
	gone := make(map[*leaver]bool)
	for _, l := range leaving {
		number, err := m.wire.find(l.index)
		l.checked++
		if err == nil && number != 0 && l.checked > patience {
			err = m.wire.remove(number)
		}
		if err != nil {
			m.log.Warn("link of an ended sandbox not removed", slog.String("link", m.plan.link(l.index)), slog.Any("err", err))
			continue
		}
		gone[l] = number == 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leaving = slices.DeleteFunc(m.leaving, func(l *leaver) bool {
		if gone[l] {
			m.ledger.free(l.index)
		}
		return gone[l]
	})
}

// guard puts the table back when it is not as it should be, such as after "nft flush ruleset".
func (m *Manager) guard() {
	intact, err := m.fw.intact()
	if intact {
		return
	}
	m.log.Warn("network rules were changed by somebody else, putting them back",
		slog.String("table", m.plan.table()), slog.Any("err", err))
	if err := m.fw.rebuild(); err != nil {
		m.log.Error("network rules cannot be put back: sandboxes are not isolated from this machine",
			slog.String("table", m.plan.table()), slog.Any("err", err))
	}
}

// prepare makes the machine ready, once: forwarding on, rules in place, the range guarded.
func (m *Manager) prepare(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	prepared := m.prepared
	m.mu.Unlock()
	if prepared {
		return nil
	}
	if err := m.takeRange(); err != nil {
		return err
	}
	if err := m.enableForwarding(); err != nil {
		return err
	}
	if err := m.fw.ensure(); err != nil {
		return err
	}
	m.mu.Lock()
	m.prepared = true
	m.mu.Unlock()
	return nil
}

// takeRange guards the node's range, after making sure that no other node of this machine has it, and lets go of
// another range that this node had earlier.
func (m *Manager) takeRange() error {
	ranges, err := m.fw.tableRanges()
	if err != nil {
		return fmt.Errorf("read the ranges of this machine's nodes: %w", err)
	}
	for table, prefixes := range ranges {
		for _, p := range prefixes {
			switch {
			case table == m.plan.table() && p != m.plan.prefix:
				old := *m.wire
				old.plan.prefix = p
				if err := old.unguardRange(); err != nil {
					return err
				}
			case table != m.plan.table() && p.Overlaps(m.plan.prefix):
				return sandbox.Conflictf("guest address range %s overlaps %s of node %s on this machine: choose another with --network-range; "+
					"where that node is gone, `nft delete table inet %s` removes what is left of it",
					m.plan.prefix, p, strings.TrimPrefix(table, tablePrefix), table)
			}
		}
	}
	return m.wire.guardRange()
}

// enableForwarding switches forwarding on. It is never switched off again: others may have come to rely on it.
func (m *Manager) enableForwarding() error {
	return inNamespace(m.host, func() error {
		before, err := os.ReadFile("/proc/sys/net/" + forwardSetting)
		if err != nil {
			return fmt.Errorf("read setting net/%s: %w", forwardSetting, err)
		}
		if strings.TrimSpace(string(before)) == "1" {
			return nil
		}
		if err := writeSetting(forwardSetting, "1"); err != nil {
			return sandbox.Unavailablef("%v: run \"sysctl -w net.ipv4.ip_forward=1\" on the machine", err)
		}
		m.log.Info("ip forwarding switched on", slog.String("setting", "net.ipv4.ip_forward"), slog.String("before", strings.TrimSpace(string(before))))
		return nil
	})
}

// Sweep removes the links and rules of this node that no sandbox has: what an earlier process left. Adopt comes first.
func (m *Manager) Sweep(ctx context.Context) error {
	if err := m.prepare(ctx); err != nil {
		return err
	}
	if err := m.fw.rebuild(); err != nil {
		return err
	}
	links, err := m.wire.list()
	if err != nil {
		return err
	}
	var errs []error
	for index, number := range links {
		m.mu.Lock()
		used := m.ledger.holds(index)
		m.mu.Unlock()
		if used {
			continue
		}
		errs = append(errs, ctx.Err(), m.wire.remove(number))
		m.log.InfoContext(ctx, "network of an unknown sandbox removed", slog.String("link", m.plan.link(index)))
	}
	return errors.Join(errs...)
}

// Purge removes everything of this node from the machine, networks of running sandboxes included, and nothing else.
// ip_forward keeps its value.
func (m *Manager) Purge(ctx context.Context) error {
	m.drain()
	ranges, err := m.fw.tableRanges()
	errs := []error{err}
	links, err := m.wire.list()
	errs = append(errs, err)
	for _, number := range links {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, m.wire.remove(number))
	}
	for _, p := range append(ranges[m.plan.table()], m.plan.prefix) {
		own := *m.wire
		own.plan.prefix = p
		errs = append(errs, own.unguardRange())
	}
	errs = append(errs, m.fw.remove())
	m.mu.Lock()
	m.prepared = false
	m.mu.Unlock()
	return errors.Join(errs...)
}
