package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/control"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/gen/cluster/v1/clusterv1connect"
	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// memberRole is what a machine that joined has in common with others: its identity, and the link to a server.
type memberRole struct {
	identity *auth.Identity
	choices  choices
	link     *link.Link
	reach    *link.Reach
	members  clusterv1connect.MemberServiceClient
	log      *slog.Logger

	// Of a node that others may dial: where, and who answers there.
	direct    net.Listener
	listener  *link.Listener
	advertise string
	// awaits is where a proxy waits for servers; nil where this end dials.
	awaits net.Listener
	// refused is whom the listener lets in no more.
	refused *refused
}

func (d *daemon) buildMember(ctx context.Context) error {
	role, _ := d.roles.joined()
	id, err := joinedAs(d.cfg, role)
	if err != nil {
		return err
	}
	kept, err := readChoices(d.cfg.DataDir)
	if err != nil {
		return err
	}
	m := &memberRole{identity: id, choices: kept, log: d.log, refused: openRefused(d.cfg.DataDir, d.log)}
	id.Denied = m.refused.denied
	m.refused.onNews = m.dropGone
	handlers := d.memberHandlers(role)
	m.link = link.New(link.Config{
		Self: id.Member(), Servers: m.servers, Handlers: handlers, Logger: d.log,
		TLS: id.ClientTLS, AwaitTLS: id.ServerTLS(), Identify: auth.MemberOf, OnUp: func(string) { d.nudge() },
	})
	m.reach = link.NewReach(link.ReachConfig{Via: m.link, TLS: id.ClientTLS})
	m.members = clusterv1connect.NewMemberServiceClient(m.link.HTTPClient(), link.BaseURL)
	d.member = m
	if role == sandbox.RoleNode && d.cfg.NodeAddr != "" {
		return d.openDirect(ctx, handlers)
	}
	if d.cfg.LinkAddr != "" {
		return d.openAwaiting(ctx)
	}
	return nil
}

// openAwaiting opens the port on which a proxy waits for servers, which it cannot dial.
func (d *daemon) openAwaiting(ctx context.Context) error {
	l, err := listenTCP(ctx, "link-addr", d.cfg.LinkAddr)
	if err != nil {
		return err
	}
	d.closers = append(d.closers, func() error { _ = l.Close(); return nil }) // closed already where it served
	d.member.awaits = l
	return nil
}

// nudge has a node report at once: the server is reached again.
func (d *daemon) nudge() {
	if d.node != nil {
		d.node.agent.Nudge()
	}
}

// memberHandlers take what servers and other members open to this one. They are not called before the node is there: links
// and listeners run later.
func (d *daemon) memberHandlers(role sandbox.Role) link.Handlers {
	if role != sandbox.RoleNode {
		return link.Handlers{}
	}
	return link.Handlers{
		RPC: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { d.node.commands.ServeHTTP(w, r) }),
		Guest: func(ctx context.Context, from sandbox.Member, id sandbox.ID, port uint16) (net.Conn, error) {
			return d.node.dialFor(ctx, from, id, port)
		},
		Artifact: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { d.node.artifacts.ServeHTTP(w, r) }),
	}
}

// openDirect opens the port on which others reach the node without a server between.
func (d *daemon) openDirect(ctx context.Context, handlers link.Handlers) error {
	l, err := listenTCP(ctx, "node-addr", d.cfg.NodeAddr)
	if err != nil {
		return err
	}
	d.closers = append(d.closers, func() error { _ = l.Close(); return nil }) // closed already where it served
	m := d.member
	m.direct = l
	m.listener = link.NewListener(link.ListenerConfig{
		Node: sandbox.NodeID(m.identity.Member().ID), TLS: m.identity.ServerTLS(), Identify: auth.MemberOf, Handlers: handlers, Logger: d.log,
	})
	asked := d.cfg.NodeAddress
	if asked == "" {
		asked = m.choices.Address
	}
	m.advertise = advertised(l.Addr(), asked, m.servers())
	return nil
}

// dropGone ends the connections that members which were removed have to this node.
func (m *memberRole) dropGone() {
	if m.listener != nil {
		m.listener.Drop(m.refused.gone)
	}
}

// advertised is what others are told to dial: the asked-for address, with the listener's port where it names none, else the
// machine's address on its way to the server.
func advertised(at net.Addr, asked string, servers []string) string {
	if asked == "" {
		peer := ""
		if len(servers) > 0 {
			peer = servers[0]
		}
		return reachable(at, peer)
	}
	if _, _, err := net.SplitHostPort(asked); err == nil {
		return asked
	}
	_, port, err := net.SplitHostPort(at.String())
	if err != nil {
		return asked
	}
	return net.JoinHostPort(asked, port)
}

// servers are the addresses to try: where the join found one, and those that the servers name.
func (m *memberRole) servers() []string {
	all := m.identity.Servers()
	if m.choices.Server != "" && !slices.Contains(all, m.choices.Server) {
		all = append([]string{m.choices.Server}, all...)
	}
	return all
}

