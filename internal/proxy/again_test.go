package proxy

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestMoveBeforeAnswer has a sandbox move while requests to it are open: what is harmless to repeat is answered at the
// new place, everything else gets an error.
func TestMoveBeforeAnswer(t *testing.T) {
	tests := []struct {
		method, body string
		want         int
	}{
		{http.MethodGet, "", http.StatusTeapot},
		{http.MethodDelete, "", http.StatusTeapot},
		{http.MethodPost, "", http.StatusBadGateway},
		{http.MethodPost, "body", http.StatusBadGateway},
	}
	for _, tt := range tests {
		t.Run(tt.method+" "+tt.body, func(t *testing.T) {
			r := newRig(t, nil)
			entered := make(chan struct{}, 1)
			r.listen(t, testID, 8000, silent(entered))
			var body io.Reader
			if tt.body != "" {
				body = strings.NewReader(tt.body)
			}
			out := send(client(t), r.request(t, tt.method, "/", body, toGuest("8000")...))
			<-entered
			r.end(testID, sandbox.StateMigrating, "")
			r.listen(t, testID, 8000, teapot())
			r.set(testID, sandbox.Route{Node: "bbbbbb", State: sandbox.StateRunning, Generation: 7})
			if got := <-out; got.status != tt.want {
				t.Errorf("%+v, want %d", got, tt.want)
			}
		})
	}
}

func teapot() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		_, _ = io.Copy(io.Discard, q.Body)
		w.WriteHeader(http.StatusTeapot)
	})
}

// TestNodeRefuses has a node refuse connections before the router knows that the sandbox is on its way: whatever the
// request, nothing of it was sent, and it waits.
func TestNodeRefuses(t *testing.T) {
	tests := []struct {
		name string
		err  error
		then []sandbox.Route
	}{
		{"paused and resumed", sandbox.Conflictf("sandbox is paused"), []sandbox.Route{{State: sandbox.StatePausing, Generation: 2}, {State: sandbox.StateRunning, Generation: 4}}},
		{"moved", sandbox.NotFoundf("sandbox is not here"), []sandbox.Route{{Node: "bbbbbb", State: sandbox.StateRunning, Generation: 3}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, nil)
			r.listen(t, testID, 8000, teapot())
			r.dialErr = tt.err
			r.onDial = func() {
				r.onDial, r.dialErr = nil, nil
				for _, route := range tt.then {
					r.set(testID, route)
				}
			}
			res, _ := do(t, client(t), r.request(t, http.MethodPost, "/", strings.NewReader("body"), toGuest("8000")...))
			if res.StatusCode != http.StatusTeapot {
				t.Errorf("%d, want the answer of the new place", res.StatusCode)
			}
		})
	}
}

// TestNodeRefusesOnce checks that a refusal of which no news comes is not believed for ever.
func TestNodeRefusesOnce(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, teapot())
	r.dialErr = sandbox.Conflictf("sandbox is pausing")
	r.onDial = func() { r.onDial, r.dialErr = nil, nil }
	if res, _ := r.get(t, "/", toGuest("8000")...); res.StatusCode != http.StatusTeapot {
		t.Errorf("%d", res.StatusCode)
	}
}

// TestNodeUnreachable tells a node that cannot be reached from a port that is closed.
func TestNodeUnreachable(t *testing.T) {
	r := newRig(t, nil)
	r.dialErr = sandbox.Unavailablef("node b is not connected")
	res, body := r.get(t, "/", toGuest("8000")...)
	want := wireFailure{string(testID), "The sandbox cannot be reached now. Try again in a moment.", 0, http.StatusServiceUnavailable}
	if diff := cmp.Diff(want, failureOf(t, body)); diff != "" || res.StatusCode != want.Code {
		t.Errorf("%d\n%s", res.StatusCode, diff)
	}
}

