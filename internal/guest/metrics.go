package guest

import (
	"bytes"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ticksPerSecond is USER_HZ, in which /proc counts processor time on every architecture we run on.
const ticksPerSecond = 100

const mib = 1 << 20

// metricsReport is the body of GET /metrics.
type metricsReport struct {
	Timestamp  int64   `json:"ts"`
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"`
	MemTotal   uint64  `json:"mem_total"`
	MemUsed    uint64  `json:"mem_used"`
	MemCache   uint64  `json:"mem_cache"`
	MemTotalMi uint64  `json:"mem_total_mib"`
	MemUsedMi  uint64  `json:"mem_used_mib"`
	DiskUsed   uint64  `json:"disk_used"`
	DiskTotal  uint64  `json:"disk_total"`
}

func (s *Server) getMetrics(w http.ResponseWriter, _ *http.Request) {
	now := time.Now()
	m := metricsReport{Timestamp: now.Unix(), CPUCount: runtime.NumCPU(), CPUUsedPct: s.cpu.percent(now)}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		m.MemTotal, m.MemUsed, m.MemCache = parseMeminfo(string(text))
		m.MemTotalMi, m.MemUsedMi = m.MemTotal/mib, m.MemUsed/mib
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(s.cfg.Root, &disk); err == nil {
		block := uint64(disk.Bsize) //nolint:gosec // A block size is positive.
		m.DiskTotal, m.DiskUsed = disk.Blocks*block, (disk.Blocks-disk.Bfree)*block
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, m)
}

// parseMeminfo returns bytes.
func parseMeminfo(text string) (total, used, cache uint64) {
	kib := map[string]uint64{}
	for line := range strings.Lines(text) {
		name, rest, _ := strings.Cut(line, ":")
		if fields := strings.Fields(rest); len(fields) > 0 {
			kib[name], _ = strconv.ParseUint(fields[0], 10, 64)
		}
	}
	available, ok := kib["MemAvailable"]
	if !ok {
		available = kib["MemFree"] + kib["Buffers"] + kib["Cached"]
	}
	if total = kib["MemTotal"]; total > available {
		used = total - available
	}
	return total << 10, used << 10, kib["Cached"] << 10
}

// cpuMeter turns counters into the share of the processors that was used between two calls.
type cpuMeter struct {
	mu   sync.Mutex
	at   time.Time
	busy time.Duration
	last float64
}

// minCPUWindow is the shortest time over which a share means anything; a call sooner repeats the last answer.
const minCPUWindow = 100 * time.Millisecond

// percent is 100 for all processors busy. The first call covers the time since boot.
func (m *cpuMeter) percent(now time.Time) float64 {
	busy, uptime := cpuBusy()
	m.mu.Lock()
	defer m.mu.Unlock()
	window, used := uptime, busy
	if !m.at.IsZero() {
		window, used = now.Sub(m.at), busy-m.busy
	}
	if window < minCPUWindow {
		return m.last
	}
	m.at, m.busy = now, busy
	m.last = min(max(0, 100*float64(used)/float64(window)/float64(runtime.NumCPU())), 100)
	return m.last
}

// cpuBusy returns the processor time used since boot. Where the kernel keeps no such count (gVisor), it is what all
// living processes and the children they waited for have used, which misses little: process 1 waits for the rest.
func cpuBusy() (busy, uptime time.Duration) {
	if text, err := os.ReadFile("/proc/uptime"); err == nil {
		first, _, _ := strings.Cut(string(text), " ")
		seconds, _ := strconv.ParseFloat(first, 64)
		uptime = time.Duration(seconds * float64(time.Second))
	}
	text, _ := os.ReadFile("/proc/stat")
	line, _, _ := bytes.Cut(text, []byte("\n"))
	if ticks := busyTicks(strings.Fields(string(line))); ticks > 0 {
		return ticksToDuration(ticks), uptime
	}
	var ticks uint64
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		if text, err := os.ReadFile(path); err == nil { //nolint:gosec // A file of /proc.
			ticks += processTicks(string(text))
		}
	}
	return ticksToDuration(ticks), uptime
}

// busyTicks reads the first line of /proc/stat: all but idle and waiting for disks.
func busyTicks(fields []string) (ticks uint64) {
	for i, f := range fields {
		if i >= 1 && i <= 8 && i != 4 && i != 5 {
			n, _ := strconv.ParseUint(f, 10, 64)
			ticks += n
		}
	}
	return ticks
}

// processTicks reads utime, stime, cutime and cstime of /proc/<pid>/stat; the name before them may hold anything.
func processTicks(stat string) (ticks uint64) {
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return 0
	}
	fields := strings.Fields(stat[i+1:])
	for _, at := range []int{11, 12, 13, 14} {
		if at < len(fields) {
			n, _ := strconv.ParseUint(fields[at], 10, 64)
			ticks += n
		}
	}
	return ticks
}

func ticksToDuration(ticks uint64) time.Duration {
	return time.Duration(ticks) * time.Second / ticksPerSecond //nolint:gosec // Centuries of processor time.
}
