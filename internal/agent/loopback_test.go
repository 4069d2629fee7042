package agent

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// agentSays makes the agents inside answer requests for ports of the loopback with a text; everything else goes on.
func agentSays(m *machine, text string) (asked chan *http.Request) {
	asked = make(chan *http.Request, 1)
	m.loopback = func(c net.Conn, r *http.Request) {
		asked <- r
		_, _ = io.WriteString(c, text)
		_, _ = io.Copy(c, c)
	}
	return asked
}

func TestDialGuestOnLoopback(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		asked := agentSays(m, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello")
		c, err := n.DialGuest(t.Context(), id, 1)
		if err != nil {
			t.Fatal(err)
		}
		r := <-asked
		if got := r.URL.String(); got != "/loopback?port=1" {
			t.Errorf("the agent is asked for %s", got)
		}
		if got, want := r.Header.Get("X-Access-Token"), m.inits[id].AccessToken; got != want {
			t.Errorf("with token %q, want %q", got, want)
		}
		go func() { _, _ = io.WriteString(c, " again") }()
		got := make([]byte, len("hello again"))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello again" {
			t.Errorf("read %q, %v", got, err)
		}
		if err := n.kill(id); err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(c).ReadByte(); err == nil {
			t.Error("the connection went on after the kill")
		}
	})
}

// TestDialGuestOnLoopbackRefused checks that a guest that cannot, or that misbehaves, leaves the first refusal standing.
func TestDialGuestOnLoopbackRefused(t *testing.T) {
	for name, text := range map[string]string{
		"nobody listens": "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
		"an old agent":   "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
		"endless":        "HTTP/1.1 101 " + strings.Repeat("x", 2*maxLoopbackHead),
		"silent":         "",
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *machine) {
				t := m.t
				n := m.boot()
				id := n.create()
				agentSays(m, text)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				_, err := n.DialGuest(ctx, id, 1)
				if !errors.Is(err, sandbox.ErrUnavailable) || !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("got %v, want the refusal", err)
				}
				if err := n.kill(id); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

func FuzzReadHead(f *testing.F) {
	f.Add("HTTP/1.1 101 X\r\n\r\nrest")
	f.Add("\r\n\r\n")
	f.Add(strings.Repeat("\r", maxLoopbackHead+1))
	f.Fuzz(func(t *testing.T, text string) {
		r := strings.NewReader(text)
		head, err := readHead(r)
		rest, _ := io.ReadAll(r)
		if err == nil && (head+string(rest) != text || len(head) > maxLoopbackHead || strings.Count(head, "\r\n\r\n") != 1) {
			t.Errorf("%q was read as head %q and rest %q", text, head, rest)
		}
	})
}
