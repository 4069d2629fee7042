package install

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupFacts is what the machine's control groups offer.
type cgroupFacts struct {
	// v2 has the controllers of the unified hierarchy, v1 those with a hierarchy of their own.
	v2, v1 []string
	// readOnly is a hierarchy that cannot be written; empty when there is none.
	readOnly string
	// quota is false where CPU time cannot be limited (CONFIG_CFS_BANDWIDTH).
	quota bool
}

// The controllers that enforce a sandbox's limits.
//
//nolint:gochecknoglobals // a constant table
var neededControllers = []string{"cpu", "memory", "pids"}

func checkCgroups(context.Context, Settings) []Finding {
	return []Finding{judgeCgroups(gatherCgroups(parseMountinfo(readFile("/proc/self/mountinfo"))))}
}

func gatherCgroups(mounts []mount) cgroupFacts {
	f := cgroupFacts{quota: true}
	for _, m := range mounts {
		switch m.kind {
		case "cgroup2":
			f.v2 = strings.Fields(string(readFile(filepath.Join(m.point, "cgroup.controllers"))))
			if len(f.v2) > 0 && unix.Access(m.point, unix.W_OK) != nil {
				f.readOnly = m.point
			}
		case "cgroup":
			f.addV1(m)
		}
	}
	return f
}

// addV1 notes what one hierarchy of the older kind has.
func (f *cgroupFacts) addV1(m mount) {
	for _, c := range neededControllers {
		if !m.has(c) {
			continue
		}
		f.v1 = append(f.v1, c)
		if unix.Access(m.point, unix.W_OK) != nil {
			f.readOnly = m.point
		}
		if c == "cpu" {
			_, f.quota = readNumber(filepath.Join(m.point, "cpu.cfs_period_us"))
		}
	}
}

func judgeCgroups(f cgroupFacts) Finding {
	const check = "cgroups"
	lacks := func(have []string) []string {
		return slices.DeleteFunc(slices.Clone(neededControllers), func(c string) bool { return slices.Contains(have, c) })
	}
	mode, missing := "v2", lacks(f.v2)
	if len(f.v1) > 0 && len(lacks(f.v1)) < len(missing) || len(f.v2) == 0 {
		mode, missing = "v1", lacks(f.v1)
	}
	if len(f.v2) > 0 && len(f.v1) > 0 {
		mode = "hybrid, controllers of " + mode
	}
	switch {
	case len(f.v1) == 0 && len(f.v2) == 0:
		return fail(check, "no control groups with controllers are mounted", "mount -t cgroup2 none /sys/fs/cgroup")
	case f.readOnly != "":
		return fail(check, f.readOnly+" is read-only", "run on the machine itself, or with --privileged --cgroupns=host")
	case slices.Contains(missing, "memory"):
		return fail(check, fmt.Sprintf("%s without the controllers %s", mode, strings.Join(missing, ", ")),
			"add cgroup_enable=memory to the kernel's command line and restart the machine")
	case len(missing) > 0:
		return fail(check, fmt.Sprintf("%s without the controllers %s", mode, strings.Join(missing, ", ")),
			"enable them: systemd does so on machines of its own; else write \"+"+strings.Join(missing, " +")+"\" to cgroup.subtree_control of the parent group")
	case !f.quota:
		return warn(check, mode+" without CPU quotas", "use a kernel with CONFIG_CFS_BANDWIDTH; until then sandboxes share the processors without a limit")
	}
	return ok(check, mode+" with cpu, memory and pids")
}
