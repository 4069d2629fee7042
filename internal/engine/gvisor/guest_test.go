package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// serving starts a guest that answers commands over the network.
func serving(t *testing.T, p place, limits sandbox.Resources) (*Engine, engine.Spec, wire) {
	t.Helper()
	e, w := p.open(t), newWire(t)
	s := p.spec(t, "serve", fmt.Sprintf(":%d", guestPort))
	s.NetNS, s.Hostname, s.Limits = w.path, "box-1", limits
	if err := e.Start(testContext(t), s); err != nil {
		t.Fatal(err)
	}
	return e, s, w
}

func TestGuestSeesItsMachine(t *testing.T) {
	p := newPlace(t)
	_, _, w := serving(t, p, sandbox.Resources{MilliCPU: 2500, MemoryBytes: 384 << 20, DiskBytes: 64 << 20})
	if got := w.ask(t, "cpus"); got != "3" {
		t.Errorf("processors: got %s, want 3", got)
	}
	if got := w.ask(t, "cat /proc/meminfo"); !strings.Contains(got, fmt.Sprintf("MemTotal: %14d kB", 384<<10)) {
		t.Errorf("memory: got %.200s, want a total of %d kB", got, 384<<10)
	}
	if got := w.ask(t, "df /"); !strings.HasPrefix(got, strconv.Itoa(64<<20)+" ") {
		t.Errorf("disk: got %s, want %d bytes", got, 64<<20)
	}
	if got := w.ask(t, "host"); got != "box-1" {
		t.Errorf("host name: got %s, want box-1", got)
	}
	mounts := w.ask(t, "cat /proc/mounts")
	for _, want := range []string{" /proc proc", " /dev ", " /dev/pts devpts", " /dev/shm tmpfs", " /sys sysfs"} {
		if !strings.Contains(mounts, want) {
			t.Errorf("mounts: got %s, want one with %q", mounts, want)
		}
	}
	if strings.Contains(mounts, " /tmp ") {
		t.Errorf("mounts: got %s, want /tmp in the root", mounts)
	}
	if got := w.ask(t, "mount"); got != "<nil>" {
		t.Errorf("mount in the guest: %s", got)
	}
	if got := w.ask(t, "cat /proc/self/status"); !strings.Contains(got, "CapEff:\t0000003fffffffff") {
		t.Errorf("capabilities: got %s", got)
	}
	if got := w.ask(t, "cat /dev/null"); got != "" {
		t.Errorf("/dev/null: got %q", got)
	}
}

// TestDiskIsNotMemory writes four times the memory limit and then as much as the disk holds.
func TestDiskIsNotMemory(t *testing.T) {
	p := newPlace(t)
	const (
		memory = 128 << 20
		disk   = 550 << 20
		much   = 4 * memory
	)
	e, s, w := serving(t, p, sandbox.Resources{MilliCPU: 2000, MemoryBytes: memory, DiskBytes: disk})
	ctx := testContext(t)
	if got := w.ask(t, "write /tmp/a "+strconv.Itoa(much)); got != strconv.Itoa(much)+" ok" {
		t.Fatalf("write %d bytes: got %s", much, got)
	}
	st, err := e.Stats(ctx, s.ID)
	if err != nil || st.DiskBytes < much || st.DiskBytes > disk+64<<20 || st.MemoryBytes > memory {
		t.Errorf("got %+v, %v, want %d bytes on disk and little in memory", st, err, much)
	}
	got := w.ask(t, "write /b "+strconv.Itoa(memory))
	n, rest, _ := strings.Cut(got, " ")
	if written, err := strconv.Atoi(n); err != nil || rest != "ENOSPC" || written < disk-much-(4<<20) || written > disk-much {
		t.Errorf("write past the limit: got %s, want ENOSPC after about %d", got, disk-much)
	}
	if got := w.ask(t, "rm /tmp/a"); got != "<nil>" {
		t.Errorf("remove: %s", got)
	}
	if got := w.ask(t, "write /c "+strconv.Itoa(memory)); got != strconv.Itoa(memory)+" ok" {
		t.Errorf("write into freed space: got %s", got)
	}
	if err := e.Stop(ctx, s.ID); err != nil {
		t.Fatal(err)
	}
}

func TestOutOfMemory(t *testing.T) {
	p := newPlace(t)
	e, s, w := serving(t, p, sandbox.Resources{MilliCPU: 2000, MemoryBytes: 128 << 20, DiskBytes: 64 << 20})
	ctx := testContext(t)
	if got := w.ask(t, "alloc "+strconv.Itoa(64<<20)); got != "ok" {
		t.Fatalf("half of the memory: %s", got)
	}
	st, err := e.Stats(ctx, s.ID)
	if err != nil || st.MemoryBytes < 64<<20 || st.MemoryBytes > 128<<20 || st.CPUTime <= 0 {
		t.Errorf("got %+v, %v, want between 64 and 128 MiB", st, err)
	}
	w.tell(t, "alloc "+strconv.Itoa(256<<20))
	exit, err := e.Wait(ctx, s.ID)
	if err != nil || !exit.OOM || exit.Reason != "out of memory: the limit is 128 MiB" || exit.Code != -1 {
		t.Errorf("got %+v, %v", exit, err)
	}
	// A later process sees it too.
	exit, err = p.open(t).Wait(ctx, s.ID)
	if err != nil || !exit.OOM {
		t.Errorf("another engine: got %+v, %v", exit, err)
	}
}

