package hosts_test

import (
	"context"
	"maps"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// storm is a load that knows which sandboxes it was promised.
type storm struct {
	d  *harness.Daemon
	mu sync.Mutex
	// alive holds the sandboxes whose creation was acknowledged and whose end nobody asked for.
	alive map[string]bool
	// unsure holds those whose kill was sent but not acknowledged.
	unsure map[string]bool
	made   int
}

// TestStorm kills the daemon at random moments under a load of creates, commands and kills. Afterwards every acknowledged
// sandbox runs, and nothing else is left on the machine.
func TestStorm(t *testing.T) {
	length := 40 * time.Second
	if text := os.Getenv("STORM"); text != "" { //nolint:forbidigo // how long to go on is the caller's wish
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal(err)
		}
		length = d
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))

	d := harness.New(t, "--pool-min", "2", "--pool-max", "8")
	d.Up()
	node := nodeOf(t, d)
	s := &storm{d: d, alive: map[string]bool{}, unsure: map[string]bool{}}
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { s.work(ctx) })
	}
	kills := 0
	for ctx.Err() == nil {
		wait := time.NewTimer(time.Duration(200+rng.IntN(3000)) * time.Millisecond)
		select {
		case <-ctx.Done():
		case <-wait.C:
			d.Signal(syscall.SIGKILL)
			kills++
			d.Up()
		}
		wait.Stop()
	}
	wg.Wait()
	t.Logf("%d sandboxes made, %d kills of the daemon, %d sandboxes to find again", s.made, kills, len(s.alive))
	s.check(t)
	if out, code := d.CLI(t.Context(), "sandbox", "kill", "--all"); code != 0 {
		t.Errorf("kill --all: exit code %d: %s", code, out)
	}
	if out, code := d.CLI(t.Context(), append([]string{"down", "--purge"}, d.Flags...)...); code != 0 {
		t.Errorf("down --purge: exit code %d: %s", code, out)
	}
	if left := traces(t, d, node); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// work makes, uses and kills sandboxes until ctx ends; a daemon that is down is part of the game.
func (s *storm) work(ctx context.Context) {
	for ctx.Err() == nil {
		c := s.d.Client()
		callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		made, err := c.CreateSandbox(callCtx, client.CreateSandbox{TimeoutSeconds: 900})
		if err != nil {
			cancel()
			pause(ctx, 20*time.Millisecond)
			continue
		}
		s.mu.Lock()
		s.made++
		keep := s.made%4 == 0 && len(s.alive) < 12
		s.alive[made.ID] = true
		s.mu.Unlock()
		_, _ = s.d.CLI(callCtx, "sandbox", "exec", made.ID, "echo x > file; sync")
		if !keep {
			s.kill(callCtx, c, made.ID)
		}
		cancel()
	}
}

func (s *storm) kill(ctx context.Context, c *client.Client, id string) {
	s.mu.Lock()
	delete(s.alive, id)
	s.unsure[id] = true
	s.mu.Unlock()
	if err := c.KillSandbox(ctx, id); err == nil {
		s.mu.Lock()
		delete(s.unsure, id)
		s.mu.Unlock()
	}
}

// check compares what was promised with what the daemon and the machine say.
func (s *storm) check(t *testing.T) {
	t.Helper()
	c := s.d.Client()
	for id := range s.alive {
		got, err := c.GetSandbox(t.Context(), id)
		if err != nil || got.State != "running" {
			t.Errorf("acknowledged sandbox %s: %s %s, %v; want it running", id, got.State, got.Reason, err)
			continue
		}
		if out, code := s.d.CLI(t.Context(), "sandbox", "exec", id, "echo ok"); code != 0 || out != "ok\n" {
			t.Errorf("acknowledged sandbox %s does not run commands: exit code %d, %q", id, code, out)
		}
	}
	running, _, err := c.Sandboxes(t.Context(), client.ListSandboxes{States: []string{"running"}, Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	known := maps.Clone(s.alive)
	maps.Copy(known, s.unsure)
	var strangers []string
	for _, r := range running {
		if !known[r.ID] {
			strangers = append(strangers, r.ID)
		}
	}
	// A create whose answer the kill swallowed leaves a sandbox that its timeout ends: it is listed, not orphaned.
	t.Logf("%d running sandboxes whose creation was never acknowledged", len(strangers))
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
