package link

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Handlers are what a member does with streams that others open to it. Whatever is nil is refused as ErrUnsupported.
type Handlers struct {
	// RPC answers calls; MemberFrom tells who calls.
	RPC http.Handler
	// Guest connects to a port of a sandbox of this node. Its errors reach the opener with their kinds.
	Guest func(ctx context.Context, from sandbox.Member, id sandbox.ID, port uint16) (net.Conn, error)
	// Artifact answers requests for images and checkpoints; MemberFrom tells who asks.
	Artifact http.Handler
}

// dialGuestTimeout bounds how long a node may take to connect to a guest.
const dialGuestTimeout = 10 * time.Second

// acceptor takes streams as a member's handlers say.
type acceptor struct {
	handlers  Handlers
	rpc, file *httpEnd
}

func newAcceptor(h Handlers) *acceptor {
	return &acceptor{handlers: h, rpc: newHTTPEnd(h.RPC, true), file: newHTTPEnd(h.Artifact, false)}
}

// serve answers a stream whose head was read, and carries it on until it ends. asGuest turns it into a guest stream.
func (a *acceptor) serve(ctx context.Context, c net.Conn, from sandbox.Member, h Head, asGuest func(net.Conn) net.Conn) {
	switch {
	case h.Kind == Guest && a.handlers.Guest != nil:
		a.serveGuest(ctx, c, from, h, asGuest)
	case h.Kind == RPC && a.rpc != nil:
		a.rpc.serve(ctx, c, from)
	case h.Kind == Artifact && a.file != nil:
		a.file.serve(ctx, c, from)
	default:
		refuse(c, sandbox.Unsupportedf("%s streams are not taken here", h.Kind))
	}
}

func (a *acceptor) serveGuest(ctx context.Context, c net.Conn, from sandbox.Member, h Head, asGuest func(net.Conn) net.Conn) {
	dialCtx, cancel := context.WithTimeout(ctx, dialGuestTimeout)
	guest, err := a.handlers.Guest(dialCtx, from, h.Sandbox, h.Port)
	cancel()
	if err != nil {
		refuse(c, err)
		return
	}
	if err := accept(c); err != nil {
		abort(guest)
		return
	}
	outside := asGuest(c)
	defer context.AfterFunc(ctx, func() { abort(outside); abort(guest) })()
	Pipe(outside, guest)
}

// accept answers a head with yes.
func accept(c net.Conn) error {
	_, err := c.Write(answer(nil))
	return err
}

// refuse answers a head with no, and closes the stream.
func refuse(c net.Conn, why error) {
	_ = c.SetWriteDeadline(time.Now().Add(headTimeout))
	_, _ = c.Write(answer(why)) // who has gone meanwhile needs no answer
	_ = c.Close()
}

// takeHead reads a stream's head in time. A nonsensical one is refused.
func takeHead(c net.Conn) (Head, error) {
	_ = c.SetReadDeadline(time.Now().Add(headTimeout))
	h, err := readHead(c)
	if err != nil {
		refuse(c, err)
		return Head{}, fmt.Errorf("take stream: %w", err)
	}
	return h, c.SetReadDeadline(time.Time{})
}
