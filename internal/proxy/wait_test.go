package proxy

import (
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// wakeable is a paused sandbox that traffic may resume.
func wakeable() sandbox.Route {
	return sandbox.Route{State: sandbox.StatePaused, Generation: 2, AutoResume: true}
}

// awaitWaiting returns once n requests wait.
func (r *rig) awaitWaiting(t *testing.T, n int) {
	t.Helper()
	for testutil.ToFloat64(r.proxy.metrics.waiting) != float64(n) {
		if t.Context().Err() != nil {
			t.Fatal("the requests do not wait")
		}
		<-time.After(time.Millisecond)
	}
}

// TestWait has requests wait until a sandbox is what it is on its way to.
func TestWait(t *testing.T) {
	for _, state := range []sandbox.State{sandbox.StateCreating, sandbox.StatePausing, sandbox.StateResuming, sandbox.StateMigrating} {
		t.Run(string(state), func(t *testing.T) {
			r := newRig(t, nil)
			r.listen(t, testID, 8000, seen("here"))
			r.set(testID, sandbox.Route{State: state, Generation: 2})
			out := send(client(t), r.request(t, http.MethodPost, "/", strings.NewReader("x"), toGuest("8000")...))
			r.awaitWaiting(t, 1)
			r.set(testID, sandbox.Route{State: sandbox.StateRunning, Generation: 3})
			if got := <-out; got.status != http.StatusOK {
				t.Errorf("%+v", got)
			}
		})
	}
}

// TestWaitEnds checks what a waiting request is told when the sandbox does not come to run.
func TestWaitEnds(t *testing.T) {
	tests := []struct {
		name string
		then sandbox.Route
		want wireFailure
	}{
		{"paused for good", sandbox.Route{State: sandbox.StatePaused, Generation: 3}, wireFailure{string(testID), "The sandbox is paused", 0, 502}},
		{"killed", sandbox.Route{State: sandbox.StateDeleted, Generation: 3}, wireFailure{string(testID), "The sandbox was not found", 0, 502}},
		{"lost", sandbox.Route{State: sandbox.StateLost, Reason: "node b does not answer"}, wireFailure{string(testID), "The sandbox was lost: node b does not answer", 0, 502}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, nil)
			r.set(testID, sandbox.Route{State: sandbox.StatePausing, Generation: 2})
			out := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
			r.awaitWaiting(t, 1)
			r.set(testID, tt.then)
			r.proxy.Changed(sandbox.Route{ID: testID, State: tt.then.State}) // as the follower of routes does
			if diff := cmp.Diff(tt.want, failureOf(t, (<-out).body)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestWaitShutdown checks that a request that waits does not hold up the proxy's end.
func TestWaitShutdown(t *testing.T) {
	r := newRig(t, nil)
	r.set(testID, sandbox.Route{State: sandbox.StatePausing, Generation: 2})
	out := send(client(t), r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
	r.awaitWaiting(t, 1)
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if got := <-out; got.status != http.StatusServiceUnavailable {
		t.Errorf("%+v", got)
	}
}

// TestWakeOnce has 1,000 requests come to one paused sandbox at once.
func TestWakeOnce(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, seen("awake"))
	r.set(testID, wakeable())
	all := make(chan struct{})
	r.onWake = func(context.Context, sandbox.ID) (sandbox.Route, error) {
		<-all
		now := sandbox.Route{State: sandbox.StateRunning, Generation: 3}
		r.set(testID, now)
		now.ID = testID
		return now, nil
	}
	const n = 1000
	var wait sync.WaitGroup
	var ok atomic.Int64
	c := client(t)
	for range n {
		req := r.request(t, http.MethodGet, "/", nil, toGuest("8000")...)
		wait.Go(func() {
			res, err := c.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				ok.Add(1)
			}
		})
	}
	r.awaitWaiting(t, n)
	if open := r.proxy.Activities(time.Time{}); len(open) != 1 || open[0].Open != n {
		t.Errorf("activity while they wait: %v", open)
	}
	close(all)
	wait.Wait()
	if ok.Load() != n || r.wakes.Load() != 1 {
		t.Errorf("%d of %d succeeded with %d wakes, want all with 1", ok.Load(), n, r.wakes.Load())
	}
}

// TestWakeFails checks what a request is told when a paused sandbox cannot be resumed.
func TestWakeFails(t *testing.T) {
	tests := []struct {
		name string
		err  error
		want wireFailure
	}{
		{"not by traffic", sandbox.Conflictf("no"), wireFailure{string(testID), "The sandbox is paused", 0, 502}},
		{"killed", sandbox.NotFoundf("no"), wireFailure{string(testID), "The sandbox was not found", 0, 502}},
		{"no room", sandbox.Exhaustedf("no"), wireFailure{string(testID), "The sandbox is paused, and there is no room to resume it. Try again in a moment.", 0, 503}},
		{"no server", sandbox.Unavailablef("no"), wireFailure{string(testID), "The sandbox cannot be reached now. Try again in a moment.", 0, 503}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, nil)
			r.set(testID, wakeable())
			r.onWake = func(context.Context, sandbox.ID) (sandbox.Route, error) { return sandbox.Route{}, tt.err }
			res, body := r.get(t, "/", toGuest("8000")...)
			if diff := cmp.Diff(tt.want, failureOf(t, body)); diff != "" || res.StatusCode != tt.want.Code {
				t.Errorf("%d\n%s", res.StatusCode, diff)
			}
			if retry := res.Header.Get("Retry-After"); (retry != "") != (res.StatusCode == http.StatusServiceUnavailable) {
				t.Errorf("Retry-After %q", retry)
			}
		})
	}
}

// TestWaitCap checks that waiting ends, over all the states that a sandbox passes through.
func TestWaitCap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.set(testID, sandbox.Route{State: sandbox.StatePausing, Generation: 2})
		p, err := New(Config{Router: w, Dialer: w})
		if err != nil {
			t.Fatal(err)
		}
		w.onWake = func(ctx context.Context, _ sandbox.ID) (sandbox.Route, error) {
			<-ctx.Done()
			return sandbox.Route{}, ctx.Err()
		}
		time.AfterFunc(20*time.Second, func() { w.set(testID, wakeable()) })
		begun := time.Now()
		route, err := w.Route(t.Context(), testID)
		if err != nil {
			t.Fatal(err)
		}
		_, fail := p.forwarder.waits.serving(t.Context(), destination{target: target{id: testID}, route: route})
		if fail == nil || fail.status != http.StatusServiceUnavailable || time.Since(begun) != defaultWaitTimeout {
			t.Errorf("%+v after %s", fail, time.Since(begun))
		}
		synctest.Wait()
		if len(p.forwarder.waits.waking) != 0 || len(w.routes) != 1 {
			t.Errorf("left behind: %v", p.forwarder.waits.waking)
		}
	})
}

// TestWakeLeft checks that a wake goes on while anybody waits for it, and ends with the last.
func TestWakeLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.set(testID, wakeable())
		p, err := New(Config{Router: w, Dialer: w})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		w.onWake = func(ctx context.Context, _ sandbox.ID) (sandbox.Route, error) {
			<-ctx.Done()
			close(ended)
			return sandbox.Route{}, ctx.Err()
		}
		var wait sync.WaitGroup
		var leave []context.CancelFunc
		for range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			leave = append(leave, cancel)
			wait.Go(func() { _, _ = p.forwarder.waits.wake(ctx, testID) })
		}
		synctest.Wait()
		for i, cancel := range leave {
			select {
			case <-ended:
				t.Fatalf("the wake has ended when %d of 3 had left", i)
			default:
			}
			cancel()
			synctest.Wait()
		}
		wait.Wait()
		<-ended
	})
}
