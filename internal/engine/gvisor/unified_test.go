//go:build cgroup2

package gvisor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The tests in this file need a machine whose controllers are in version 2, and fail on others; test/hosts/cgroup2 runs
// them in a virtual one.

const (
	unifiedRoot = "/sys/fs/cgroup"

	// insideVar tells a test that it runs in the process that it has made for itself.
	insideVar = "GVISOR_TEST_INSIDE"
)

// unifiedPlace returns a place for guests, and its control groups.
func unifiedPlace(t *testing.T) (place, *cgroups) {
	t.Helper()
	p := newPlace(t)
	c := p.open(t).cgroups
	if c.layout.unified != unifiedRoot {
		t.Fatalf("the controllers are in %+v, want them in %s", c.layout, unifiedRoot)
	}
	return p, c
}

func TestUnifiedSettings(t *testing.T) {
	p, c := unifiedPlace(t)
	e := p.open(t)
	if caps := e.Caps(); !slices.Contains(caps.Capabilities, "cgroup_v2") {
		t.Errorf("got %+v, want cgroup_v2", caps)
	}
	if err := c.makeParent(1 << 30); err != nil {
		t.Fatal(err)
	}
	if err := c.create("box", 256<<20, 1500); err != nil {
		t.Fatal(err)
	}
	if err := c.limitCPU("box", 1500); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(c.parents()[0], "memory.max"): "1073741824",
		c.file("box", "memory", "memory.max"):       "268435456",
		c.file("box", "memory", "memory.oom.group"): "1",
		c.file("box", "pids", "pids.max"):           "16384",
		c.file("box", "cpu", "cpu.weight"):          "150",
		c.file("box", "cpu", "cpu.max"):             "150000 100000",
	} {
		if got := readText(t, path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	if got := c.usage("box"); got != (usage{}) {
		t.Errorf("use of an empty group: got %+v", got)
	}
	// Whoever else manages the machine's groups cannot take the controllers away.
	if err := writeFile(filepath.Join(unifiedRoot, "cgroup.subtree_control"), "-memory"); !errors.Is(err, unix.EBUSY) {
		t.Errorf("taking the memory controller away: got %v, want EBUSY", err)
	}
}

// TestUnifiedMemory checks that a group that exceeds its memory ends as a whole, and alone.
func TestUnifiedMemory(t *testing.T) {
	_, c := unifiedPlace(t)
	for _, id := range []sandbox.ID{"box", "other"} {
		if err := c.create(id, 64<<20, 1000); err != nil {
			t.Fatal(err)
		}
	}
	bystander, other := inGroup(t, c, "box", "sleep", "600"), inGroup(t, c, "other", "sleep", "600")
	hungry := inGroup(t, c, "box", os.Getenv("GVISOR_TEST_GUEST"), "alloc", strconv.Itoa(128<<20)) //nolint:forbidigo // see buildImage
	for _, cmd := range []*exec.Cmd{hungry, bystander} {
		err := cmd.Wait()
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Errorf("%s: %v, want it killed", cmd.Path, err)
		}
	}
	if got := c.oomKills("box"); got < 2 {
		t.Errorf("got %d kills, want both processes", got)
	}
	if got := c.oomKills("other"); got != 0 {
		t.Errorf("the other group: got %d kills, want none", got)
	}
	if diff := cmp.Diff([]int{other.Process.Pid}, c.pids("other")); diff != "" {
		t.Error(diff)
	}
	if err := c.purge(t.Context()); err != nil {
		t.Error(err)
	}
	_ = other.Wait() // purge killed it
	if _, err := os.Stat(c.parents()[0]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want the parent gone", err)
	}
}

// TestUnifiedProcesses checks that a group cannot have more processes than it may.
func TestUnifiedProcesses(t *testing.T) {
	_, c := unifiedPlace(t)
	if err := c.create("box", 64<<20, 1000); err != nil {
		t.Fatal(err)
	}
	if err := c.write("box", []setting{{"pids", "pids.max", "1", false}}); err != nil {
		t.Fatal(err)
	}
	_ = inGroup(t, c, "box", "sleep", "600") // it needs more than one thread, and ends for want of them
	events := c.file("box", "pids", "pids.events")
	err := retry(t.Context(), func() error {
		if readKeyed(events)["max"] == 0 {
			return unix.EBUSY // ask again
		}
		return nil
	})
	if err != nil {
		t.Errorf("%v; the limit was met %q times", err, readText(t, events))
	}
}

// inGroup starts a program in a guest's group.
func inGroup(t *testing.T, c *cgroups, id sandbox.ID, name string, args ...string) *exec.Cmd {
	t.Helper()
	dir, _, err := c.entrance(id)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }() // opened for reading
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// TestInService starts a guest from a control group such as systemd gives to a service, and ends the service.
func TestInService(t *testing.T) {
	if within() {
		startInside(t)
		return
	}
	p := newPlace(t)
	service := newGroup(t, "service")
	cmd := again(t, service, p, 0)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := writeFile(filepath.Join(service, "cgroup.kill"), "1"); err != nil { // as systemd ends a service
		t.Fatal(err)
	}
	e := p.open(t)
	list, err := e.List(t.Context())
	if err != nil || len(list) != 1 || !list[0].Running {
		t.Fatalf("after the end of the service: got %+v, %v, want the guest running", list, err)
	}
	if inside := e.cgroups.pids(list[0].ID); !slices.Contains(inside, list[0].PID) {
		t.Errorf("the sentry %d is not in the guest's group, which has %v", list[0].PID, inside)
	}
}

