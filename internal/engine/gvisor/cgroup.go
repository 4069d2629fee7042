package gvisor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxProcesses keeps a guest from using up the machine's process ids. It is far above what a guest needs: a sentry
	// that meets this limit dies.
	maxProcesses = 16384
	cpuPeriod    = 100 * time.Millisecond
	minCPUQuota  = time.Millisecond

	groupRetry   = 5 * time.Millisecond
	groupTimeout = 10 * time.Second
)

// cgroups makes one control group per guest below one parent. On version 2 that is one directory per guest; on version 1
// one in each hierarchy. It holds no state beyond where they are.
type cgroups struct {
	parent string
	layout layout
}

// layout says where the machine's control groups are: unified is the mount of version 2 when it holds every controller
// that guests need, and otherwise v1 maps each controller to its mount.
type layout struct {
	unified string
	v1      map[string]string
}

// openCgroups finds this machine's control groups and makes the parent, and tells log when it had to move processes.
func openCgroups(parent string, budget int64, log *slog.Logger) (*cgroups, error) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find control groups: %w", err)
	}
	l, err := findLayout(raw)
	if err != nil {
		return nil, err
	}
	c := &cgroups{parent: parent, layout: l}
	if c.unified() {
		moved, err := makeRoom(l.unified)
		if err != nil {
			return nil, err
		}
		if moved > 0 {
			log.LogAttrs(context.Background(), slog.LevelInfo, "moved the container's processes into a control group of their own",
				slog.Int("processes", moved), slog.String("group", filepath.Join(l.unified, shelter)))
		}
	}
	if err := c.makeParent(budget); err != nil {
		return nil, err
	}
	return c, nil
}

// findLayout reads /proc/self/mountinfo. Version 2 wins when it holds every needed controller; the mixed set-ups of
// systemd, whose version 2 mount holds none, count as version 1.
func findLayout(mountinfo []byte) (layout, error) {
	l := layout{v1: map[string]string{}}
	for line := range strings.Lines(string(mountinfo)) {
		left, right, ok := strings.Cut(line, " - ")
		lf, rf := strings.Fields(left), strings.Fields(right)
		if !ok || len(lf) < 5 || len(rf) < 3 {
			continue
		}
		dir := unescapeMount(lf[4])
		switch rf[0] {
		case "cgroup2":
			if hasAll(filepath.Join(dir, "cgroup.controllers")) {
				return layout{unified: dir}, nil
			}
		case "cgroup":
			for o := range strings.SplitSeq(rf[2], ",") {
				if slices.Contains(v1Controllers(), o) && l.v1[o] == "" {
					l.v1[o] = dir
				}
			}
		}
	}
	for _, ctl := range v1Controllers() {
		if l.v1[ctl] == "" {
			return layout{}, sandbox.Unsupportedf("gvisor: this machine has no %s control group, in version 2 or 1: "+
				"limits could not be enforced; mount control groups at /sys/fs/cgroup", ctl)
		}
	}
	return l, nil
}

// v1Controllers are the hierarchies of version 1 that guests are put into.
func v1Controllers() []string { return []string{"cpu", "cpuacct", "memory", "pids"} }

// v2Controllers are the controllers of version 2 that guests need.
func v2Controllers() []string { return []string{"cpu", "memory", "pids"} }

func hasAll(file string) bool {
	raw, err := os.ReadFile(file) //nolint:gosec // below a mount of control groups
	have := strings.Fields(string(raw))
	return err == nil && !slices.ContainsFunc(v2Controllers(), func(c string) bool { return !slices.Contains(have, c) })
}

// unescapeMount undoes mountinfo's octal escapes of blanks and backslashes.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

func (c *cgroups) unified() bool { return c.layout.unified != "" }

