package gvisor

import (
	"bufio"
	"bytes"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// usage is what a guest's control group has counted.
type usage struct {
	cpu    time.Duration
	memory int64 // anonymous and shared memory, which cannot be reclaimed
	cache  int64
}

// usage reads a guest's counters. Files that are missing count as zero: the guest may be going away.
func (c *cgroups) usage(id sandbox.ID) usage {
	var u usage
	if c.unified() {
		u.cpu = time.Duration(readKeyed(c.file(id, "cpu", "cpu.stat"))["usage_usec"]) * time.Microsecond
		m := readKeyed(c.file(id, "memory", "memory.stat"))
		u.memory, u.cache = m["anon"]+m["shmem"], m["file"]-m["shmem"]
	} else {
		raw, _ := os.ReadFile(c.file(id, "cpuacct", "cpuacct.usage")) // nothing read is zero
		ns, _ := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
		u.cpu = time.Duration(ns)
		m := readKeyed(c.file(id, "memory", "memory.stat"))
		u.memory, u.cache = m["rss"]+m["shmem"], m["cache"]-m["shmem"]
	}
	return u
}

// oomKills returns how many of a guest's processes the kernel killed because the group's memory was used up.
func (c *cgroups) oomKills(id sandbox.ID) int64 {
	if c.unified() {
		return readKeyed(c.file(id, "memory", "memory.events"))["oom_kill"]
	}
	return readKeyed(c.file(id, "memory", "memory.oom_control"))["oom_kill"]
}

// outgrew reports whether a guest has ever used all the memory of its own limit. One that was killed for want of memory and
// has not gave way because all guests together used up theirs.
func (c *cgroups) outgrew(id sandbox.ID) bool {
	if c.unified() {
		return readKeyed(c.file(id, "memory", "memory.events"))["oom"] > 0
	}
	const slack = 1 << 20 // processors keep some pages that are counted later
	most, err := readNumber(c.file(id, "memory", "memory.max_usage_in_bytes"))
	if err != nil {
		return true // the group is going away
	}
	limit, err := readNumber(c.file(id, "memory", "memory.limit_in_bytes"))
	return err != nil || most+slack >= limit
}

func readNumber(path string) (int64, error) {
	raw, err := os.ReadFile(path) //nolint:gosec // below a mount of control groups
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
}

// readKeyed parses a file of lines "key number"; other lines are left out.
func readKeyed(path string) map[string]int64 {
	raw, err := os.ReadFile(path) //nolint:gosec // below a mount of control groups
	if err != nil {
		return nil
	}
	out := map[string]int64{}
	for sc := bufio.NewScanner(bytes.NewReader(raw)); sc.Scan(); {
		key, value, ok := strings.Cut(sc.Text(), " ")
		if n, err := strconv.ParseInt(value, 10, 64); ok && err == nil {
			out[key] = n
		}
	}
	return out
}
