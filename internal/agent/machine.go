package agent

import (
	"bytes"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// useEvery is how old the last look at the machine gets before it is looked at again.
	useEvery = time.Second
	// useWeight is what a new look counts for in the smoothed use of the processors: a change shows to 90 % after ten looks.
	useWeight = 0.2
)

// usedShares is how much of the machine is in use, 0 to 1, whoever uses it.
type usedShares struct{ cpu, memory, disk float64 }

// meter measures the use of the machine.
type meter struct {
	dir string // on the file system that counts

	mu          sync.Mutex
	at          time.Time
	busy, total int64 // of the processors, since the machine started
	last        usedShares
}

// now returns the machine's use, which is looked at once a second at most. What cannot be read counts as unused.
func (m *meter) now() usedShares {
	m.mu.Lock()
	due := m.at.IsZero() || time.Since(m.at) >= useEvery
	if due {
		m.at = time.Now()
	}
	last := m.last
	m.mu.Unlock()
	if !due {
		return last
	}
	stat, _ := os.ReadFile("/proc/stat")
	info, _ := os.ReadFile("/proc/meminfo")
	memory, disk := memoryShare(info), diskShare(m.dir)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.processors(stat)
	m.last.memory, m.last.disk = memory, disk
	return m.last
}

// processors takes in the kernel's counts of processor time.
//
// Preconditions: the caller holds mu, or is alone.
func (m *meter) processors(stat []byte) {
	busy, total := processorTime(stat)
	passed := total - m.total
	if passed <= 0 {
		return
	}
	share := min(1, max(0, float64(busy-m.busy)/float64(passed)))
	if m.total > 0 {
		share = m.last.cpu + useWeight*(share-m.last.cpu)
	}
	m.last.cpu, m.busy, m.total = share, busy, total
}

// processorTime returns the time that all processors have worked, and what they could have, from /proc/stat; both in ticks.
// Guests' time is in the users' already.
func processorTime(stat []byte) (busy, total int64) {
	line, _, _ := bytes.Cut(stat, []byte("\n"))
	fields := strings.Fields(string(line))
	if len(fields) < 6 || fields[0] != "cpu" {
		return 0, 0
	}
	for i, f := range fields[1:min(len(fields), 9)] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil || n < 0 {
			return 0, 0
		}
		total += n
		if i != 3 && i != 4 { // idle, and idle while the disk works
			busy += n
		}
	}
	return busy, total
}

// memoryShare returns how much of the memory is in use and cannot be had back.
func memoryShare(info []byte) float64 {
	total, available := meminfoKiB(info, "MemTotal"), meminfoKiB(info, "MemAvailable")
	if total <= 0 {
		return 0
	}
	return min(1, max(0, 1-float64(available)/float64(total)))
}

// diskShare returns how much of a file system is in use.
func diskShare(dir string) float64 {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil || st.Blocks == 0 {
		return 0
	}
	return 1 - float64(st.Bavail)/float64(st.Blocks)
}

// processorFeatures returns what the kernel says that the first processor can do, from /proc/cpuinfo.
func processorFeatures(info []byte) []string {
	for line := range bytes.Lines(info) {
		name, value, ok := strings.Cut(string(line), ":")
		if name = strings.TrimSpace(name); ok && (name == "flags" || name == "Features") {
			return strings.Fields(value)
		}
	}
	return nil
}

// machineOf returns what this machine has, with the disk that a directory is on.
func machineOf(dir string) sandbox.Resources {
	info, _ := os.ReadFile("/proc/meminfo")
	r := sandbox.Resources{MilliCPU: int64(runtime.NumCPU()) * 1000, MemoryBytes: meminfoKiB(info, "MemTotal") << 10}
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err == nil {
		r.DiskBytes = int64(st.Blocks) * st.Bsize //nolint:gosec // far below 2^63
	}
	return r
}

// load returns the node's present load.
func (a *Agent) load() *agentv1.Load {
	l := a.journal.Ledger()
	return toWireLoad(&l, a.used.now())
}
