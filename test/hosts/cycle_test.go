package hosts_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// checkpoints are the directories that hold what was saved of sandboxes.
func checkpoints(t *testing.T, d *harness.Daemon) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(d.DataDir(), "node", "snapshots", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestPauseWriteResume goes round many times: CYCLES says how often. Each time what was written before is there, and nothing
// is left of the round before.
func TestPauseWriteResume(t *testing.T) {
	cycles := 25
	if text := os.Getenv("CYCLES"); text != "" { //nolint:forbidigo // how often is the caller's wish
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		cycles = n
	}
	for _, storage := range []string{"dir", "image"} {
		t.Run(storage, func(t *testing.T) {
			flags := []string{"--storage", storage, "--pool-min", "0", "--pool-max", "0", "--reserved-disk", "16MiB", "--sandbox-disk", "1GiB"}
			if storage == "image" {
				flags = append(flags, "--storage-size", "4GiB")
			}
			d := tiny(t, flags...)
			d.Up()
			goRound(t, d, cycles)
		})
	}
}

func goRound(t *testing.T, d *harness.Daemon, cycles int) {
	t.Helper()
	c := d.Client()
	s := create(t, d)
	run(t, d, s.ID, "sleep 36000 </dev/null >/dev/null 2>&1 & echo $! > pid; head -c 20000000 /dev/urandom > big; sha256sum big > sums")
	var before footprint
	for n := range cycles {
		name := "file" + strconv.Itoa(n%10)
		run(t, d, s.ID, fmt.Sprintf("head -c 1000000 /dev/urandom > %s && rm -f sums%d && sha256sum %s > sums%d && sha256sum -c sums > /dev/null", name, n%10, name, n%10))
		if got, err := c.PauseSandbox(t.Context(), s.ID, "memory"); err != nil || got.State != "paused" {
			t.Fatalf("pause %d: %s, %v", n, got.State, err)
		}
		if left := sentries(t, d.DataDir(), s.ID); len(left) > 0 {
			t.Fatalf("processes of a paused sandbox: %v", left)
		}
		if got, err := c.ResumeSandbox(t.Context(), s.ID, client.ResumeSandbox{TimeoutSeconds: 900}); err != nil || got.State != "running" {
			t.Fatalf("resume %d: %s, %v", n, got.State, err)
		}
		run(t, d, s.ID, "kill -0 $(cat pid) && cat sums sums? | sha256sum -c > /dev/null")
		if n == 4 { // what is made once is there by now
			before = footprintOf(t, d)
		}
	}
	if cycles > 4 {
		eventually(t, 20*time.Second, func() error { return footprintOf(t, d).exceeds(before) })
	}
	if err := c.KillSandbox(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
	eventually(t, 20*time.Second, func() error {
		if left := checkpoints(t, d); len(left) > 0 {
			return fmt.Errorf("checkpoints of a killed sandbox: %v", left)
		}
		return nil
	})
}

// footprint is what a daemon has of the machine.
type footprint struct{ descriptors, processes, checkpoints, mounts, things int }

func footprintOf(t *testing.T, d *harness.Daemon) footprint {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	node, mine := nodeOf(t, d), 0
	for _, thing := range things(t) {
		if strings.Contains(thing, node) {
			mine++
		}
	}
	return footprint{
		descriptors: len(fds), processes: len(sentries(t, d.DataDir(), "")), checkpoints: len(checkpoints(t, d)),
		mounts: strings.Count(string(mounts), d.DataDir()), things: mine,
	}
}

// exceeds says where there is more than before. Connections come and go: some more descriptors are no leak.
func (f footprint) exceeds(before footprint) error {
	if f.descriptors > before.descriptors+8 || f.processes > before.processes || f.checkpoints > before.checkpoints+1 || f.mounts > before.mounts || f.things > before.things {
		return fmt.Errorf("the daemon has %+v, and had %+v", f, before)
	}
	return nil
}
