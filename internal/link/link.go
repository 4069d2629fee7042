package link

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// How long a member waits between attempts to reach a server; each is a random part of the present bound, which doubles.
const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 5 * time.Second
	// stable is how long a link must have lived for the next attempts to be quick again.
	stable = 10 * time.Second
)

// Config is what a Link needs.
type Config struct {
	Self sandbox.Member
	// Servers returns the HOST:PORT of all servers. It is asked before each round of attempts.
	Servers func() []string
	// TLS returns the settings of a connection to the expected member; it is asked for any server.
	TLS func(expect sandbox.Member) *tls.Config
	// Handlers take the streams that servers open, their own and those that they pass on.
	Handlers Handlers
	// AwaitTLS demands and verifies the certificate of who dials, and Identify names it; for Await alone.
	AwaitTLS *tls.Config
	Identify Identify
	// OnUp and OnDown are told of the link, one after the other. They must not block. Either may be nil.
	OnUp   func(server string)
	OnDown func(server string, why error)
	Logger *slog.Logger
}

// Link is a member's way to the servers.
type Link struct {
	cfg    Config
	accept *acceptor
	client *http.Client

	mu   sync.Mutex
	pair *pair // never nil: one that is over where there is no link
	last error
	// made is the link that a server has made; nil where there is none, or where this end dials.
	made *made
}

// New returns a link that Run keeps up.
func New(cfg Config) *Link {
	l := &Link{cfg: cfg, accept: newAcceptor(cfg.Handlers), pair: &pair{over: true}, last: sandbox.Unavailablef("no server was reached yet")}
	l.client = &http.Client{Transport: newTransport(true, func(ctx context.Context) (net.Conn, error) {
		return l.Open(ctx, Head{Kind: RPC})
	})}
	return l
}

// HTTPClient returns a client whose calls, to BaseURL, are answered by the server. It outlives each connection. Errors of
// calls without a link wrap ErrUnavailable.
func (l *Link) HTTPClient() *http.Client { return l.client }

// Connected reports whether a server can be called.
func (l *Link) Connected() bool {
	s, _ := l.present().get(RPC)
	return s != nil
}

// Err says why there is no link; nil where there is one.
func (l *Link) Err() error {
	if l.Connected() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Open opens a stream to the head's node through the server, or to the server itself where the head names none. Errors:
// ErrUnavailable where there is no link; a *RemoteError where the node, or the server for it, says no. Guest streams are a Conn.
func (l *Link) Open(ctx context.Context, h Head) (net.Conn, error) {
	s, err := l.present().session(ctx, h.Kind)
	if err != nil && l.Err() != nil {
		return nil, sandbox.Unavailablef("no link to a server: %v", l.Err())
	}
	if err != nil {
		return nil, err
	}
	st, err := s.open(ctx, h)
	if err != nil {
		return nil, err
	}
	if h.Kind == Guest {
		return newFramed(st), nil
	}
	return st, nil
}

// present returns the link's present life.
func (l *Link) present() *pair {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pair
}

func (l *Link) setPresent(p *pair) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pair = p
}

// Run keeps the link up until ctx ends; then it closes it and returns when all has ended.
func (l *Link) Run(ctx context.Context) error {
	defer l.client.CloseIdleConnections()
	for wait := firstRetry; ctx.Err() == nil; {
		began := time.Now()
		for _, server := range shuffled(l.cfg.Servers()) {
			l.hold(ctx, server)
		}
		if time.Since(began) > stable {
			wait = firstRetry
		}
		if !pause(ctx, jitter(wait)) {
			break
		}
		wait = min(2*wait, lastRetry)
	}
	return nil
}

// shuffled returns the servers in random order, so that members spread over them.
func shuffled(all []string) []string {
	all = append([]string(nil), all...)
	mathrand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] }) //nolint:gosec // it need not be a secret
	return all
}

// jitter returns between half of d and d.
func jitter(d time.Duration) time.Duration { return d/2 + mathrand.N(d/2) } //nolint:gosec // it need not be a secret

