package link

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Peer is a member that has a link.
type Peer struct {
	sandbox.Member

	// Remote is where it dialed from, or was dialed.
	Remote netip.AddrPort
	// Dialed is the address that Dial was given; empty where the member has dialed.
	Dialed string
	Since  time.Time
}

// HubConfig is what a Hub needs.
type HubConfig struct {
	// Self is the server.
	Self sandbox.Member
	// TLS is for members' links; it demands and verifies a certificate.
	TLS *tls.Config
	// ClientTLS returns the settings of a connection to the expected member, for Dial; nil where nobody is dialed.
	ClientTLS func(expect sandbox.Member) *tls.Config
	// JoinTLS is for everybody else, who gets Join and nothing more; nil where nobody can join here.
	JoinTLS *tls.Config
	Join    http.Handler
	// Identify names a member by its verified certificate.
	Identify Identify
	// RPC answers members' calls.
	RPC http.Handler
	// OnUp and OnDown are told of links, one after the other for one member; a link that replaces another is told as down and
	// up. They must not block. Either may be nil.
	OnUp, OnDown func(Peer)
	Logger       *slog.Logger
}

// Hub is the server's end of all links.
type Hub struct {
	cfg    HubConfig
	accept *acceptor

	mu      sync.Mutex
	peers   map[sandbox.Member]*peer
	locals  map[sandbox.NodeID]*acceptor
	clients map[sandbox.Member]*http.Client
}

// NewHub returns a hub that Serve runs.
func NewHub(cfg HubConfig) *Hub {
	return &Hub{
		cfg: cfg, accept: newAcceptor(Handlers{RPC: cfg.RPC}),
		peers: make(map[sandbox.Member]*peer), locals: make(map[sandbox.NodeID]*acceptor), clients: make(map[sandbox.Member]*http.Client),
	}
}

// AddLocal adds the node of the server's own process: others' streams to it end at its handlers.
func (h *Hub) AddLocal(id sandbox.NodeID, handlers Handlers) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.locals[id] = newAcceptor(handlers)
}

// Peers returns the members that have links, in no order.
func (h *Hub) Peers() []Peer {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]Peer, 0, len(h.peers))
	for _, p := range h.peers {
		all = append(all, p.Peer)
	}
	return all
}

// Connected reports whether the member can be called.
func (h *Hub) Connected(m sandbox.Member) bool {
	h.mu.Lock()
	p := h.peers[m]
	h.mu.Unlock()
	if p == nil {
		return false
	}
	s, _ := p.get(RPC)
	return s != nil
}

// Drop ends the member's link, if it has one. Whether it may come back is Identify's to say.
func (h *Hub) Drop(m sandbox.Member) {
	h.mu.Lock()
	p, client := h.peers[m], h.clients[m]
	delete(h.clients, m)
	h.mu.Unlock()
	if client != nil {
		client.CloseIdleConnections()
	}
	if p != nil {
		p.end()
	}
}

// HTTPClient returns a client whose calls, to BaseURL, are answered by the member. It outlives the member's links: each call
// goes over the present one. Errors of calls without a link wrap ErrUnavailable.
func (h *Hub) HTTPClient(m sandbox.Member) *http.Client {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.clients[m]
	if c == nil {
		c = &http.Client{Transport: newTransport(true, func(ctx context.Context) (net.Conn, error) {
			return h.open(ctx, m, Head{Kind: RPC})
		})}
		h.clients[m] = c
	}
	return c
}

// NodeClient returns HTTPClient of a node.
func (h *Hub) NodeClient(id sandbox.NodeID) *http.Client {
	return h.HTTPClient(sandbox.Member{Role: sandbox.RoleNode, ID: string(id)})
}

// Open opens a stream to the head's node. Errors: ErrUnavailable where it has no link; a *RemoteError where it says no. Guest
// streams are a Conn, except those of the process's own node, which are what that dialed.
func (h *Hub) Open(ctx context.Context, head Head) (net.Conn, error) {
	h.mu.Lock()
	local := h.locals[head.Node]
	h.mu.Unlock()
	if local != nil {
		return h.openLocal(ctx, local, head)
	}
	return h.open(ctx, sandbox.Member{Role: sandbox.RoleNode, ID: string(head.Node)}, head)
}

// openLocal opens a stream to the node of this process.
func (h *Hub) openLocal(ctx context.Context, local *acceptor, head Head) (net.Conn, error) {
	if head.Kind != Guest || local.handlers.Guest == nil {
		return nil, sandbox.Unsupportedf("%s stream to node %s of this process: call it directly", head.Kind, head.Node)
	}
	return local.handlers.Guest(ctx, h.cfg.Self, head.Sandbox, head.Port)
}

func (h *Hub) open(ctx context.Context, m sandbox.Member, head Head) (net.Conn, error) {
	st, err := h.openRaw(ctx, m, head)
	if err != nil {
		return nil, err
	}
	if head.Kind == Guest {
		return newFramed(st), nil
	}
	return st, nil
}

// openRaw opens a stream on the member's link.
func (h *Hub) openRaw(ctx context.Context, m sandbox.Member, head Head) (*stream, error) {
	h.mu.Lock()
	p := h.peers[m]
	h.mu.Unlock()
	if p == nil {
		return nil, sandbox.Unavailablef("%s has no link to this server", m)
	}
	s, err := p.session(ctx, head.Kind)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m, err)
	}
	st, err := s.open(ctx, head)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m, err)
	}
	return st, nil
}

// Serve takes links, and those who join, from ln until ctx ends; it closes everything then, and returns when all has ended.
func (h *Hub) Serve(ctx context.Context, ln net.Listener) error {
	joins := newJoins(h.cfg.Join)
	ctx, cancel := context.WithCancel(ctx)
	var serving sync.WaitGroup
	serving.Go(func() { joins.serve(ctx) })
	defer serving.Wait()
	defer cancel()
	return serveConns(ctx, ln, h.cfg.Logger, func(ctx context.Context, raw net.Conn) error { return h.take(ctx, raw, joins) })
}

// tlsFor chooses what is demanded of a connection by what it is for.
func (h *Hub) tlsFor(hi *tls.ClientHelloInfo) (*tls.Config, error) {
	for _, proto := range hi.SupportedProtos {
		if proto == protoControl || proto == protoBulk {
			return settings(hi, h.cfg.TLS, tls.RequireAndVerifyClientCert, protoControl, protoBulk)
		}
	}
	if h.cfg.JoinTLS == nil || h.cfg.Join == nil {
		return nil, sandbox.Unsupportedf("only members' links are taken here")
	}
	return settings(hi, h.cfg.JoinTLS, tls.NoClientCert, "h2", "http/1.1")
}

func (h *Hub) take(ctx context.Context, raw net.Conn, joins *joins) error {
	c := tls.Server(raw, &tls.Config{GetConfigForClient: h.tlsFor, MinVersion: tls.VersionTLS13})
	if err := handshake(ctx, c); err != nil {
		return err
	}
	state := c.ConnectionState()
	if state.NegotiatedProtocol != protoControl && state.NegotiatedProtocol != protoBulk {
		return joins.take(ctx, c)
	}
	id, err := takeHello(c)
	if err != nil {
		return err
	}
	m, err := h.cfg.Identify(state)
	if err != nil {
		refuse(c, err)
		return err
	}
	if state.NegotiatedProtocol == protoControl {
		return h.takeControl(ctx, c, m, id)
	}
	return h.takeBulk(ctx, c, m, id)
}
