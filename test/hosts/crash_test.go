package hosts_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// content is what a sandbox must hold: the hash of each file that was acknowledged, by its name.
type content map[string]string

// subject is one sandbox, which one worker uses.
type subject struct {
	id    string
	holds content
	// snapshots are those that were acknowledged, with what each must hold.
	snapshots map[string]content
	// names are those that were asked for: what of it was not acknowledged may be there or not, but never half.
	names []string
	done  map[string]int
}

// longer reads how long a test is to go on from the environment.
func longer(t *testing.T, name string, usual time.Duration) time.Duration {
	t.Helper()
	text := os.Getenv(name) //nolint:forbidigo // how long to go on is the caller's wish
	if text == "" {
		return usual
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestKilledInBetween kills the daemon at random moments while sandboxes are written to, paused, resumed and snapshotted and
// templates are built. Afterwards each is in the old or in the new state, whole, and nothing else is left.
func TestKilledInBetween(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("CRASH_SEED"); text != "" { //nolint:forbidigo // to see a failure again
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("seed %d", seed)
	d := tiny(t, "--pool-min", "1", "--pool-max", "2")
	d.Up()
	node := nodeOf(t, d)
	var subjects []*subject
	for range 3 {
		s := &subject{id: create(t, d).ID, holds: content{}, snapshots: map[string]content{}, done: map[string]int{}}
		run(t, d, s.id, "sleep 36000 </dev/null >/dev/null 2>&1 & echo $! > pid")
		subjects = append(subjects, s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), longer(t, "CRASH", 30*time.Second))
	defer cancel()
	var wg sync.WaitGroup
	for i, s := range subjects {
		wg.Go(func() { s.work(ctx, d, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	b := &builds{done: map[string]string{}}
	wg.Go(func() { b.work(ctx, d) })
	kills := killAtRandom(ctx, d, rand.New(rand.NewPCG(seed, 1000)))
	wg.Wait()
	for _, s := range subjects {
		t.Logf("%s: %v", s.id, s.done)
		s.check(t, d)
	}
	t.Logf("%d kills of the daemon, %d builds", kills, len(b.done))
	b.check(t, d)
	deleteAll(t, d, subjects, b)
	if out, code := d.CLI(t.Context(), append([]string{"down", "--purge"}, d.Flags...)...); code != 0 {
		t.Errorf("down --purge: exit code %d: %s", code, out)
	}
	if left := traces(t, d, node); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// killAtRandom kills the daemon and starts it again until ctx ends, and returns how often.
func killAtRandom(ctx context.Context, d *harness.Daemon, rng *rand.Rand) int {
	for kills := 0; ; kills++ {
		pause(ctx, time.Duration(100+rng.IntN(2500))*time.Millisecond)
		if ctx.Err() != nil {
			return kills
		}
		d.Signal(syscall.SIGKILL)
		d.Up()
	}
}

// work does one thing after another with a sandbox until ctx ends; a daemon that is down is part of the game.
func (s *subject) work(ctx context.Context, d *harness.Daemon, rng *rand.Rand) {
	for n := 0; ctx.Err() == nil; n++ {
		callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		what, err := "write", error(nil)
		switch p := rng.IntN(10); {
		case p < 4:
			err = s.write(callCtx, d, "file"+strconv.Itoa(n))
		case p < 6:
			what = "pause"
			_, err = d.Client().PauseSandbox(callCtx, s.id, "memory")
		case p < 8:
			what = "resume"
			_, err = d.Client().ResumeSandbox(callCtx, s.id, client.ResumeSandbox{TimeoutSeconds: 900})
		case len(s.snapshots) < 6:
			what, err = "snapshot", s.snapshot(callCtx, d, fmt.Sprintf("crash-%s-%d", s.id, n))
		}
		cancel()
		if err != nil {
			what += " (not acknowledged)"
			pause(ctx, 20*time.Millisecond)
		}
		s.done[what]++
	}
}

// write makes a file of random bytes, and keeps its hash once that is known.
func (s *subject) write(ctx context.Context, d *harness.Daemon, name string) error {
	out, code := d.CLI(ctx, "sandbox", "exec", s.id, "head -c 300000 /dev/urandom > "+name+" && sync && sha256sum "+name)
	hash, _, found := strings.Cut(out, " ")
	if code != 0 || !found {
		return fmt.Errorf("exit code %d", code)
	}
	s.holds[name] = hash
	return nil
}

func (s *subject) snapshot(ctx context.Context, d *harness.Daemon, name string) error {
	s.names = append(s.names, name)
	_, err := d.Client().CreateSnapshot(ctx, s.id, client.CreateSnapshot{Name: name})
	if err == nil {
		s.snapshots[name] = maps.Clone(s.holds)
	}
	return err
}

// check compares what was acknowledged with what is there.
func (s *subject) check(t *testing.T, d *harness.Daemon) {
	t.Helper()
	c := d.Client()
	got, err := c.GetSandbox(t.Context(), s.id)
	if err != nil || (got.State != "running" && got.State != "paused") {
		t.Errorf("sandbox %s is %s (%s), %v; want it running or paused", s.id, got.State, got.Reason, err)
		return
	}
	if got.State == "paused" {
		if _, err := c.ResumeSandbox(t.Context(), s.id, client.ResumeSandbox{TimeoutSeconds: 900}); err != nil {
			t.Errorf("resume %s: %v", s.id, err)
			return
		}
	}
	s.holds.check(t, d, s.id)
	if out, code := d.CLI(t.Context(), "sandbox", "exec", s.id, "kill -0 $(cat pid)"); code != 0 {
		t.Errorf("sandbox %s: the process of its beginning is gone: %s", s.id, out)
	}
	known := map[string]bool{}
	for snap, err := range c.AllSnapshots(t.Context(), client.ListSnapshots{SandboxID: s.id, Limit: 100}) {
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range snap.Names {
			known[strings.TrimSuffix(name, ":default")] = true
		}
	}
	for _, name := range s.names {
		must, acknowledged := s.snapshots[name]
		if !acknowledged && !known[name] {
			continue
		}
		made, err := c.CreateSandbox(t.Context(), client.CreateSandbox{Template: name, TimeoutSeconds: 300})
		if err != nil {
			t.Errorf("create from snapshot %s (acknowledged: %v): %v", name, acknowledged, err)
			continue
		}
		must.check(t, d, made.ID)
		if err := c.KillSandbox(t.Context(), made.ID); err != nil {
			t.Error(err)
		}
	}
}

// check compares the files of a sandbox with their hashes.
func (c content) check(t *testing.T, d *harness.Daemon, id string) {
	t.Helper()
	if len(c) == 0 {
		return
	}
	names := slices.Sorted(maps.Keys(c))
	out, code := d.CLI(t.Context(), "sandbox", "exec", id, "sha256sum "+strings.Join(names, " "))
	if code != 0 {
		t.Errorf("sandbox %s: exit code %d: %s", id, code, out)
	}
	for i, line := range strings.Split(strings.TrimSpace(out), "\n") {
		if hash, _, _ := strings.Cut(line, " "); i < len(names) && hash != c[names[i]] {
			t.Errorf("sandbox %s: %s has hash %s, it was written with %s", id, names[i], hash, c[names[i]])
		}
	}
}

// builds are those that one worker asked for.
type builds struct {
	// done has the text that each build's template holds, by its name; unsure those whose start was not acknowledged.
	done   map[string]string
	unsure []string
}

func (b *builds) work(ctx context.Context, d *harness.Daemon) {
	for n := 0; ctx.Err() == nil; n++ {
		name := fmt.Sprintf("built-%d", n)
		callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		c := d.Client()
		started, err := c.CreateTemplate(callCtx, client.CreateTemplate{Name: name, FromTemplate: "base", Steps: []client.BuildStep{
			{Type: "RUN", Args: []string{"echo " + name + " > /tmp/one"}},
			{Type: "RUN", Args: []string{"head -c 2000000 /dev/urandom > /tmp/big; sha256sum /tmp/big > /tmp/sum"}},
		}})
		if err != nil {
			b.unsure = append(b.unsure, name)
			pause(ctx, 20*time.Millisecond)
			cancel()
			continue
		}
		b.done[name] = started.BuildID
		for _, err := range c.FollowBuild(callCtx, started.BuildID) {
			if err != nil {
				break // the daemon was killed: check looks at what has become of it
			}
		}
		cancel()
	}
}

// check waits until every build has ended, and uses what is ready.
func (b *builds) check(t *testing.T, d *harness.Daemon) {
	t.Helper()
	c := d.Client()
	ready := 0
	for name, id := range b.done {
		var last client.Build
		for got, err := range c.FollowBuild(t.Context(), id) {
			if err != nil {
				t.Errorf("build %s of %s: %v", id, name, err)
				break
			}
			last = got
		}
		switch last.State {
		case "failed":
			if last.Error == "" {
				t.Errorf("build %s of %s failed and does not say why", id, name)
			}
		case "ready":
			ready++
			made, err := c.CreateSandbox(t.Context(), client.CreateSandbox{Template: name, TimeoutSeconds: 300})
			if err != nil {
				t.Errorf("create from %s: %v", name, err)
				continue
			}
			if got := run(t, d, made.ID, "cat /tmp/one && sha256sum -c /tmp/sum"); !strings.HasPrefix(got, name+"\n") || !strings.HasSuffix(got, "OK") {
				t.Errorf("template %s holds %q", name, got)
			}
			if err := c.KillSandbox(t.Context(), made.ID); err != nil {
				t.Error(err)
			}
		default:
			t.Errorf("build %s of %s is %s; want it ready or failed", id, name, last.State)
		}
	}
	t.Logf("%d of %d builds ready", ready, len(b.done))
}

// deleteAll ends and deletes everything by name; what then lies in the store of checkpoints belongs to nobody.
func deleteAll(t *testing.T, d *harness.Daemon, subjects []*subject, b *builds) {
	t.Helper()
	if out, code := d.CLI(t.Context(), "sandbox", "kill", "--all"); code != 0 {
		t.Errorf("kill --all: exit code %d: %s", code, out)
	}
	c := d.Client()
	for _, s := range subjects {
		for name := range s.snapshots {
			if err := c.DeleteSnapshot(t.Context(), name); err != nil {
				t.Errorf("delete snapshot %s: %v", name, err)
			}
		}
		for _, name := range s.names {
			_ = c.DeleteSnapshot(t.Context(), name) // one that was not acknowledged need not be there
		}
	}
	for _, name := range slices.Concat(slices.Sorted(maps.Keys(b.done)), b.unsure) {
		_ = c.DeleteTemplate(t.Context(), name) // likewise
	}
	eventually(t, 30*time.Second, func() error {
		if left := checkpoints(t, d); len(left) > 0 {
			return fmt.Errorf("checkpoints that nobody has a name for: %v", left)
		}
		return nil
	})
}
