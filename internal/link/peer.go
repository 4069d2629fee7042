package link

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// How dead connections are found: control within 8 s; bulk, where probes wait behind data, within 25 s or with control.
const (
	controlEvery, controlAnswer = 3 * time.Second, 5 * time.Second
	bulkEvery, bulkAnswer       = 10 * time.Second, 15 * time.Second
)

// peer is one life of a member's link.
type peer struct {
	Peer

	id linkID
	// ended is closed when the link is over and OnDown has been told; finish closes it.
	ended  chan struct{}
	finish func()
	pair
}

func newPeer(m sandbox.Member, remote netip.AddrPort, id linkID) *peer {
	p := &peer{Peer: Peer{Member: m, Remote: remote, Since: time.Now()}, id: id, ended: make(chan struct{})}
	p.finish = sync.OnceFunc(func() { close(p.ended) })
	return p
}

// takeControl makes the connection the member's link, in place of the one that it has, and serves it until it ends.
func (h *Hub) takeControl(ctx context.Context, c *tls.Conn, m sandbox.Member, id linkID) error {
	p := newPeer(m, remoteOf(c), id)
	defer p.finish()
	if err := h.enter(p); err != nil {
		refuse(c, err)
		return err
	}
	defer h.remove(p)
	if err := accept(c); err != nil { // only now: the member's bulk connection finds its link
		return err
	}
	s, err := newSession(c, false, false)
	if err != nil {
		return err
	}
	h.carry(ctx, p, s, nil)
	return nil
}

// carry serves a member's link until its control connection ends, and runs bulk as long, which may be nil.
func (h *Hub) carry(ctx context.Context, p *peer, s *session, bulk func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	var streams sync.WaitGroup
	defer streams.Wait()
	defer cancel()
	defer s.close()
	if !p.setControl(s) {
		return // replaced already
	}
	h.cfg.Logger.InfoContext(ctx, "link up", slog.String("member", p.String()), slog.String("remote", p.Remote.String()))
	tell(h.cfg.OnUp, p.Peer)
	streams.Go(func() { s.serve(ctx, func(ctx context.Context, st *stream) { h.takeStream(ctx, st, p.Member) }) })
	if bulk != nil {
		streams.Go(func() { bulk(ctx) })
	}
	<-s.done()
	h.remove(p)
	p.end()
	h.cfg.Logger.InfoContext(ctx, "link down", slog.String("member", p.String()), slog.String("remote", p.Remote.String()))
	tell(h.cfg.OnDown, p.Peer)
	p.finish() // a link that takes this one's place need not wait for streams that take their time to end
}

func tell(f func(Peer), p Peer) {
	if f != nil {
		f(p)
	}
}

// enter makes p the member's link and waits until the one before is over. Errors: ErrConflict where that one is there and
// was made in another way: the member, or a list of whom to dial, has it twice.
func (h *Hub) enter(p *peer) error {
	h.mu.Lock()
	old := h.peers[p.Member]
	if old != nil && old.Dialed != p.Dialed && old.live() {
		h.mu.Unlock()
		return twice(old, p)
	}
	h.peers[p.Member] = p
	h.mu.Unlock()
	if old != nil {
		old.end()
		<-old.ended
	}
	return nil
}

func (h *Hub) remove(p *peer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.peers[p.Member] == p {
		delete(h.peers, p.Member)
	}
}

// takeBulk adds the connection to the member's link, and serves it until it ends.
func (h *Hub) takeBulk(ctx context.Context, c *tls.Conn, m sandbox.Member, id linkID) error {
	h.mu.Lock()
	p := h.peers[m]
	h.mu.Unlock()
	if p == nil || p.id != id {
		err := sandbox.Conflictf("the link of %s that this bulk connection belongs to is over", m)
		refuse(c, err)
		return err
	}
	if err := accept(c); err != nil {
		return err
	}
	s, err := newSession(c, false, true)
	if err != nil {
		return err
	}
	serveBulk(ctx, &p.pair, s, func(ctx context.Context, st *stream) { h.takeStream(ctx, st, m) })
	return nil
}

// takeStream serves a stream that a member has opened, or passes it on.
func (h *Hub) takeStream(ctx context.Context, st *stream, m sandbox.Member) {
	head, err := takeHead(st)
	if err != nil {
		return
	}
	if head.From != (sandbox.Member{}) {
		refuse(st, sandbox.Deniedf("%s may not open streams for others", m))
		return
	}
	if head.Node == "" {
		h.accept.serve(ctx, st, m, head, asFramed)
		return
	}
	if err := MayOpen(m.Role, head.Kind); err != nil {
		refuse(st, err)
		return
	}
	h.mu.Lock()
	local := h.locals[head.Node]
	h.mu.Unlock()
	if local != nil {
		local.serve(ctx, st, m, head, asFramed)
		return
	}
	h.relay(ctx, st, m, head)
}

// asFramed makes a guest stream of a shared connection's stream.
func asFramed(c net.Conn) net.Conn {
	return newFramed(c.(*stream)) //nolint:errcheck,forcetypeassert // sessions give nothing else
}

// relay passes a member's stream on to the node that it is for.
func (h *Hub) relay(ctx context.Context, st *stream, from sandbox.Member, head Head) {
	to := sandbox.Member{Role: sandbox.RoleNode, ID: string(head.Node)}
	head.From = from
	openCtx, cancel := context.WithTimeout(ctx, dialGuestTimeout+headTimeout)
	onward, err := h.openRaw(openCtx, to, head)
	cancel()
	if err != nil {
		refuse(st, err)
		return
	}
	if err := accept(st); err != nil {
		_ = onward.Close()
		return
	}
	defer context.AfterFunc(ctx, func() { _ = st.Close(); _ = onward.Close() })()
	splice(st, onward)
}

func remoteOf(c net.Conn) netip.AddrPort {
	tcp, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	at := tcp.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}