// start keeps the link up and the certificate fresh, and takes what others open directly.
func (m *memberRole) start(ctx context.Context, loops *errgroup.Group) {
	loops.Go(func() error {
		if m.awaits != nil {
			return m.link.Await(ctx, m.awaits)
		}
		return m.link.Run(ctx)
	})
	loops.Go(func() error { m.renew(ctx); return nil })
	if m.direct != nil {
		loops.Go(func() error { return m.listener.Serve(ctx, m.direct) })
	}
}

// What a member says of itself.
func (m *memberRole) membership() control.Membership {
	return control.Membership{
		Member: m.identity.Member(), Name: m.choices.Name, ClusterID: m.identity.ClusterID(), Servers: m.servers(),
		Connected: m.link.Connected(), ExpiresAt: m.identity.Expires(),
	}
}

// renewTimeout bounds one attempt to renew, and renewPause is the longest time between two.
const (
	renewTimeout = 15 * time.Second
	renewPause   = time.Minute
)

// renew gets a new certificate when that is due, until ctx ends. Where that fails it is tried again, several times before the
// present one ends.
func (m *memberRole) renew(ctx context.Context) {
	for sleepUntil(ctx, m.identity.RenewAt(time.Now(), rand.Float64())) { //nolint:gosec // spreads load
		err := m.renewOnce(ctx)
		if err != nil && ctx.Err() == nil && !time.Now().Before(m.identity.Expires()) {
			err = m.comeBack(ctx)
		}
		if err == nil {
			m.log.InfoContext(ctx, "certificate renewed", slog.Time("until", m.identity.Expires()))
			continue
		}
		m.tellRenewal(ctx, err)
		pause := renewPause
		if left := time.Until(m.identity.Expires()); left > 0 {
			pause = min(renewPause, max(left/10, time.Second))
		}
		if !sleepUntil(ctx, time.Now().Add(pause)) {
			return
		}
	}
}

func (m *memberRole) tellRenewal(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, sandbox.ErrDenied), errors.Is(err, sandbox.ErrNotFound):
		m.log.ErrorContext(ctx, "the server refuses to renew the certificate: this machine is no member any more; `cloister leave --force` and `cloister join` with a new token make it one",
			slog.Any("err", err))
	case time.Now().After(m.identity.Expires()):
		m.log.WarnContext(ctx, "the certificate has ended and no server could be asked for a new one yet, trying again", slog.Any("err", err))
	default:
		m.log.WarnContext(ctx, "certificate not renewed, trying again", slog.Time("until", m.identity.Expires()), slog.Any("err", err))
	}
}

func (m *memberRole) renewOnce(ctx context.Context) error {
	request, err := m.identity.NewRequest()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	resp, err := m.members.Renew(ctx, &clusterv1.RenewRequest{CertificateRequest: request.DER})
	if answer, ok := errors.AsType[*connect.Error](err); ok {
		err = kindOf(answer)
	}
	if err != nil {
		return fmt.Errorf("renew certificate: %w", err)
	}
	return m.identity.Save(request, auth.Grant{CertPEM: resp.GetCertificate(), AuthorityPEM: resp.GetAuthority(), Servers: resp.GetServers()})
}

// comeBack gets a certificate in place of one that has ended, with which no link can be made: on the port by which machines join,
// from one server after the other.
func (m *memberRole) comeBack(ctx context.Context) error {
	cert, request, err := m.identity.ReadmitRequest()
	if err != nil {
		return err
	}
	err = sandbox.Unavailablef("no server is known")
	for _, server := range m.servers() {
		if err = m.comeBackBy(ctx, server, cert, request); err == nil || errors.Is(err, sandbox.ErrDenied) {
			return err
		}
	}
	return err
}

func (m *memberRole) comeBackBy(ctx context.Context, server string, cert []byte, request auth.Request) error {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	settings := m.identity.ClientTLS(sandbox.Member{Role: sandbox.RoleServer})
	settings.Certificates = nil // no handshake takes it
	transport := &http.Transport{TLSClientConfig: settings, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := clusterv1connect.NewJoinServiceClient(&http.Client{Transport: transport}, "https://"+server)
	resp, err := client.Readmit(ctx, &clusterv1.ReadmitRequest{Certificate: cert, CertificateRequest: request.DER})
	if err != nil {
		return fmt.Errorf("come back by way of %s: %w", server, joinError(err))
	}
	return m.identity.Save(request, auth.Grant{CertPEM: resp.GetCertificate(), AuthorityPEM: resp.GetAuthority(), Servers: resp.GetServers()})
}

// DialPeer connects to what another node serves: directly, or by way of the server.
func (m *memberRole) DialPeer(ctx context.Context, node sandbox.NodeID, address string) (net.Conn, error) {
	return m.reach.Dial(ctx, link.Endpoint{Node: node, Address: address}, link.Head{Kind: link.Artifact})
}
