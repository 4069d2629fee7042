package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// clusterRole is a server's side of everybody who joined: its authority, and the port that they come in by. `cloister server`
// opens the port at its start; `cloister up` once somebody may join or has joined, so that a machine that never grows has
// no open port.
type clusterRole struct {
	authority *auth.Authority
	identity  *auth.Identity
	hub       *link.Hub
	links     *links
	log       *slog.Logger
	// address is where the port is, as the settings say; advertised is what others are told, from the settings or found out.
	address, advertise string
	life               time.Duration
	// proxies are the addresses of those that this server dials.
	proxies []string

	mu       sync.Mutex
	listener net.Listener
	// opened hands the listener to the loop that serves it.
	opened chan net.Listener
}

// serverIDLen is how long the id of a member is.
const serverIDLen = 6

// newCluster makes the server's side of members, as far as it needs no control: that one needs it first.
func (d *daemon) newCluster(ctx context.Context, st *store.Store) (*clusterRole, error) {
	authority, err := openAuthority(ctx, st)
	if err != nil {
		return nil, fmt.Errorf("open the cluster's authority: %w", err)
	}
	self := sandbox.Member{Role: sandbox.RoleServer, ID: authority.ClusterID()[:serverIDLen]}
	identity, err := authority.Issue(self, d.cfg.CertificateLife, nil)
	if err != nil {
		return nil, fmt.Errorf("make the server's certificate: %w", err)
	}
	identity.Denied = st.Denied
	proxies, err := d.cfg.ProxyAddresses()
	if err != nil {
		return nil, err
	}
	c := &clusterRole{
		proxies:   proxies,
		authority: authority, identity: identity, log: d.log, address: d.cfg.ClusterAddr, advertise: d.cfg.ClusterAdvertise,
		life: d.cfg.CertificateLife, opened: make(chan net.Listener, 1),
	}
	d.closers = append(d.closers, c.close)
	return c, nil
}

// authoritySecret is the secret that the cluster's authority is kept in: its certificates and its key.
const authoritySecret = "cluster-authority"

// keptAuthority is what that secret holds.
type keptAuthority struct {
	CertPEM []byte `json:"certificates"`
	KeyPEM  []byte `json:"key"`
}

// openAuthority returns the cluster's authority, which is made once.
func openAuthority(ctx context.Context, st *store.Store) (*auth.Authority, error) {
	id, err := st.ClusterID(ctx)
	if err != nil {
		return nil, err
	}
	text, err := st.MadeSecret(ctx, authoritySecret, func() ([]byte, error) {
		fresh, err := auth.NewAuthority(id)
		if err != nil {
			return nil, err
		}
		key, err := fresh.KeyPEM()
		if err != nil {
			return nil, err
		}
		return json.Marshal(keptAuthority{CertPEM: fresh.CertPEM(), KeyPEM: key})
	})
	if err != nil {
		return nil, err
	}
	var kept keptAuthority
	if err := json.Unmarshal(text, &kept); err != nil {
		return nil, fmt.Errorf("read what is kept of it: %w", err)
	}
	return auth.LoadAuthority(kept.CertPEM, kept.KeyPEM)
}

// Open opens the port, if it is not open. Errors: ErrConflict where it is taken.
func (c *clusterRole) Open(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.listener != nil {
		return nil
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", c.address)
	if err != nil {
		return sandbox.Conflictf("open the cluster's port %s: %v; --cluster-addr chooses another, `cloister doctor` says who holds it", c.address, err)
	}
	c.listener = l
	c.opened <- l
	c.log.InfoContext(ctx, "cluster port open", slog.String("address", l.Addr().String()))
	return nil
}

// Drop ends a member's links.
func (c *clusterRole) Drop(m sandbox.Member) { c.hub.Drop(m) }

// close closes the port where nobody served it.
func (c *clusterRole) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.listener != nil {
		_ = c.listener.Close() // closed already where it was served
	}
	return nil
}

// Servers returns the HOST:PORT by which other machines reach the servers; nil while the port is not open and none is set.
func (c *clusterRole) Servers() []string {
	if c.advertise != "" {
		return []string{c.advertise}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.listener == nil {
		return nil
	}
	return []string{reachable(c.listener.Addr(), "")}
}

// somewhere is an address whose route is the default one; nothing is sent there (RFC 5737).
const somewhere = "192.0.2.1:9"

// reachable completes the address of a listener on every address with that of this machine on its way to peer, or by the
// default route. A machine without a route has loopback only.
func reachable(at net.Addr, peer string) string {
	host, port, err := net.SplitHostPort(at.String())
	if err != nil {
		return at.String()
	}
	if ip := net.ParseIP(host); ip != nil && !ip.IsUnspecified() {
		return at.String()
	}
	if peer == "" {
		peer = somewhere
	}
	return net.JoinHostPort(ownAddress(peer), port)
}

// ownAddress is this machine's address on its way to peer.
func ownAddress(peer string) string {
	c, err := net.Dial("udp", peer) //nolint:noctx // asks the kernel for a route and sends nothing
	if err != nil {
		return "127.0.0.1"
	}
	defer func() { _ = c.Close() }()
	host, _, err := net.SplitHostPort(c.LocalAddr().String())
	if err != nil {
		return "127.0.0.1"
	}
	return host
}

// start serves the port once it is open, and keeps the server's certificate fresh.
func (c *clusterRole) start(ctx context.Context, loops *errgroup.Group) {
	loops.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case l := <-c.opened:
			return c.hub.Serve(ctx, l)
		}
	})
	for _, address := range c.proxies {
		loops.Go(func() error { return c.hub.Dial(ctx, sandbox.RoleProxy, address) })
	}
	loops.Go(func() error { c.renew(ctx); return nil })
}

// renew gives the server a new certificate when that is due, until ctx ends.
func (c *clusterRole) renew(ctx context.Context) {
	for sleepUntil(ctx, c.identity.RenewAt(time.Now(), rand.Float64())) { //nolint:gosec // spreads load
		if err := c.authority.Reissue(c.identity, c.life, c.Servers()); err != nil {
			c.log.ErrorContext(ctx, "the server's certificate was not renewed; members refuse it after its end", slog.Any("err", err))
			if !sleepUntil(ctx, time.Now().Add(time.Minute)) {
				return
			}
		}
	}
}

// sleepUntil waits; false where ctx ended first.
func sleepUntil(ctx context.Context, at time.Time) bool {
	timer := time.NewTimer(time.Until(at))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// fromMember lets a call pass whose opener is a member of one of the roles, and says who it is.
func fromMember(h http.Handler, roles ...sandbox.Role) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m, ok := link.MemberFrom(r.Context())
		if !ok || !slices.Contains(roles, m.Role) {
			http.Error(w, "not for a "+string(m.Role), http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r.WithContext(control.WithMember(r.Context(), m)))
	})
}
