package link

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// What a TLS connection is for, in the words of ALPN. The number is the version of what is spoken on it.
const (
	protoControl = "cloister-link/1"
	protoBulk    = "cloister-bulk/1"
	protoDirect  = "cloister-node/1"
)

const (
	dialTimeout      = 5 * time.Second
	handshakeTimeout = 5 * time.Second
	// ackTimeout bounds how long what was sent may stay without the other machine's acknowledgement.
	ackTimeout = 10 * time.Second
)

func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}
}

// tune makes the kernel notice when the other machine is gone.
func tune(c net.Conn) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	_ = tcp.SetKeepAliveConfig(keepAlive())
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(ackTimeout.Milliseconds()))
	})
}

// dialTLS connects and shakes hands for one protocol.
func dialTLS(ctx context.Context, address string, conf *tls.Config, proto string, timeout time.Duration) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", sandbox.ErrUnavailable, err)
	}
	tune(raw)
	conf = conf.Clone()
	conf.NextProtos = []string{proto}
	c := tls.Client(raw, conf)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("tls: %w: %w", sandbox.ErrUnavailable, err)
	}
	if got := c.ConnectionState().NegotiatedProtocol; got != proto {
		_ = c.Close()
		return nil, fmt.Errorf("%s speaks %.40q, not %q: %w", address, got, proto, sandbox.ErrUnavailable)
	}
	return c, nil
}

// settings returns those of one handshake: base's, or what base answers for it, with who must show a certificate and what is
// spoken.
func settings(hi *tls.ClientHelloInfo, base *tls.Config, auth tls.ClientAuthType, protos ...string) (*tls.Config, error) {
	if base.GetConfigForClient != nil {
		own, err := base.GetConfigForClient(hi)
		if err != nil {
			return nil, err
		}
		if own != nil {
			base = own
		}
	}
	conf := base.Clone()
	conf.ClientAuth, conf.NextProtos = auth, protos
	return conf, nil
}

// linkID names one life of a link; its bulk connection says which it belongs to.
type linkID [16]byte

// hello says the link's name to the server and waits until it has taken the connection.
func hello(ctx context.Context, c net.Conn, id linkID) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	return begin(ctx, c, id[:])
}

func takeHello(c net.Conn) (linkID, error) {
	var id linkID
	_ = c.SetReadDeadline(time.Now().Add(headTimeout))
	if _, err := io.ReadFull(c, id[:]); err != nil {
		return id, fmt.Errorf("read hello: %w", err)
	}
	return id, c.SetReadDeadline(time.Time{})
}
