package gvisor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// fakeV2 returns control groups of version 2 in a plain directory.
func fakeV2(t *testing.T) *cgroups {
	t.Helper()
	root := t.TempDir()
	put(t, filepath.Join(root, "cgroup.controllers"), "cpuset cpu io memory pids\n")
	return &cgroups{parent: "nodes", layout: layout{unified: root}}
}

// fakeV1 returns control groups of version 1 in plain directories, with cpu and cpuacct in one hierarchy.
func fakeV1(t *testing.T) *cgroups {
	t.Helper()
	root := t.TempDir()
	l := layout{v1: map[string]string{}}
	for ctl, dir := range map[string]string{"cpu": "cpu,cpuacct", "cpuacct": "cpu,cpuacct", "memory": "memory", "pids": "pids"} {
		l.v1[ctl] = filepath.Join(root, dir)
	}
	return &cgroups{parent: "nodes", layout: l}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// files returns the contents of all files below the guest's directories.
func files(t *testing.T, dirs ...string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if raw, err := os.ReadFile(filepath.Join(dir, e.Name())); err == nil {
				out[e.Name()] = string(raw)
			}
		}
	}
	return out
}

func TestCreateGroupV2(t *testing.T) {
	c := fakeV2(t)
	if err := c.makeParent(1 << 30); err != nil {
		t.Fatal(err)
	}
	parent := c.parents()[0]
	for _, dir := range []string{c.layout.unified, parent} {
		if got := files(t, dir)["cgroup.subtree_control"]; got != "+cpu +memory +pids" {
			t.Errorf("controllers below %s: got %q", dir, got)
		}
	}
	if got := files(t, parent)["memory.max"]; got != "1073741824" {
		t.Errorf("budget: got %q", got)
	}
	// These exist in newer kernels only, and are written where they do.
	for _, name := range []string{"memory.swap.max", "memory.oom.group", "cpu.weight"} {
		put(t, filepath.Join(parent, "box", name), "")
	}
	if err := c.create("box", 256<<20, 1500); err != nil {
		t.Fatal(err)
	}
	if err := c.limitCPU("box", 1500); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"memory.max": "268435456", "memory.swap.max": "0", "memory.oom.group": "1", "pids.max": "16384",
		"cpu.weight": "150", "cpu.max": "150000 100000",
	}
	if diff := cmp.Diff(want, files(t, c.dirs("box")...)); diff != "" {
		t.Error(diff)
	}
	if err := c.makeParent(0); err != nil {
		t.Fatal(err)
	}
	if got := files(t, parent)["memory.max"]; got != "max" {
		t.Errorf("no budget: got %q", got)
	}
}

func TestCreateGroupV1(t *testing.T) {
	c := fakeV1(t)
	if err := c.makeParent(0); err != nil {
		t.Fatal(err)
	}
	if got := len(c.dirs("box")); got != 3 {
		t.Fatalf("got %d directories, want 3", got)
	}
	put(t, c.file("box", "memory", "memory.memsw.limit_in_bytes"), "")
	put(t, c.file("box", "cpu", "cpu.shares"), "")
	if err := c.create("box", 256<<20, 250); err != nil {
		t.Fatal(err)
	}
	if err := c.limitCPU("box", 5); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"memory.limit_in_bytes": "268435456", "memory.memsw.limit_in_bytes": "268435456", "pids.max": "16384",
		"cpu.shares": "256", "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "1000",
	}
	if diff := cmp.Diff(want, files(t, c.dirs("box")...)); diff != "" {
		t.Error(diff)
	}
}

