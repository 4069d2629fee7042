package guest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// echo serves one connection on addr: it greets before it is spoken to, and repeats what it is told until its end.
func echo(t *testing.T, addr string) string {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("listen on %s: %v", addr, err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = io.WriteString(c, "hello ")
		_, _ = io.Copy(c, c)
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		<-served
	})
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// loopback asks the agent for a port and returns the connection and the status of the answer.
func (a *agent) loopback(t *testing.T, port, headers string) (*net.TCPConn, *bufio.Reader, int) {
	t.Helper()
	addr, err := net.ResolveTCPAddr("tcp", strings.TrimPrefix(a.url, "http://"))
	must(t, err)
	c, err := net.DialTCP("tcp", nil, addr)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	_, err = fmt.Fprintf(c, "GET /loopback?port=%s HTTP/1.1\r\nHost: sandbox\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n%s\r\n", port, headers)
	must(t, err)
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, nil)
	must(t, err)
	must(t, res.Body.Close())
	return c, r, res.StatusCode
}

func TestLoopback(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		t.Run(host, func(t *testing.T) {
			a := newAgent(t)
			c, r, status := a.loopback(t, echo(t, host+":0"), "")
			if status != http.StatusSwitchingProtocols {
				t.Fatalf("status %d, want 101", status)
			}
			sent := strings.Repeat("0123456789", 50_000)
			go func() {
				_, _ = io.WriteString(c, sent)
				_ = c.CloseWrite()
			}()
			got, err := io.ReadAll(r)
			must(t, err)
			if want := "hello " + sent; string(got) != want {
				t.Errorf("%d bytes came back, want %d and the same", len(got), len(want))
			}
		})
	}
}

func TestLoopbackRefuses(t *testing.T) {
	a := newAgent(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	_, closed, _ := net.SplitHostPort(ln.Addr().String())
	must(t, ln.Close())
	for port, want := range map[string]int{closed: 502, "": 400, "0": 400, "65536": 400, "x": 400, "-1": 400} {
		if _, _, status := a.loopback(t, port, ""); status != want {
			t.Errorf("port %q: status %d, want %d", port, status, want)
		}
	}
	a.initialize(t, `{"accessToken":"secret"}`)
	if _, _, status := a.loopback(t, closed, ""); status != http.StatusUnauthorized {
		t.Errorf("without the token: status %d, want 401", status)
	}
	if _, _, status := a.loopback(t, closed, "X-Access-Token: secret\r\n"); status != http.StatusBadGateway {
		t.Errorf("with the token: status %d, want 502", status)
	}
}

// TestLoopbackEndsWithTheAgent leaves a connection open while the agent ends; newAgent waits for that.
func TestLoopbackEndsWithTheAgent(t *testing.T) {
	a := newAgent(t)
	_, r, status := a.loopback(t, echo(t, "127.0.0.1:0"), "")
	if status != http.StatusSwitchingProtocols {
		t.Fatalf("status %d, want 101", status)
	}
	if _, err := io.ReadFull(r, make([]byte, len("hello "))); err != nil {
		t.Error(err)
	}
}
