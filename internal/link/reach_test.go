package link_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/link"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestReachGoesRound cannot dial the node and goes through the server instead.
func TestReachGoesRound(t *testing.T) {
	r := newRig(t)
	r.link(nodeA, tcpGuest(t, echo))
	p, _ := r.link(proxyP, link.Handlers{})
	reach := r.reach(proxyP, p)
	ln := listen(t, "127.0.0.1:0")
	dead := ln.Addr().String()
	_ = ln.Close()
	for _, address := range []string{dead, dead, ""} {
		c, err := reach.Dial(t.Context(), link.Endpoint{Node: "nodeaa", Address: address}, link.GuestHead("", box, 80))
		if err != nil {
			t.Fatalf("through the server, with address %q: %v", address, err)
		}
		_ = c.Close()
	}
	_, err := reach.Dial(t.Context(), link.Endpoint{Node: "nodebb", Address: dead}, link.GuestHead("", box, 80))
	if !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("a node that nobody reaches: %v; want ErrUnavailable", err)
	}
}

// TestReachTakesNo does not ask again the other way when the node itself has answered.
func TestReachTakesNo(t *testing.T) {
	r := newRig(t)
	r.link(nodeA, tcpGuest(t, echo))
	p, _ := r.link(proxyP, link.Handlers{})
	to := r.direct(nodeA, link.Handlers{})
	_, err := r.reach(proxyP, p).Dial(t.Context(), to, link.GuestHead("", box, 80))
	if !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("%v; want the node's own answer", err)
	}
}

// TestReachRefusesAnother finds another member at the node's address.
func TestReachRefusesAnother(t *testing.T) {
	r := newRig(t)
	to := r.direct(nodeB, tcpGuest(t, echo))
	to.Node = "nodeaa"
	_, err := r.reach(proxyP, r.hub).Dial(t.Context(), to, link.GuestHead("", box, 80))
	if !errors.Is(err, sandbox.ErrUnavailable) || !strings.Contains(err.Error(), "nodebb") {
		t.Errorf("another node at the address: %v; want a TLS error that names it", err)
	}
}

// TestArtifacts gets the same from a node directly and through the server.
func TestArtifacts(t *testing.T) {
	r := newRig(t)
	h := link.Handlers{Artifact: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		m, _ := link.MemberFrom(req.Context())
		_, _ = io.WriteString(w, req.URL.Path+" for "+m.String())
	})}
	r.link(nodeA, h)
	b, _ := r.link(nodeB, link.Handlers{})
	for _, to := range []link.Endpoint{{Node: "nodeaa"}, r.direct(nodeA, h)} {
		client := r.reach(nodeB, b).ArtifactClient(to)
		for range 3 {
			if got := fetch(t, client, "/some/image"); got != "/some/image for node/nodebb" {
				t.Errorf("over %+v: %q", to, got)
			}
		}
		client.CloseIdleConnections()
	}
}

func fetch(t *testing.T, c *http.Client, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, link.BaseURL+path, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// TestReachWithoutServer has only the direct way.
func TestReachWithoutServer(t *testing.T) {
	r := newRig(t)
	reach := r.reach(proxyP, nil)
	_, err := reach.Dial(t.Context(), link.Endpoint{Node: "nodeaa"}, link.GuestHead("", box, 80))
	if !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("%v; want ErrUnavailable", err)
	}
}
