package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Bounds of a shared connection.
const (
	// maxStreams is how many streams the other end may have open on it.
	maxStreams = 4096
	// controlWindow and bulkWindow are how much of a stream may be under way unread, in bytes.
	controlWindow = 256 << 10
	bulkWindow    = 1 << 20
	// openTimeout bounds how long the other end may take to take a stream.
	openTimeout = 20 * time.Second
	// closeTimeout bounds how long it may take to close a stream that this end has closed.
	closeTimeout = 30 * time.Second
	// headTimeout bounds how long it may take to say what a stream is for.
	headTimeout = 5 * time.Second
)

// session is one shared connection.
type session struct {
	yamux *yamux.Session
	conn  *tls.Conn
	// slots bounds the streams that the other end has open.
	slots chan struct{}
}

// newSession begins to share a connection, for control or for bulk. The caller closes it.
func newSession(conn *tls.Conn, dialed, bulk bool) (*session, error) {
	conf := yamux.DefaultConfig()
	conf.MaxStreamWindowSize, conf.KeepAliveInterval, conf.ConnectionWriteTimeout = controlWindow, controlEvery, controlAnswer
	if bulk {
		conf.MaxStreamWindowSize, conf.KeepAliveInterval, conf.ConnectionWriteTimeout = bulkWindow, bulkEvery, bulkAnswer
	}
	conf.StreamOpenTimeout, conf.StreamCloseTimeout = openTimeout, closeTimeout
	conf.LogOutput = io.Discard // what happens is told by the errors
	begin := yamux.Server
	if dialed {
		begin = yamux.Client
	}
	y, err := begin(&joiner{Conn: conn}, conf)
	if err != nil {
		return nil, fmt.Errorf("share connection: %w", err)
	}
	return &session{yamux: y, conn: conn, slots: make(chan struct{}, maxStreams)}, nil
}

func (s *session) close() {
	abort(s.conn.NetConn()) // a peer that does not read must not delay the end
	_ = s.yamux.Close()
}

// done is closed when the connection has ended.
func (s *session) done() <-chan struct{} { return s.yamux.CloseChan() }

// open opens a stream and waits for its answer.
func (s *session) open(ctx context.Context, h Head) (*stream, error) {
	text, err := h.append(nil)
	if err != nil {
		return nil, err
	}
	y, err := s.yamux.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("open %s stream: %w: %w", h.Kind, sandbox.ErrUnavailable, err)
	}
	st := &stream{Stream: y}
	if err := begin(ctx, st, text); err != nil {
		_ = st.Close()
		return nil, fmt.Errorf("open %s stream: %w", h.Kind, err)
	}
	return st, nil
}

// begin sends a head and reads the answer.
func begin(ctx context.Context, c net.Conn, head []byte) error {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	_, err := c.Write(head)
	if err != nil {
		err = fmt.Errorf("send head: %w: %w", sandbox.ErrUnavailable, err)
	} else {
		err = readAnswer(c)
	}
	if !stop() {
		return errors.Join(ctx.Err(), err) // the stream has a deadline in the past: it is of no use
	}
	return err
}

// serve takes the other end's streams until the connection ends or ctx does, and returns when all of them have ended.
func (s *session) serve(ctx context.Context, take func(context.Context, *stream)) {
	ctx, cancel := context.WithCancel(ctx)
	var taken sync.WaitGroup
	defer taken.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, s.close)()
	for {
		y, err := s.yamux.AcceptStream()
		if err != nil {
			return
		}
		st := &stream{Stream: y}
		select {
		case s.slots <- struct{}{}:
		default:
			_, _ = st.Write(answer(sandbox.Exhaustedf("%d streams are open on this connection: no more are taken", maxStreams)))
			_ = st.Close()
			continue
		}
		taken.Go(func() {
			defer func() { <-s.slots }()
			defer func() { _ = st.Close() }()
			take(ctx, st)
		})
	}
}
