package install

import (
	"context"
	"fmt"
	"math"
	"strconv"

	"golang.org/x/sys/unix"
)

// What one idle sandbox takes of the machine, rounded up.
const (
	sandboxMemory      = 14 << 20
	sandboxThreads     = 48
	sandboxFiles       = 16
	sandboxConnections = 64
	// daemonFiles and daemonThreads are what Cloister itself needs.
	daemonFiles   = 2048
	daemonThreads = 512
	mostPlanned   = 1000
)

// memoryFacts is in bytes.
type memoryFacts struct{ total, available int64 }

func gatherMemory() memoryFacts {
	info := parseMeminfo(readFile("/proc/meminfo"))
	return memoryFacts{info["MemTotal"], info["MemAvailable"]}
}

// plannedSandboxes is how many sandboxes with 32 MiB of working memory fit, up to 1,000.
func plannedSandboxes(f memoryFacts) int { return int(max(1, min(f.total/(32<<20), mostPlanned))) }

func checkMemory(context.Context, Settings) []Finding { return []Finding{judgeMemory(gatherMemory())} }

func judgeMemory(f memoryFacts) Finding {
	const check = "memory"
	detail := fmt.Sprintf("%s available of %s: room for about %d idle sandboxes", size(f.available), size(f.total), f.available*9/10/sandboxMemory)
	switch {
	case f.total == 0:
		return warn(check, "size unknown", "make sure that /proc is mounted")
	case f.available < 512<<20:
		return fail(check, detail, "free memory, or use a machine with at least 2 GiB")
	case f.available < 1536<<20:
		return warn(check, detail, "use a machine with at least 2 GiB of free memory to build templates and run several sandboxes")
	}
	return ok(check, detail)
}

// limitFacts are the machine's limits; -1 is unknown, or none.
type limitFacts struct {
	openFiles, processes        int64 // of this process
	pidMax, threadsMax, fileMax int64 // of the machine
	inotifyInstances            int64
	inotifyWatches              int64
	conntrackMax, conntrack     int64
	mapCount                    int64
}

func checkLimits(_ context.Context, s Settings) []Finding {
	number := func(path string) int64 {
		if n, known := readNumber("/proc/sys/" + path); known {
			return n
		}
		return -1
	}
	return judgeLimits(limitFacts{
		openFiles: hardLimit(unix.RLIMIT_NOFILE), processes: hardLimit(unix.RLIMIT_NPROC),
		pidMax: number("kernel/pid_max"), threadsMax: number("kernel/threads-max"), fileMax: number("fs/file-max"),
		inotifyInstances: number("fs/inotify/max_user_instances"), inotifyWatches: number("fs/inotify/max_user_watches"),
		conntrackMax: number("net/netfilter/nf_conntrack_max"), conntrack: number("net/netfilter/nf_conntrack_count"),
		mapCount: number("vm/max_map_count"),
	}, s.Sandboxes)
}

func hardLimit(resource int) int64 {
	var r unix.Rlimit
	if err := unix.Getrlimit(resource, &r); err != nil || r.Max > math.MaxInt64 {
		return -1
	}
	return int64(r.Max)
}

// judgeLimits compares each limit with what the planned number of sandboxes needs.
func judgeLimits(f limitFacts, sandboxes int) []Finding {
	n := int64(sandboxes)
	files, threads := daemonFiles+n*sandboxFiles, daemonThreads+n*sandboxThreads
	atLeast := func(check string, have, need int64, remedy string) Finding {
		switch {
		case have < 0:
			return ok(check, "no limit")
		case have < need:
			return warn(check, fmt.Sprintf("%d, and %d sandboxes need about %d", have, sandboxes, need), remedy)
		}
		return ok(check, strconv.FormatInt(have, 10))
	}
	sysctl := func(name string, value int64) string {
		return fmt.Sprintf("echo '%s=%d' > /etc/sysctl.d/60-cloister-%s.conf && sysctl --system", name, value, lastPart(name))
	}
	out := []Finding{
		atLeast("open files", f.openFiles, files, fmt.Sprintf("raise the limit: ulimit -Hn %d, or LimitNOFILE=%d in the systemd unit", max(files, 1<<20), max(files, 1<<20))),
		atLeast("open files of the machine", f.fileMax, files, sysctl("fs.file-max", max(files*4, 1<<20))),
		atLeast("processes per user", f.processes, threads, "raise the limit: ulimit -Hu unlimited, or LimitNPROC=infinity in the systemd unit (all sandboxes run as one user)"),
		atLeast("process ids", f.pidMax, threads, sysctl("kernel.pid_max", 4194304)),
		atLeast("threads", f.threadsMax, threads, sysctl("kernel.threads-max", threads*2)),
		atLeast("memory maps", f.mapCount, 65530, sysctl("vm.max_map_count", 262144)),
		atLeast("inotify instances", f.inotifyInstances, 64, sysctl("fs.inotify.max_user_instances", 512)),
		atLeast("inotify watches", f.inotifyWatches, 8192, sysctl("fs.inotify.max_user_watches", 524288)),
	}
	return append(out, judgeConntrack(f, 16384+n*sandboxConnections, sysctl))
}

func judgeConntrack(f limitFacts, need int64, sysctl func(string, int64) string) Finding {
	const check, name = "connection tracking", "net.netfilter.nf_conntrack_max"
	switch {
	case f.conntrackMax < 0:
		return ok(check, "not in use yet; the first sandbox switches it on")
	case f.conntrack >= 0 && f.conntrack*5 > f.conntrackMax*4:
		return warn(check, fmt.Sprintf("%d of %d entries are in use", f.conntrack, f.conntrackMax), sysctl(name, f.conntrackMax*4))
	case f.conntrackMax < need:
		return warn(check, fmt.Sprintf("%d entries, and about %d are needed", f.conntrackMax, need), sysctl(name, max(need*2, 262144)))
	}
	return ok(check, fmt.Sprintf("%d entries", f.conntrackMax))
}