func TestCPULimit(t *testing.T) {
	p := newPlace(t)
	e, s, w := serving(t, p, sandbox.Resources{MilliCPU: 500, MemoryBytes: 128 << 20, DiskBytes: 64 << 20})
	before, err := e.Stats(testContext(t), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if got := w.ask(t, "burn"); got != "ok" {
		t.Fatal(got)
	}
	after, err := e.Stats(testContext(t), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if after.CPUTime <= before.CPUTime {
		t.Errorf("processor time: got %v after %v", after.CPUTime, before.CPUTime)
	}
	name, want := "cpu.cfs_quota_us", "50000"
	if e.cgroups.unified() {
		name, want = "cpu.max", "50000 100000"
	}
	raw, err := os.ReadFile(e.cgroups.file(s.ID, "cpu", name))
	if err != nil || strings.TrimSpace(string(raw)) != want {
		t.Errorf("%s: got %q, %v, want %s", name, raw, err, want)
	}
}

// TestPlacement checks that nothing of a guest ever runs outside of its control group.
func TestPlacement(t *testing.T) {
	p := newPlace(t)
	e, s := p.open(t), p.spec(t, "sleep")
	if err := e.Start(testContext(t), s); err != nil {
		t.Fatal(err)
	}
	list, err := e.List(testContext(t))
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	all := append(descendants(list[0].PID), list[0].PID)
	for _, dir := range e.cgroups.dirs(s.ID) {
		inside := readPIDs(filepath.Join(dir, "cgroup.procs"))
		for _, pid := range all {
			if !slices.Contains(inside, pid) {
				t.Errorf("process %d is not in %s, which has %v", pid, dir, inside)
			}
		}
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", list[0].PID))
	if err != nil || !bytes.Contains(raw, []byte("\nUid:\t65534\t65534\t65534\t65534\n")) || !bytes.Contains(raw, []byte("\nCapEff:\t0000000000000000\n")) {
		t.Errorf("the sentry is not an unprivileged nobody: %s, %v", raw, err)
	}
}

// startElsewhere starts a guest in another process. When says at which point that process is killed: when it has said
// that the guest is started, or after a time.
func startElsewhere(t *testing.T, p place, s engine.Spec, after time.Duration) {
	t.Helper()
	helpElsewhere(t, p, help{Spec: s}, after)
}

// helpElsewhere has another process do something, and kills it as startElsewhere does.
func helpElsewhere(t *testing.T, p place, h help, after time.Duration) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", helperArg)
	h.Config = p.config(t)
	in, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if after > 0 {
		timer := time.NewTimer(after)
		defer timer.Stop()
		<-timer.C
		return
	}
	line := make([]byte, len("started"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "started" {
		rest, _ := io.ReadAll(out)
		t.Fatalf("helper said %s%s, %v", line, rest, err)
	}
}

func TestAdoption(t *testing.T) {
	p := newPlace(t)
	ctx := testContext(t)
	w := newWire(t)
	s := p.spec(t, "serve", fmt.Sprintf(":%d", guestPort))
	s.NetNS = w.path
	startElsewhere(t, p, s, 0)
	e := p.open(t)
	list, err := e.List(ctx)
	if err != nil || len(list) != 1 || !list[0].Running {
		t.Fatalf("got %+v, %v, want one running guest", list, err)
	}
	if got := w.ask(t, "write /a 4194304"); got != "4194304 ok" {
		t.Errorf("the guest does not work any more: %s", got)
	}
	st, err := e.Stats(ctx, s.ID)
	if err != nil || st.DiskBytes < 4<<20 || st.MemoryBytes <= 0 || st.CPUTime <= 0 {
		t.Errorf("got %+v, %v, want its use", st, err)
	}
	type result struct {
		exit engine.Exit
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		exit, err := e.Wait(ctx, s.ID)
		ended <- result{exit, err}
	}()
	w.tell(t, "exit 6")
	r := <-ended
	if r.err != nil || r.exit.OOM || r.exit.Reason == "" || r.exit.Code != 6 && r.exit.Code != -1 {
		t.Errorf("got %+v, %v", r.exit, r.err)
	}
	if err := e.Stop(ctx, s.ID); err != nil {
		t.Fatal(err)
	}
	if left := p.left(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestAdoptedOutOfMemory(t *testing.T) {
	p := newPlace(t)
	ctx := testContext(t)
	w := newWire(t)
	s := p.spec(t, "serve", fmt.Sprintf(":%d", guestPort))
	s.NetNS, s.Limits.MemoryBytes = w.path, 96<<20
	startElsewhere(t, p, s, 0)
	w.tell(t, "alloc "+strconv.Itoa(256<<20))
	exit, err := p.open(t).Wait(ctx, s.ID)
	if err != nil || !exit.OOM || exit.Reason != "out of memory: the limit is 96 MiB" {
		t.Errorf("got %+v, %v", exit, err)
	}
}

// TestKilledInTheMiddle kills a process at several moments of a start. Whatever is left must be found and cleared.
func TestKilledInTheMiddle(t *testing.T) {
	p := newPlace(t)
	ctx := testContext(t)
	found := 0
	for after := 10 * time.Millisecond; after <= 130*time.Millisecond; after += 8 * time.Millisecond {
		s := p.spec(t, "sleep")
		startElsewhere(t, p, s, after)
		e := p.open(t)
		list, err := e.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		found += len(list)
		if len(findSentries(e.bundle(s.ID))) > 0 && len(list) == 0 {
			t.Errorf("after %v: a sentry that List does not show", after)
		}
		for _, g := range list {
			if err := e.Stop(ctx, g.ID); err != nil {
				t.Error(err)
			}
		}
		// A process that had not even begun to be a sentry finds its control group gone, and ends.
		if pids := untilGone(t, e.bundle(s.ID)); len(pids) > 0 {
			t.Errorf("after %v: sentries %v are left", after, pids)
		}
		if left := p.left(t); len(left) > 0 {
			t.Errorf("after %v: left: %v", after, left)
		}
	}
	if found == 0 {
		t.Log("every process was killed before it began")
	}
}

// untilGone waits for a guest's sentries to end by themselves, and returns those that do not.
func untilGone(t *testing.T, bundle string) []int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		pids := findSentries(bundle)
		if len(pids) == 0 || ctx.Err() != nil {
			return pids
		}
		<-tick.C
	}
}

func TestPurge(t *testing.T) {
	p := newPlace(t)
	other := newPlace(t)
	ctx := testContext(t)
	stays := other.spec(t, "sleep")
	if err := other.open(t).Start(ctx, stays); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := p.open(t).Start(ctx, p.spec(t, "sleep")); err != nil {
			t.Fatal(err)
		}
	}
	e := p.open(t)
	if err := e.Purge(ctx); err != nil {
		t.Fatal(err)
	}
	for _, dir := range append(e.cgroups.parents(), p.root) {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s: %v, want it gone", dir, err)
		}
	}
	list, err := other.open(t).List(ctx)
	if err != nil || len(list) != 1 || !list[0].Running {
		t.Errorf("the guest of another root: got %+v, %v", list, err)
	}
}

// TestStandardStreams checks that a guest neither gets this process's streams nor changes who owns them.
func TestStandardStreams(t *testing.T) {
	p := newPlace(t)
	var before, after [3]unix.Stat_t
	for fd := range before {
		_ = unix.Fstat(fd, &before[fd])
	}
	e, s := p.open(t), p.spec(t, "sleep")
	if err := e.Start(testContext(t), s); err != nil {
		t.Fatal(err)
	}
	for fd := range after {
		_ = unix.Fstat(fd, &after[fd])
		if before[fd].Uid != after[fd].Uid || before[fd].Gid != after[fd].Gid {
			t.Errorf("stream %d belongs to %d:%d, and did to %d:%d", fd, after[fd].Uid, after[fd].Gid, before[fd].Uid, before[fd].Gid)
		}
	}
	list, err := e.List(testContext(t))
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	const firstStream = 253 // gVisor keeps the guest's streams at these numbers
	for fd := firstStream; fd < firstStream+3; fd++ {
		var st unix.Stat_t
		err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", list[0].PID, fd), &st)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
			t.Errorf("the guest's stream %d is %+v, %v, want the null device", fd-firstStream, st, err)
		}
	}
}

func TestStartRefuses(t *testing.T) {
	p := newPlace(t)
	e := p.open(t)
	junk := filepath.Join(p.scratch, "junk")
	if err := os.WriteFile(junk, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(junk); err != nil {
			t.Error(err)
		}
	})
	for _, tt := range []struct {
		name   string
		change func(*engine.Spec)
		want   string
	}{
		{"no image", func(s *engine.Spec) { s.RootFS = "/no/image" }, "does not exist"},
		{"other image", func(s *engine.Spec) { s.RootFS = junk }, "not an EROFS image"},
		{"no scratch", func(s *engine.Spec) { s.ScratchDir = "/no/dir" }, "does not exist"},
		{"no namespace", func(s *engine.Spec) { s.NetNS = "/run/netns/none" }, "/run/netns/none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := p.spec(t, "sleep")
			tt.change(&s)
			err := e.Start(testContext(t), s)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want something with %q", err, tt.want)
			}
			list, err := e.List(context.Background())
			if err != nil || len(list) > 0 {
				t.Errorf("left: %v, %v", list, err)
			}
		})
	}
}
