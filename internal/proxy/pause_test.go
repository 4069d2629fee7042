package proxy

import (
	"context"
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestPauseBeforeAnswer checks what a request is told that a pause cuts and that cannot be sent again.
func TestPauseBeforeAnswer(t *testing.T) {
	for _, state := range []sandbox.State{sandbox.StatePausing, sandbox.StatePaused, sandbox.StateResuming} {
		t.Run(string(state), func(t *testing.T) {
			r := newRig(t, nil)
			entered := make(chan struct{}, 1)
			r.listen(t, testID, 8000, silent(entered))
			out := send(client(t), r.request(t, http.MethodPost, "/", nil, toGuest("8000")...))
			<-entered
			r.end(testID, state, "")
			want := wireFailure{string(testID), "The sandbox was paused while the request was open", 0, http.StatusBadGateway}
			if diff := cmp.Diff(want, failureOf(t, (<-out).body)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestPauseOpen has a sandbox paused that traffic may resume while a request is open that could be sent again. Its end's pause
// does not count against the request; somebody's does, where the request is no new one, and one that comes later undoes it.
func TestPauseOpen(t *testing.T) {
	for reason, want := range map[string]int{"": http.StatusBadGateway, "timeout": http.StatusTeapot} {
		t.Run("reason "+reason, func(t *testing.T) {
			r := newRig(t, nil)
			r.proxy.forwarder.young = 0
			entered := make(chan struct{}, 1)
			r.listen(t, testID, 8000, silent(entered))
			r.onWake = func(context.Context, sandbox.ID) (sandbox.Route, error) {
				r.listen(t, testID, 8000, teapot())
				now := sandbox.Route{ID: testID, State: sandbox.StateRunning, Generation: 9}
				r.set(testID, now)
				return now, nil
			}
			out := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
			<-entered
			r.end(testID, sandbox.StatePausing, reason)
			paused := wakeable()
			paused.Generation, paused.Reason = 8, reason
			r.set(testID, paused)
			if got := <-out; got.status != want {
				t.Errorf("the open request: %+v, want %d", got, want)
			}
			if res, _ := r.get(t, "/", toGuest("8000")...); res.StatusCode != http.StatusTeapot || r.wakes.Load() != 1 {
				t.Errorf("the next one: %d after %d wakes, want the guest's answer after 1", res.StatusCode, r.wakes.Load())
			}
		})
	}
}

// TestPauseBeforeDial has the node pause a sandbox before the router knows.
func TestPauseBeforeDial(t *testing.T) {
	r := newRig(t, nil)
	r.dialErr = sandbox.Conflictf("sandbox is paused")
	r.onDial = func() { r.set(testID, sandbox.Route{State: sandbox.StatePaused, Generation: 2}) }
	_, body := r.get(t, "/", toGuest("8000")...)
	want := wireFailure{string(testID), "The sandbox is paused", 0, http.StatusBadGateway}
	if diff := cmp.Diff(want, failureOf(t, body)); diff != "" {
		t.Error(diff)
	}
}

// TestResumeElsewhere checks that a sandbox is reached at its new address once it is back, over new connections.
func TestResumeElsewhere(t *testing.T) {
	r := newRig(t, nil)
	old := r.listen(t, testID, 8000, seen("before"))
	c := client(t)
	do(t, c, r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
	r.set(testID, sandbox.Route{State: sandbox.StatePaused, Generation: 3})
	if res, _ := do(t, c, r.request(t, http.MethodGet, "/", nil, toGuest("8000")...)); res.StatusCode != http.StatusBadGateway {
		t.Errorf("paused: %d", res.StatusCode)
	}
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	r.set(testID, sandbox.Route{State: sandbox.StateRunning, Generation: 5})
	// The old server still answers on the connection that was kept to it: nobody may use that.
	defer old.Close()
	for _, method := range []string{http.MethodPost, http.MethodGet} {
		if res, _ := do(t, c, r.request(t, method, "/", nil, toGuest("8000")...)); res.StatusCode != http.StatusTeapot {
			t.Errorf("%s after the resume: %d", method, res.StatusCode)
		}
	}
	if n := r.dials.Load(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}
