package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	// loopbackDialTimeout bounds connecting to a server in the same sandbox.
	loopbackDialTimeout = 5 * time.Second
	// loopbackBuffer is what each direction of a connection holds, also while nothing passes.
	loopbackBuffer = 32 << 10
)

// getLoopback turns the connection into one to a port of the sandbox's loopback, on which many servers listen alone: a
// node that is refused at the sandbox's address tries it here. The proxy lets nobody else reach this route.
func (s *Server) getLoopback(w http.ResponseWriter, r *http.Request) {
	target, err := dialLoopback(r)
	if err != nil {
		writeError(w, err)
		return
	}
	defer func() { _ = target.Close() }() // at the latest; what counts has been closed in halves
	near, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeError(w, httpErrorf(http.StatusUpgradeRequired, "a connection cannot be made out of this request: %v", err))
		return
	}
	defer func() { _ = near.Close() }()
	defer context.AfterFunc(r.Context(), func() {
		_ = near.Close()
		_ = target.Close()
	})()
	_ = near.SetDeadline(time.Time{}) // of reading the request's head
	if _, err := io.WriteString(near, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"); err != nil {
		return
	}
	// Only what has been read ahead: reading on through the server's reader would end the request with the node's side.
	ahead := io.LimitReader(buffered.Reader, int64(buffered.Reader.Buffered()))
	join(target, near, io.MultiReader(ahead, near))
}

// dialLoopback connects to the port that r names: over IPv4, or else over IPv6.
func dialLoopback(r *http.Request) (net.Conn, error) {
	text := r.URL.Query().Get("port")
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return nil, httpErrorf(http.StatusBadRequest, "port %.20q: want 1 to 65535", text)
	}
	ctx, cancel := context.WithTimeout(r.Context(), loopbackDialTimeout)
	defer cancel()
	var refused []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.FormatUint(port, 10)))
		if err == nil {
			return c, nil
		}
		refused = append(refused, err)
	}
	return nil, httpErrorf(http.StatusBadGateway, "%v", fmt.Errorf("port %d: %w", port, errors.Join(refused...)))
}

// join moves bytes between the server and the node until both have closed their side; sent is what the node sends.
func join(server, node net.Conn, sent io.Reader) {
	var both sync.WaitGroup
	both.Go(func() { pass(server, sent) })
	both.Go(func() { pass(node, server) })
	both.Wait()
}

// pass moves bytes one way, then says that there are no more.
//
// The wrappers keep splice(2) out of it, whose pipes cost a sandbox more than a buffer.
func pass(to net.Conn, from io.Reader) {
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, loopbackBuffer))
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		_ = half.CloseWrite() // fails only where the other direction has found the connection broken
		return
	}
	_ = to.Close()
}
