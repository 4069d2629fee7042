package hosts_test

import (
	"context"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// How long, in seconds, a sandbox of TestFleetLeaders runs unused: shorter than an office stays that of a leader who died, so that the node
// alone has to see to it, and one made while there is a leader.
const (
	idleSeconds  = 8
	shortSeconds = 3
)

// TestFleetLeaders ends the server, which decides about the ends of sandboxes, twice, kills one of three proxies and cuts another off, while
// some sandboxes are in use and others are not. What is in use goes on, by whichever proxy; the others are paused once each, not
// early, and resumed once by however many ask.
func TestFleetLeaders(t *testing.T) {
	t.Parallel()
	c := harness.NewCluster(t, harness.Shape{Nodes: 1, Proxies: 3, Programs: []string{workloadDir}})
	whole, killed, cut := c.Proxies[0], c.Proxies[1], c.Proxies[2]
	l := leaders{Cluster: c}
	streamed, streamedByCut, asked := l.idle(t, idleSeconds), l.idle(t, idleSeconds), l.idle(t, idleSeconds)
	for _, id := range []string{streamed, streamedByCut, asked} {
		work(t, c, whole, id)
	}
	open := []*stream{streamFrom(t, whole, streamed), streamFrom(t, cut, streamedByCut)}
	asking := l.askNowAndThen(t, asked, whole, cut)
	unused := []string{l.idle(t, idleSeconds), l.idle(t, idleSeconds), l.idle(t, idleSeconds)}
	ends, err := c.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: idleSeconds})
	if err != nil {
		t.Fatal(err)
	}

	l.nextLeader(t)
	killed.Kill()
	c.Lab.Partition(cut, c.Server)
	l.nextLeader(t)
	c.Lab.Heal()
	killed.Again()
	for _, p := range c.Proxies {
		c.Wait(p.Name+" to be followed", func(ctx context.Context) bool { return proxyOf(ctx, c, p).State == "ready" })
	}
	unused = append(unused, l.idle(t, shortSeconds))

	for _, id := range unused {
		c.Wait("what nobody uses to be paused", func(ctx context.Context) bool { return state(ctx, c.Server, id) == "paused" })
		if got := l.once(t, id, "paused"); got.Before(l.due[id]) {
			t.Errorf("sandbox %s was paused at %s, due at %s: early", id, got, l.due[id])
		}
	}
	c.Wait("what has a fixed end to be gone", func(ctx context.Context) bool { return state(ctx, c.Server, ends.ID) != "running" })
	if got := l.once(t, ends.ID, "timed_out"); got.Before(ends.EndAt) {
		t.Errorf("sandbox %s ended at %s, due at %s: early", ends.ID, got, ends.EndAt)
	}
	for _, id := range []string{streamed, streamedByCut, asked} {
		if n := l.count(t, id, "paused"); n != 0 || state(t.Context(), c.Server, id) != "running" {
			t.Errorf("sandbox %s, which is in use, was paused %d times and is %s", id, n, state(t.Context(), c.Server, id))
		}
	}
	for _, s := range open {
		s.check(t)
	}
	if err := asking(); err != nil {
		t.Error(err)
	}
	for _, id := range unused {
		l.wake(t, id)
		l.once(t, id, "resumed")
	}
}

// leaders is a cluster whose server ends again and again.
type leaders struct {
	*harness.Cluster
	// due is the first moment at which each sandbox may be paused.
	due map[string]time.Time
}

// idle makes a sandbox that is paused when it was not used for a while.
func (l *leaders) idle(t *testing.T, seconds int64) string {
	t.Helper()
	s, err := l.Client().CreateSandbox(t.Context(), client.CreateSandbox{
		TimeoutSeconds: seconds, AutoPause: true, AutoResume: true, IdleTimeout: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	if l.due == nil {
		l.due = make(map[string]time.Time)
	}
	l.due[s.ID] = s.StartedAt.Add(time.Duration(seconds) * time.Second)
	return s.ID
}

// nextLeader kills the server and waits until it decides again.
func (l *leaders) nextLeader(t *testing.T) {
	t.Helper()
	l.Server.Signal(syscall.SIGKILL)
	l.Server.Again()
	l.Wait("a leader", func(ctx context.Context) bool { return metric(ctx, l.Server, "cloister_lifecycle_leading") == 1 })
}

// askNowAndThen uses a sandbox through several proxies, each in its turn, and returns what ends that and says how it went.
func (l *leaders) askNowAndThen(t *testing.T, id string, proxies ...*harness.Machine) func() error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	var failed atomic.Pointer[error]
	done.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			if _, err := ask(ctx, proxies[i%len(proxies)], id, "/ok"); err != nil && ctx.Err() == nil {
				failed.CompareAndSwap(nil, &err)
			}
			pause(ctx, time.Second)
		}
	})
	end := func() error {
		cancel()
		done.Wait()
		if err := failed.Load(); err != nil {
			return *err
		}
		return nil
	}
	t.Cleanup(func() { _ = end() })
	return end
}

// wake has a request come by way of every proxy at once.
func (l *leaders) wake(t *testing.T, id string) {
	t.Helper()
	var asking sync.WaitGroup
	for _, p := range l.Proxies {
		asking.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
			defer cancel()
			began := time.Now()
			if err := askAgent(ctx, p, id); err != nil {
				t.Errorf("a first request to %s by way of %s: %v after %s", id, p.Name, err, time.Since(began))
			}
		})
	}
	asking.Wait()
}

func (l *leaders) events(t *testing.T, id, kind string) []client.Event {
	t.Helper()
	all, err := l.Client().Events(t.Context(), client.ListEvents{SandboxID: id, Type: kind})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func (l *leaders) count(t *testing.T, id, kind string) int {
	t.Helper()
	return len(l.events(t, id, kind))
}

// once returns when something happened to a sandbox, which it did once.
func (l *leaders) once(t *testing.T, id, kind string) time.Time {
	t.Helper()
	l.Wait(kind+" to be in the history", func(context.Context) bool { return l.count(t, id, kind) > 0 })
	all := l.events(t, id, kind)
	if len(all) != 1 {
		t.Errorf("sandbox %s was %s %d times; want once", id, kind, len(all))
	}
	return all[0].Time
}
