package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

// As process 1, the agent collects the orphans that are given to it, and never mistakes one for a child of its own.
func TestReaperAsInit(t *testing.T) {
	needRoot(t)
	report := filepath.Join(t.TempDir(), "report")
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", asInit, report)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got, _ := os.ReadFile(report); string(got) != "ok" {
		t.Errorf("report: %s", got)
	}
}

// runAsInit is what the test above runs: processes with exits of their own, each of which leaves two orphans.
func runAsInit(report string) {
	ctx, cancel := context.WithCancel(context.Background())
	r := newReaper(true)
	procs := newProcesses(r, New(Config{}).log)
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		r.run(ctx)
	}()
	var mu sync.Mutex
	var wrong []string
	fail := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		wrong = append(wrong, fmt.Sprintf(format, args...))
	}
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			script := fmt.Sprintf("(true & true & exec true) & (sleep 0.0%d; true) & exit %d", i%9+1, i)
			c := &command{path: "/bin/sh", dir: "/", account: &account{home: "/"}, config: &process.ProcessConfig{Cmd: "sh", Args: []string{"-c", script}}}
			_, sub, err := procs.start(context.Background(), c)
			if err != nil {
				fail("start %d: %v", i, err)
				return
			}
			var end *process.ProcessEvent_EndEvent
			for e := range sub.events {
				end = e.GetEnd()
			}
			if int(end.GetExitCode()) != i {
				fail("process %d ended with %v", i, end)
			}
		})
		if i%20 == 0 { // a start that fails in the child is collected by the fork itself
			if _, err := r.start("/etc/passwd", nil, &syscall.ProcAttr{}, nil); err == nil {
				fail("a text file was executed")
			}
		}
	}
	all.Wait()
	for range 200 {
		if children() == 0 {
			break
		}
		<-time.After(10 * time.Millisecond)
	}
	if n := children(); n != 0 {
		fail("%d children were not collected", n)
	}
	cancel()
	<-reaped
	text := "ok"
	if len(wrong) > 0 {
		text = strings.Join(wrong, "\n")
	}
	_ = os.WriteFile(report, []byte(text), 0o600)
}

// children counts processes whose parent is this one, zombies included, whatever /proc is mounted.
func children() (n int) {
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return -1
	}
	tasks, _ := filepath.Glob("/proc/" + self + "/task/*/children")
	for _, path := range tasks {
		text, _ := os.ReadFile(path)
		n += len(strings.Fields(string(text)))
	}
	return n
}

func TestReaperSignalsOnlyItsOwn(t *testing.T) {
	r := newReaper(false)
	cmd := exec.CommandContext(t.Context(), "sleep", "30")
	must(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if there, err := r.signal(cmd.Process.Pid, syscall.SIGKILL); there || err != nil {
		t.Errorf("signalled somebody else's process %s: %v", strconv.Itoa(cmd.Process.Pid), err)
	}
	r.collect() // must not take the exit of somebody else's child either
	must(t, cmd.Process.Signal(syscall.Signal(0)))
}
