package link

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Dial keeps the link of a member up that waits for it at an address, HOST:PORT, with Link.Await, until ctx ends. Who that is
// its certificate says; it must have the role.
func (h *Hub) Dial(ctx context.Context, role sandbox.Role, address string) error {
	said := ""
	for wait := firstRetry; ctx.Err() == nil; wait = min(2*wait, lastRetry) {
		began := time.Now()
		err := h.reach(ctx, role, address)
		if err == nil {
			said = ""
		}
		if err != nil && ctx.Err() == nil && err.Error() != said { // attempts go on every few seconds: the same reason is told once
			said = err.Error()
			h.cfg.Logger.WarnContext(ctx, "no link", slog.String("member", string(role)), slog.String("address", address), slog.Any("err", err))
		}
		if time.Since(began) > stable {
			wait = firstRetry
		}
		if !pause(ctx, jitter(wait)) {
			break
		}
	}
	return nil
}

// reach makes a link to the member at an address and keeps it until it ends. The error says why there was none.
func (h *Hub) reach(ctx context.Context, role sandbox.Role, address string) error {
	c, err := dialTLS(ctx, address, h.cfg.ClientTLS(sandbox.Member{Role: role}), protoControl, dialTimeout)
	if err != nil {
		return fmt.Errorf("dial %s: %w", address, err)
	}
	m, err := h.cfg.Identify(c.ConnectionState())
	if err != nil {
		_ = c.Close()
		return err
	}
	var id linkID
	_, _ = rand.Read(id[:]) // never fails
	p := newPeer(m, remoteOf(c), id)
	p.Dialed = address
	defer p.finish()
	if err := h.enter(p); err != nil {
		_ = c.Close()
		return err
	}
	defer h.remove(p)
	s, err := greet(ctx, c, protoControl, id)
	if err != nil {
		return fmt.Errorf("greet %s at %s: %w", m, address, err)
	}
	h.carry(ctx, p, s, func(ctx context.Context) {
		take := func(ctx context.Context, st *stream) { h.takeStream(ctx, st, m) }
		keepBulk(ctx, &p.pair, take, func(ctx context.Context) (*session, error) { return h.dialBulk(ctx, m, address, id) })
	})
	return nil
}

// dialBulk makes the bulk connection of the link to a member.
func (h *Hub) dialBulk(ctx context.Context, m sandbox.Member, address string, id linkID) (*session, error) {
	c, err := dialTLS(ctx, address, h.cfg.ClientTLS(m), protoBulk, dialTimeout)
	if err != nil {
		return nil, err
	}
	return greet(ctx, c, protoBulk, id)
}

// twice refuses a second link of a member that came about in another way than the one that is there.
func twice(old, now *peer) error {
	switch {
	case old.Dialed == "":
		return sandbox.Conflictf("%s at %s has dialed this server itself, from %s: either it waits to be dialed or this server does not list it",
			now.Member, now.Dialed, old.Remote)
	case now.Dialed == "":
		return sandbox.Conflictf("this server dials %s itself, at %s: either it waits to be dialed or this server does not list it", now.Member, old.Dialed)
	}
	return sandbox.Conflictf("%s at %s is the one that is reached at %s already: list it once, and give each machine an identity of its own",
		now.Member, now.Dialed, old.Dialed)
}