// parents returns the parent's directories, one per hierarchy, sorted and without doubles.
func (c *cgroups) parents() []string {
	if c.unified() {
		return []string{filepath.Join(c.layout.unified, c.parent)}
	}
	var out []string
	for _, dir := range c.layout.v1 {
		out = append(out, filepath.Join(dir, c.parent))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// dirs returns a guest's directories, one per hierarchy.
func (c *cgroups) dirs(id sandbox.ID) []string {
	out := c.parents()
	for i := range out {
		out[i] = filepath.Join(out[i], string(id))
	}
	return out
}

// file returns the path of a guest's file: of the controller's hierarchy on version 1.
func (c *cgroups) file(id sandbox.ID, controller, name string) string {
	root := c.layout.unified
	if root == "" {
		root = c.layout.v1[controller]
	}
	return filepath.Join(root, c.parent, string(id), name)
}

// makeParent makes the group that holds all guests. It may exist already.
func (c *cgroups) makeParent(budget int64) error {
	for _, dir := range c.parents() {
		err := os.MkdirAll(dir, 0o755) //nolint:gosec // control groups are readable by all
		if errors.Is(err, unix.EROFS) {
			return sandbox.Unsupportedf("gvisor: control group %s cannot be made on a read-only mount: "+
				"run on the machine itself, or in a privileged container", dir)
		}
		if err != nil {
			return fmt.Errorf("make control group %s: %w", dir, err)
		}
	}
	if c.unified() {
		for _, dir := range []string{c.layout.unified, filepath.Join(c.layout.unified, c.parent)} {
			if err := enableControllers(dir); err != nil {
				return err
			}
		}
	} else if err := writeIfThere(filepath.Join(c.layout.v1["memory"], c.parent, "memory.use_hierarchy"), "1"); err != nil &&
		!errors.Is(err, unix.EBUSY) { // busy: there are guests in it, so it is on already
		return err
	}
	return c.write("", c.memoryLimit(budget))
}

// enableControllers lets the children of a version 2 group have the needed controllers.
func enableControllers(dir string) error {
	control := filepath.Join(dir, "cgroup.subtree_control")
	if hasAll(control) {
		return nil
	}
	err := writeFile(control, "+"+strings.Join(v2Controllers(), " +"))
	if errors.Is(err, unix.EBUSY) {
		return sandbox.Unsupportedf("gvisor: control group %s holds processes, so that it cannot have limited children: "+
			"move them into a child group, or run on the machine itself", dir)
	}
	return err
}

// setting is one value for one file of a group.
type setting struct {
	controller, file, value string
	optional                bool
}

// write applies settings to a guest's group, or to the parent where id is empty.
func (c *cgroups) write(id sandbox.ID, settings []setting) error {
	for _, s := range settings {
		path := c.file(id, s.controller, s.file)
		var err error
		if s.optional {
			err = writeIfThere(path, s.value)
		} else {
			err = writeFile(path, s.value)
		}
		if err != nil {
			return fmt.Errorf("limit %s: %w", s.controller, err)
		}
	}
	return nil
}

// memoryLimit returns the settings that limit memory to so many bytes, without swap; none for 0 bytes.
func (c *cgroups) memoryLimit(limit int64) []setting {
	v := strconv.FormatInt(limit, 10)
	switch {
	case limit == 0 && c.unified():
		return []setting{{"memory", "memory.max", "max", false}}
	case limit == 0:
		return []setting{{"memory", "memory.memsw.limit_in_bytes", "-1", true}, {"memory", "memory.limit_in_bytes", "-1", false}}
	case c.unified():
		return []setting{{"memory", "memory.max", v, false}, {"memory", "memory.swap.max", "0", true}}
	}
	// The limit with swap may never be below the one without, also while they change.
	const swapLimit = "memory.memsw.limit_in_bytes"
	return []setting{
		{"memory", swapLimit, "-1", true},
		{"memory", "memory.limit_in_bytes", v, false},
		{"memory", swapLimit, v, true},
	}
}

// create makes a guest's group. The processor's limit is for limitCPU: it would slow the start down.
func (c *cgroups) create(id sandbox.ID, memoryBytes, milliCPU int64) error {
	for _, dir := range c.dirs(id) {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) { //nolint:gosec // as above
			return fmt.Errorf("make control group: %w", err)
		}
	}
	pids := strconv.Itoa(maxProcesses)
	settings := append(c.memoryLimit(memoryBytes), setting{"pids", "pids.max", pids, false})
	if c.unified() {
		weight := min(max(milliCPU/10, 1), 10000)
		settings = append(settings,
			setting{"memory", "memory.oom.group", "1", true},
			setting{"cpu", "cpu.weight", strconv.FormatInt(weight, 10), true})
	} else {
		settings = append(settings, setting{"cpu", "cpu.shares", strconv.FormatInt(max(milliCPU*1024/1000, 2), 10), true})
	}
	return c.write(id, settings)
}

// limitCPU caps a guest's processor time at milliCPU thousandths of one processor.
func (c *cgroups) limitCPU(id sandbox.ID, milliCPU int64) error {
	quota := max(time.Duration(milliCPU)*cpuPeriod/1000, minCPUQuota).Microseconds()
	if c.unified() {
		return c.write(id, []setting{{"cpu", "cpu.max", fmt.Sprintf("%d %d", quota, cpuPeriod.Microseconds()), false}})
	}
	return c.write(id, []setting{
		{"cpu", "cpu.cfs_period_us", strconv.FormatInt(cpuPeriod.Microseconds(), 10), false},
		{"cpu", "cpu.cfs_quota_us", strconv.FormatInt(quota, 10), false},
	})
}

// entrance opens what a new process needs to begin its life in a guest's group: on version 2 the directory, to be cloned
// into; on version 1 one file per hierarchy, to which the process's thread writes itself.
func (c *cgroups) entrance(id sandbox.ID) (dir *os.File, tasks []*os.File, err error) {
	if c.unified() {
		dir, err = os.Open(c.dirs(id)[0])
		return dir, nil, err
	}
	for _, d := range c.dirs(id) {
		f, err := os.OpenFile(filepath.Join(d, "tasks"), os.O_WRONLY, 0) //nolint:gosec // made by create
		if err != nil {
			closeAll(tasks)
			return nil, nil, fmt.Errorf("open control group: %w", err)
		}
		tasks = append(tasks, f)
	}
	return nil, tasks, nil
}

// pids returns the processes in a guest's group; none where the group does not exist.
func (c *cgroups) pids(id sandbox.ID) []int {
	var out []int
	for _, dir := range c.dirs(id) {
		out = append(out, readPIDs(filepath.Join(dir, "cgroup.procs"))...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// place moves a process and its descendants into a guest's group, unless they are there.
func (c *cgroups) place(id sandbox.ID, pid int) error {
	for _, dir := range c.dirs(id) {
		file := filepath.Join(dir, "cgroup.procs")
		inside := readPIDs(file)
		if slices.Contains(inside, pid) {
			continue
		}
		// Children that appear meanwhile are born in the group, since their parent is moved first.
		if err := writeFile(file, strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("place process %d: %w", pid, err)
		}
		for _, child := range descendants(pid) {
			if err := writeFile(file, strconv.Itoa(child)); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("place process %d: %w", child, err)
			}
		}
	}
	return nil
}

// kill ends every process in a guest's group.
func (c *cgroups) kill(id sandbox.ID) {
	if c.unified() && writeIfThere(filepath.Join(c.dirs(id)[0], "cgroup.kill"), "1") == nil {
		return
	}
	for _, pid := range c.pids(id) {
		_ = unix.Kill(pid, unix.SIGKILL) // gone is as good
	}
}

// remove deletes a guest's group once it is empty, killing what is still in it.
func (c *cgroups) remove(ctx context.Context, id sandbox.ID) error {
	for _, dir := range c.dirs(id) {
		err := retry(ctx, func() error {
			err := unix.Rmdir(dir)
			if errors.Is(err, unix.EBUSY) {
				c.kill(id)
			}
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("remove control group %s: %w", dir, err)
		}
	}
	return nil
}

// purge removes the parent and every group in it.
func (c *cgroups) purge(ctx context.Context) error {
	var errs []error
	for _, parent := range c.parents() {
		entries, err := os.ReadDir(parent)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			if e.IsDir() {
				errs = append(errs, c.remove(ctx, sandbox.ID(e.Name())))
			}
		}
		errs = append(errs, retry(ctx, func() error {
			if err := unix.Rmdir(parent); !errors.Is(err, unix.ENOENT) {
				return err
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// retry repeats f while it finds something busy, for groupTimeout or until ctx ends.
func retry(ctx context.Context, f func() error) error {
	err := f()
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, groupTimeout)
	defer cancel()
	tick := time.NewTicker(groupRetry)
	defer tick.Stop()
	for errors.Is(err, unix.EBUSY) {
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-tick.C:
			err = f()
		}
	}
	return err
}

// readPIDs reads a cgroup.procs file; a file that cannot be read holds none.
func readPIDs(file string) []int {
	raw, err := os.ReadFile(file) //nolint:gosec // below a mount of control groups
	if err != nil {
		return nil
	}
	var out []int
	for f := range bytes.FieldsSeq(raw) {
		if pid, err := strconv.Atoi(string(f)); err == nil && pid > 0 {
			out = append(out, pid)
		}
	}
	return out
}

// descendants returns the processes below pid, parents first.
func descendants(pid int) []int {
	var out []int
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is well-formed
	for _, file := range files {
		raw, err := os.ReadFile(file) //nolint:gosec // below /proc
		if err != nil {
			continue // the thread ended
		}
		sc := bufio.NewScanner(bytes.NewReader(raw))
		sc.Split(bufio.ScanWords)
		for sc.Scan() {
			if child, err := strconv.Atoi(sc.Text()); err == nil {
				out = append(append(out, child), descendants(child)...)
			}
		}
	}
	return out
}

func writeFile(path, value string) error {
	return os.WriteFile(path, []byte(value), 0o644) //nolint:gosec // control groups are readable by all
}

// writeIfThere writes a file of a control group that older kernels, or set-ups without swap, lack.
func writeIfThere(path, value string) error {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return writeFile(path, value)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // opened only to be passed on
	}
}