// TestInContainer starts a guest in a container that has a control group namespace of its own. What it takes for the root is
// a group with processes, which a group with limited children may not have.
func TestInContainer(t *testing.T) {
	if within() {
		enterContainer(t)
		for range 2 { // the second finds what the first has made
			startInside(t)
		}
		return
	}
	p := newPlace(t)
	box := newGroup(t, "box")
	neighbour := sleeper(t, nil)
	if err := writeFile(filepath.Join(box, "cgroup.procs"), strconv.Itoa(neighbour.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	cmd := again(t, box, p, syscall.CLONE_NEWCGROUP|syscall.CLONE_NEWNS)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := readPIDs(filepath.Join(box, "cgroup.procs")); len(got) > 0 {
		t.Errorf("processes %v are in the container's own group", got)
	}
	if diff := cmp.Diff([]int{neighbour.Process.Pid}, readPIDs(filepath.Join(box, shelter, "cgroup.procs"))); diff != "" {
		t.Error(diff)
	}
	guests, err := filepath.Glob(filepath.Join(box, p.parent, "*", "cgroup.procs"))
	if err != nil || len(guests) != 2 {
		t.Errorf("guests: %v, %v, want two below the container's group", guests, err)
	}
}

// TestForeignGroup checks that processes that are no neighbours stay where they are.
func TestForeignGroup(t *testing.T) {
	box := newGroup(t, "box")
	stranger := sleeper(t, nil)
	if err := writeFile(filepath.Join(box, "cgroup.procs"), strconv.Itoa(stranger.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	if moved, err := makeRoom(box); err != nil || moved != 0 {
		t.Errorf("moved %d, %v, want none", moved, err)
	}
	c := &cgroups{parent: "nodes", layout: layout{unified: box}}
	if err := c.makeParent(0); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
	if diff := cmp.Diff([]int{stranger.Process.Pid}, readPIDs(filepath.Join(box, "cgroup.procs"))); diff != "" {
		t.Error(diff)
	}
}

func within() bool { return os.Getenv(insideVar) != "" } //nolint:forbidigo // set by again

// again returns a command that runs this test in a control group, and in namespaces of its own.
func again(t *testing.T, group string, p place, namespaces uintptr) *exec.Cmd {
	t.Helper()
	dir, err := os.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() }) // opened for reading
	cmd := exec.CommandContext(testContext(t), "/proc/self/exe", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), insideVar+"="+strings.Join([]string{p.root, p.scratch, p.parent}, ","))
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Unshareflags: namespaces}
	return cmd
}

// startInside starts a guest at the place that again has named, and leaves it to others.
func startInside(t *testing.T) {
	t.Helper()
	f := strings.Split(os.Getenv(insideVar), ",") //nolint:forbidigo // set by again
	p := place{root: f[0], scratch: f[1], parent: f[2]}
	if err := p.open(t).Start(testContext(t), p.spec(t, "sleep")); err != nil {
		t.Fatal(err)
	}
}

// enterContainer gives this process the view of control groups that a container has.
func enterContainer(t *testing.T) {
	t.Helper()
	if err := unix.Unmount(unifiedRoot, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("cgroup", unifiedRoot, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(unifiedRoot, "cgroup.type")); err != nil {
		t.Fatalf("%v, want a group that is not the machine's root", err)
	}
}

// newGroup makes a control group, and removes it with all that is in it.
func newGroup(t *testing.T, name string) string {
	t.Helper()
	needHost(t)
	if !hasAll(filepath.Join(unifiedRoot, "cgroup.controllers")) {
		t.Fatalf("the controllers are not in version 2 at %s", unifiedRoot)
	}
	dir := filepath.Join(unifiedRoot, "cloister-test-"+name+"-"+string(sandbox.NewNodeID()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := writeFile(filepath.Join(dir, "cgroup.kill"), "1"); err != nil {
			t.Error(err)
		}
		groups, err := filepath.Glob(filepath.Join(dir, "*", "*", "cgroup.procs"))
		for _, pattern := range []string{"*/cgroup.procs", "cgroup.procs"} {
			more, globErr := filepath.Glob(filepath.Join(dir, pattern))
			groups, err = append(groups, more...), errors.Join(err, globErr)
		}
		for _, g := range groups {
			err = errors.Join(err, retry(context.Background(), func() error { return unix.Rmdir(filepath.Dir(g)) }))
		}
		if err != nil {
			t.Error(err)
		}
	})
	return dir
}

func readText(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(string(raw))
}
