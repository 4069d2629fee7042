// Package hosts_test runs the real binary on this machine, kills it, and looks at what is left.
package hosts_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

func create(t *testing.T, d *harness.Daemon) client.Sandbox {
	t.Helper()
	s, err := d.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func run(t *testing.T, d *harness.Daemon, id, command string) string {
	t.Helper()
	out, code := d.CLI(t.Context(), "sandbox", "exec", id, command)
	if code != 0 {
		t.Fatalf("%s: exit code %d, output %q", command, code, out)
	}
	return strings.TrimSpace(out)
}

// TestRestartKeepsSandboxes ends the daemon softly and hard; what ran goes on running, and what died meanwhile is told.
func TestRestartKeepsSandboxes(t *testing.T) {
	d := harness.Start(t)
	kept, dies := create(t, d), create(t, d)
	run(t, d, kept.ID, "head -c 300000000 /dev/urandom > blob; sha256sum blob > sum; nohup sleep 3600 >/dev/null 2>&1 & echo $! > pid")

	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		d.Signal(sig)
		d.Up()
		run(t, d, kept.ID, "sha256sum -c sum && kill -0 $(cat pid)")
	}

	d.Signal(syscall.SIGKILL)
	for _, pid := range sentries(t, d.DataDir(), dies.ID) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	d.Up()
	run(t, d, kept.ID, "sha256sum -c sum")
	got, err := d.Client().GetSandbox(t.Context(), dies.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got.State != "lost" || got.Reason == "" || got.EndedAt.IsZero() {
		t.Errorf("a sandbox that died unseen is %s, reason %q, ended %s; want lost with reason and time", got.State, got.Reason, got.EndedAt)
	}
	events, err := d.Client().Events(t.Context(), client.ListEvents{SandboxID: dies.ID, Type: "lost", Limit: 10})
	if err != nil || len(events) != 1 {
		t.Errorf("events of the lost sandbox: %v, %v; want one", events, err)
	}
}

func TestSecondUpRefuses(t *testing.T) {
	d := harness.Start(t)
	cmd := exec.CommandContext(t.Context(), harness.Binary(t), append([]string{"up"}, d.Flags...)...)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatal("a second daemon started on the same data directory")
	}
	if !strings.Contains(string(out), "process "+strconv.Itoa(d.PID())) {
		t.Errorf("the refusal does not name process %d: %s", d.PID(), out)
	}
}

// TestPurgeLeavesNothing looks at the machine afterwards: what was the daemon's is gone, and nothing else.
func TestPurgeLeavesNothing(t *testing.T) {
	d := harness.Start(t)
	for range 3 {
		create(t, d)
	}
	node := nodeOf(t, d)
	if len(traces(t, d, node)) == 0 {
		t.Fatal("no trace of a running daemon: the test does not know where to look")
	}
	before := strangers(t, node)
	d.Signal(syscall.SIGKILL)
	out, code := d.CLI(t.Context(), append([]string{"down", "--purge"}, d.Flags...)...)
	if code != 0 {
		t.Fatalf("down --purge: exit code %d: %s", code, out)
	}
	if left := traces(t, d, node); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if diff := cmp.Diff(before, strangers(t, node)); diff != "" {
		t.Errorf("what is not Cloister's, before and after (-before +after):\n%s", diff)
	}
	if _, err := os.Stat(d.DataDir()); !os.IsNotExist(err) {
		t.Errorf("data directory: %v; want it gone", err)
	}
}

// TestDetach starts in the background, looks, and stops.
func TestDetach(t *testing.T) {
	d := harness.New(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	out, code := d.CLI(ctx, append([]string{"up", "--detach"}, d.Flags...)...)
	if code != 0 || !strings.Contains(out, "export E2B_API_KEY=e2b_") {
		t.Fatalf("up --detach: exit code %d: %s", code, out)
	}
	var st client.Status
	out, code = d.CLI(ctx, "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &st); err != nil || code != 0 || !st.Ready {
		t.Errorf("status: exit code %d, %v: %s", code, err, out)
	}
	if out, code = d.CLI(ctx, append([]string{"down"}, d.Flags...)...); code != 0 {
		t.Fatalf("down: exit code %d: %s", code, out)
	}
	if _, code = d.CLI(ctx, "status"); code != 4 {
		t.Errorf("status after down: exit code %d", code)
	}
}

// sentries returns the processes of a sandbox's sentry; with an empty id those of all sandboxes of the data directory.
func sentries(t *testing.T, dataDir, id string) []int {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(filepath.Base(strings.SplitN(string(text), "\x00", 2)[0]), "runsc") {
			continue
		}
		if strings.Contains(string(text), dataDir) && strings.Contains(string(text), id) {
			pid, err := strconv.Atoi(strings.Split(name, "/")[2])
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}