func TestUsageOfGroup(t *testing.T) {
	const id = sandbox.ID("box")
	v1, v2 := fakeV1(t), fakeV2(t)
	put(t, v1.file(id, "cpuacct", "cpuacct.usage"), "1500000\n")
	put(t, v1.file(id, "memory", "memory.stat"), "cache 700\nrss 100\nshmem 200\nhierarchical_memory_limit 5\n")
	put(t, v1.file(id, "memory", "memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
	put(t, v2.file(id, "cpu", "cpu.stat"), "usage_usec 1500\nuser_usec 1000\n")
	put(t, v2.file(id, "memory", "memory.stat"), "anon 100\nfile 700\nshmem 200\nnonsense\nslab x\n")
	put(t, v2.file(id, "memory", "memory.events"), "low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
	want := usage{cpu: 1500 * time.Microsecond, memory: 300, cache: 500}
	for name, c := range map[string]*cgroups{"v1": v1, "v2": v2} {
		if got := c.usage(id); got != want {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
		}
		if got := c.oomKills(id); got != 2 {
			t.Errorf("%s: got %d kills, want 2", name, got)
		}
		if got := c.usage("other"); got != (usage{}) {
			t.Errorf("%s: a group that is gone: got %+v, want nothing", name, got)
		}
	}
}

func TestPIDsOfGroup(t *testing.T) {
	c := fakeV1(t)
	put(t, c.file("box", "memory", "cgroup.procs"), "12\n7\n")
	put(t, c.file("box", "pids", "cgroup.procs"), "7\n30\n0\n")
	if diff := cmp.Diff([]int{7, 12, 30}, c.pids("box")); diff != "" {
		t.Error(diff)
	}
}

func TestRemoveGroup(t *testing.T) {
	for name, c := range map[string]*cgroups{"v1": fakeV1(t), "v2": fakeV2(t)} {
		for _, dir := range c.dirs("box") {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		ctx := context.Background()
		if err := c.remove(ctx, "box"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.remove(ctx, "box"); err != nil {
			t.Errorf("%s: what is gone: %v", name, err)
		}
		if err := c.purge(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, dir := range c.parents() {
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %v, want %s gone", name, err, dir)
			}
		}
	}
}

// TestNoRoomNeeded covers where no process may be moved; cgroup2 machines have a test of where they are.
func TestNoRoomNeeded(t *testing.T) {
	own := strconv.Itoa(os.Getpid()) + "\n"
	for name, have := range map[string]map[string]string{
		"machine's root":         {"cgroup.procs": own},
		"ready":                  {"cgroup.type": "domain\n", "cgroup.procs": own, "cgroup.subtree_control": "cpu memory pids\n"},
		"somebody else's group":  {"cgroup.type": "domain\n", "cgroup.procs": "1\n"},
		"no processes, not ours": {"cgroup.type": "domain\n", "cgroup.procs": ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for file, text := range have {
				put(t, filepath.Join(root, file), text)
			}
			if moved, err := makeRoom(root); moved != 0 || err != nil {
				t.Errorf("moved %d, %v, want none", moved, err)
			}
			if _, err := os.Stat(filepath.Join(root, shelter)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%v, want no group made", err)
			}
		})
	}
}

func TestFindLayout(t *testing.T) {
	full, empty := t.TempDir(), t.TempDir()
	put(t, filepath.Join(full, "cgroup.controllers"), "cpuset cpu io memory hugetlb pids\n")
	put(t, filepath.Join(empty, "cgroup.controllers"), "\n")
	const v1 = `30 25 0:26 / /cg/cpu,cpuacct rw,relatime shared:9 - cgroup cg rw,cpu,cpuacct
31 25 0:27 / /cg/my\040memory rw - cgroup cg rw,memory
32 25 0:28 / /cg/pids rw - cgroup cg rw,pids
33 25 0:29 / /cg/systemd rw - cgroup systemd rw,xattr,name=systemd
`
	wantV1 := map[string]string{"cpu": "/cg/cpu,cpuacct", "cpuacct": "/cg/cpu,cpuacct", "memory": "/cg/my memory", "pids": "/cg/pids"}
	v2 := func(dir string) string { return "40 25 0:30 / " + dir + " rw - cgroup2 cg rw,nsdelegate\n" }
	for _, tt := range []struct {
		name, mounts string
		unified      string
		v1           map[string]string
		fails        bool
	}{
		{"v1", v1, "", wantV1, false},
		{"v2", v2(full), full, nil, false},
		{"hybrid, controllers in v1", v1 + v2(empty), "", wantV1, false},
		{"hybrid, controllers in v2", v1 + v2(full), full, nil, false},
		{"v2 without controllers", v2(empty), "", nil, true},
		{"v1 without memory", strings.ReplaceAll(v1, "rw,memory", "rw,io"), "", nil, true},
		{"nothing", "", "", nil, true},
		{"junk", "a b c\n - \n1 2 3 4 - cgroup\n", "", nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := findLayout([]byte(tt.mounts))
			if tt.fails {
				if !errors.Is(err, sandbox.ErrUnsupported) {
					t.Errorf("got %v, want ErrUnsupported", err)
				}
				return
			}
			if err != nil || l.unified != tt.unified || tt.unified == "" && !cmp.Equal(l.v1, tt.v1) {
				t.Errorf("got %+v, %v", l, err)
			}
		})
	}
}

func FuzzFindLayout(f *testing.F) {
	f.Add([]byte("30 25 0:26 / /x rw - cgroup cg rw,cpu,cpuacct,memory,pids\n"))
	f.Add([]byte(" - \n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if l, err := findLayout(raw); err == nil && l.unified == "" && len(l.v1) != len(v1Controllers()) {
			t.Errorf("got %+v from %q", l, raw)
		}
	})
}

// TestRealUnified runs what needs no controllers on the machine's version 2 mount, which is there on all but old machines.
func TestRealUnified(t *testing.T) {
	needHost(t)
	root := ""
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.subtree_control")); err == nil {
			root = dir
		}
	}
	if root == "" {
		t.Skip("no control groups of version 2")
	}
	c := &cgroups{parent: "cloister-test-" + string(sandbox.NewNodeID()), layout: layout{unified: root}}
	t.Cleanup(func() {
		if err := c.purge(context.Background()); err != nil {
			t.Error(err)
		}
	})
	for _, id := range []sandbox.ID{"born", "moved"} {
		if err := os.MkdirAll(c.dirs(id)[0], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	dir, tasks, err := c.entrance("born")
	if err != nil || len(tasks) > 0 {
		t.Fatal(tasks, err)
	}
	defer func() { _ = dir.Close() }() // opened for reading
	born := sleeper(t, &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())})
	if diff := cmp.Diff([]int{born.Process.Pid}, c.pids("born")); diff != "" {
		t.Error(diff)
	}
	moved := sleeper(t, nil)
	for range 2 { // also when it is there
		if err := c.place("moved", moved.Process.Pid); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]int{moved.Process.Pid}, c.pids("moved")); diff != "" {
		t.Error(diff)
	}
	for id, cmd := range map[sandbox.ID]*exec.Cmd{"born": born, "moved": moved} {
		c.kill(id)
		_ = cmd.Wait() // killed
		if err := c.remove(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

func sleeper(t *testing.T, attr *syscall.SysProcAttr) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// TestOutgrew tells a guest that used up its own memory from one that gave way to others.
func TestOutgrew(t *testing.T) {
	const own, others = sandbox.ID("own"), sandbox.ID("others")
	v1, v2 := fakeV1(t), fakeV2(t)
	for id, most := range map[sandbox.ID]string{own: "536850432\n", others: "268435456\n"} {
		put(t, v1.file(id, "memory", "memory.limit_in_bytes"), "536870912\n")
		put(t, v1.file(id, "memory", "memory.max_usage_in_bytes"), most)
	}
	put(t, v2.file(own, "memory", "memory.events"), "max 7\noom 1\noom_kill 2\n")
	put(t, v2.file(others, "memory", "memory.events"), "max 0\noom 0\noom_kill 2\n")
	for name, c := range map[string]*cgroups{"v1": v1, "v2": v2} {
		if !c.outgrew(own) || c.outgrew(others) {
			t.Errorf("%s: its own limit: %t, that of all: %t; want true and false", name, c.outgrew(own), c.outgrew(others))
		}
	}
}