// hold makes a link to one server and keeps it until it ends.
func (l *Link) hold(ctx context.Context, server string) {
	if ctx.Err() != nil {
		return
	}
	var id linkID
	_, _ = rand.Read(id[:]) // never fails
	control, err := l.dial(ctx, server, protoControl, id)
	if err != nil {
		l.down(ctx, server, err, false)
		return
	}
	p := &pair{control: control}
	l.carry(ctx, server, p, func(ctx context.Context) {
		keepBulk(ctx, p, l.takeStream, func(ctx context.Context) (*session, error) { return l.dial(ctx, server, protoBulk, id) })
	})
}

// carry serves a life of the link until its control connection ends, and runs bulk as long.
//
// Preconditions: p has a control connection.
func (l *Link) carry(ctx context.Context, server string, p *pair, bulk func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var serving sync.WaitGroup
	defer serving.Wait()
	defer p.end()
	control := p.control
	l.setPresent(p)
	l.cfg.Logger.InfoContext(ctx, "link up", slog.String("server", server))
	if l.cfg.OnUp != nil {
		l.cfg.OnUp(server)
	}
	serving.Go(func() { control.serve(ctx, l.takeStream) })
	serving.Go(func() { bulk(ctx) })
	<-control.done()
	cancel()
	p.end()
	l.setPresent(&pair{over: true})
	l.down(ctx, server, errors.New("the connection ended"), true)
}

// down notes why there is no link.
func (l *Link) down(ctx context.Context, server string, why error, was bool) {
	l.mu.Lock()
	said := l.last != nil && l.last.Error() == why.Error()
	l.last = why
	l.mu.Unlock()
	if was && l.cfg.OnDown != nil {
		l.cfg.OnDown(server, why)
	}
	if was || !said { // attempts go on every few seconds: the same reason is told once
		l.cfg.Logger.WarnContext(ctx, "no link", slog.String("server", server), slog.Any("err", why))
	}
}

// keepBulk keeps the bulk connection of a link up that this end has dialed, until ctx ends.
func keepBulk(ctx context.Context, p *pair, take func(context.Context, *stream), dial func(context.Context) (*session, error)) {
	for wait := firstRetry; ctx.Err() == nil; wait = min(2*wait, lastRetry) {
		bulk, err := dial(ctx)
		if errors.Is(err, sandbox.ErrConflict) {
			p.end() // the other end knows a newer link, or none
			return
		}
		if err == nil {
			serveBulk(ctx, p, bulk, take)
			wait = firstRetry
		}
		if !pause(ctx, jitter(wait)) {
			return
		}
	}
}

func serveBulk(ctx context.Context, p *pair, bulk *session, take func(context.Context, *stream)) {
	defer bulk.close()
	if p.setBulk(bulk) {
		defer p.lostBulk(bulk)
		bulk.serve(ctx, take)
	}
}

// dial makes one of a link's connections.
func (l *Link) dial(ctx context.Context, server, proto string, id linkID) (*session, error) {
	c, err := dialTLS(ctx, server, l.cfg.TLS(sandbox.Member{Role: sandbox.RoleServer}), proto, dialTimeout)
	if err != nil {
		return nil, err
	}
	return greet(ctx, c, proto, id)
}

// greet says which link a connection is of that this end has dialed, and begins to share it.
func greet(ctx context.Context, c *tls.Conn, proto string, id linkID) (*session, error) {
	err := hello(ctx, c, id)
	var s *session
	if err == nil {
		s, err = newSession(c, true, proto == protoBulk)
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return s, nil
}

// takeStream serves a stream that the server has opened, for itself or for another member.
func (l *Link) takeStream(ctx context.Context, st *stream) {
	head, err := takeHead(st)
	if err != nil {
		return
	}
	if head.Node != "" && string(head.Node) != l.cfg.Self.ID {
		refuse(st, sandbox.NotFoundf("a stream to node %s reached %s", head.Node, l.cfg.Self))
		return
	}
	from := head.From
	if from == (sandbox.Member{}) {
		from.Role = sandbox.RoleServer // its certificate says so: the link's configuration accepts nobody else
	}
	if err := MayOpen(from.Role, head.Kind); err != nil {
		refuse(st, err)
		return
	}
	l.accept.serve(ctx, st, from, head, asFramed)
}
