package exchange_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"

	"github.com/cloister-dev/cloister/internal/api/exchange"
)

// oneConn is a listener with a single connection.
type oneConn struct{ conns chan net.Conn }

func (l oneConn) Accept() (net.Conn, error) {
	c, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (oneConn) Close() error   { return nil }
func (oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// TestSlowBody sends the beginning of a body and no more: it is given up after a time, and told so.
func TestSlowBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, conn := net.Pipe()
		l := oneConn{make(chan net.Conn, 1)}
		l.conns <- conn
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var v struct{}
			if err := exchange.Read(w, r, &v); err != nil {
				exchange.Fail(w, err)
			}
		})}
		go func() { _ = srv.Serve(l) }()
		if _, err := io.WriteString(client, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusRequestTimeout {
			t.Errorf("status %d, want 408", resp.StatusCode)
		}
		_ = client.Close()
		close(l.conns) // ends Serve, which Close waits for
		_ = srv.Close()
	})
}
