package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Endpoint is a node as others reach it.
type Endpoint struct {
	Node sandbox.NodeID
	// Address is the HOST:PORT of its Listener; empty where it has none.
	Address string
}

// Opener opens streams to members: a Hub or a Link. The head's Node says to whom.
type Opener interface {
	Open(ctx context.Context, h Head) (net.Conn, error)
}

// How long a direct dial may take, and how long after a failed one streams go through a server at once.
const (
	directTimeout = time.Second
	directPause   = 30 * time.Second
)

// ReachConfig is what a Reach needs.
type ReachConfig struct {
	// TLS returns the settings of a connection to the expected member and nobody else.
	TLS func(expect sandbox.Member) *tls.Config
	// Via is the other way: through a server, which passes streams on. Nil where there is none.
	Via Opener
}

// Reach opens streams to nodes: directly where that works, else through a server.
type Reach struct {
	cfg ReachConfig

	mu     sync.Mutex
	failed map[string]time.Time // by address: the last direct dial that failed
}

// NewReach returns a Reach.
func NewReach(cfg ReachConfig) *Reach {
	return &Reach{cfg: cfg, failed: make(map[string]time.Time)}
}

// Dial opens a stream to the node. The head's Node is set to the endpoint's. Errors: a *RemoteError where the node, or the
// server that should have passed the stream on, says no; ErrUnavailable where neither way leads to it. Guest streams are a
// Conn, except to a node of this process, which gives what it dialed.
func (r *Reach) Dial(ctx context.Context, to Endpoint, h Head) (net.Conn, error) {
	h.Node = to.Node
	if to.Address == "" || r.pausing(to.Address, time.Now()) {
		return r.around(ctx, h)
	}
	c, err := r.direct(ctx, to, h)
	var answered *RemoteError
	if err == nil || errors.As(err, &answered) || ctx.Err() != nil {
		return c, err
	}
	r.note(to.Address, time.Now())
	c, other := r.around(ctx, h)
	if other != nil && !errors.As(other, &answered) {
		return nil, fmt.Errorf("%w; and directly: %w", other, err)
	}
	return c, other
}

// around opens a stream through a server.
func (r *Reach) around(ctx context.Context, h Head) (net.Conn, error) {
	if r.cfg.Via == nil {
		return nil, sandbox.Unavailablef("node %s cannot be dialed, and there is no way through a server", h.Node)
	}
	return r.cfg.Via.Open(ctx, h)
}

// ArtifactClient returns a client whose requests go to the node's artifacts, at BaseURL. The caller closes its idle
// connections when it is done.
func (r *Reach) ArtifactClient(to Endpoint) *http.Client {
	return &http.Client{Transport: newTransport(false, func(ctx context.Context) (net.Conn, error) {
		return r.Dial(ctx, to, Head{Kind: Artifact})
	})}
}

func (r *Reach) direct(ctx context.Context, to Endpoint, h Head) (net.Conn, error) {
	text, err := h.append(nil)
	if err != nil {
		return nil, err
	}
	conf := r.cfg.TLS(sandbox.Member{Role: sandbox.RoleNode, ID: string(to.Node)})
	c, err := dialTLS(ctx, to.Address, conf, protoDirect, directTimeout)
	if err != nil {
		return nil, fmt.Errorf("dial node %s at %s: %w", to.Node, to.Address, err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialGuestTimeout+headTimeout)
	defer cancel()
	if err := begin(ctx, c, text); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("open %s stream on node %s: %w", h.Kind, to.Node, err)
	}
	return direct{c}, nil
}

// pausing reports whether the address failed lately.
func (r *Reach) pausing(address string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, ok := r.failed[address]
	if ok && now.Sub(at) > directPause {
		delete(r.failed, address)
		return false
	}
	return ok
}

// maxFailed bounds the addresses that are remembered; a cluster has fewer nodes.
const maxFailed = 16384

func (r *Reach) note(address string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failed) >= maxFailed {
		clear(r.failed)
	}
	r.failed[address] = now
}