// TestChangedCloses checks that connections which nobody uses are closed when a sandbox is to move, and that those in use
// are closed with their request.
func TestChangedCloses(t *testing.T) {
	r := newRig(t, nil)
	release := make(chan struct{})
	states := make(chan http.ConnState, 100)
	srv := r.listenWith(t, testID, 8000, http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/slow" {
			<-release
		}
	}), func(_ net.Conn, s http.ConnState) { states <- s })
	defer srv.Close()
	c := client(t)
	out := send(c, r.request(t, http.MethodGet, "/slow", nil, toGuest("8000")...))
	for s := range states {
		if s == http.StateActive {
			break
		}
	}
	do(t, c, r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
	r.proxy.Changed(sandbox.Route{ID: testID, State: sandbox.StateMigrating, Generation: 2})
	closed := func() {
		t.Helper()
		for s := range states {
			if s == http.StateClosed {
				return
			}
		}
	}
	closed()
	close(release)
	if got := <-out; got.status != http.StatusOK {
		t.Errorf("the open request: %+v", got)
	}
	closed()
}

// TestLostCuts checks that an open request is told at once that its sandbox, or its node, is lost.
func TestLostCuts(t *testing.T) {
	cuts := map[string]func(p *Proxy){
		"sandbox": func(p *Proxy) { p.Changed(sandbox.Route{ID: testID, State: sandbox.StateLost}) },
		"node":    func(p *Proxy) { p.NodeDown("aaaaaa") },
	}
	for name, cut := range cuts {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			r.set(testID, sandbox.Route{Node: "aaaaaa", State: sandbox.StateRunning, Generation: 1})
			entered := make(chan struct{}, 1)
			r.listen(t, testID, 8000, silent(entered))
			out := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
			<-entered
			r.proxy.NodeDown("bbbbbb") // not its own
			r.set(testID, sandbox.Route{Node: "aaaaaa", State: sandbox.StateLost, Reason: "its node does not answer"})
			cut(r.proxy)
			want := wireFailure{string(testID), "The sandbox ended while the request was open: its node does not answer", 0, http.StatusBadGateway}
			if diff := cmp.Diff(want, failureOf(t, (<-out).body)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestActivities checks what is reported as used.
func TestActivities(t *testing.T) {
	r := newRig(t, nil)
	entered := make(chan struct{}, 1)
	r.listen(t, testID, 8000, silent(entered))
	if got := r.proxy.Activities(time.Time{}); len(got) != 0 {
		t.Errorf("before the first request: %v", got)
	}
	begun := time.Now()
	out := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
	<-entered
	got := r.proxy.Activities(time.Time{})
	if len(got) != 1 || got[0].ID != testID || got[0].Open != 1 || got[0].Last.Before(begun) {
		t.Errorf("with an open request: %v", got)
	}
	open := time.Now()
	r.end(testID, sandbox.StateFailed, "")
	<-out
	r.proxy.Close()
	if got := r.proxy.Activities(open); len(got) != 0 {
		t.Errorf("after the proxy's end: %v", got)
	}
}

// TestActivityKept checks that a sandbox's last use is remembered until it was acknowledged.
func TestActivityKept(t *testing.T) {
	g := &guests{byID: map[sandbox.ID]*guest{}, maxRequests: 1}
	dest := destination{target: target{id: testID}}
	req := &attendance{}
	now := time.Now()
	g.lastSweep = now
	if _, _, fail := g.enter(dest, req, now); fail != nil {
		t.Fatal(fail.err)
	}
	g.leave(testID, req)
	g.activities(time.Time{})
	late := now.Add(time.Hour)
	g.sweepLocked(late)
	if len(g.activities(time.Time{})) != 1 {
		t.Error("forgotten before it was acknowledged")
	}
	if len(g.activities(late)) != 0 {
		t.Error("told again after it was acknowledged")
	}
	g.sweepLocked(late.Add(time.Hour))
	if len(g.byID) != 0 {
		t.Error("not forgotten after it was acknowledged")
	}
}
