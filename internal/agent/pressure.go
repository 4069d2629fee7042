package agent

import (
	"bufio"
	"bytes"
	"os"
	"strconv"
	"strings"
	"time"
)

// When the machine counts as short of memory.
const (
	// pressurePercent of the last 10 s in which something waited for memory.
	pressurePercent = 10
	// leastAvailable is the part of the memory, in percent, that should be available.
	leastAvailable = 5
)

// MemoryPressure reports whether this machine is short of memory: programs wait for it, or hardly any is available. What
// cannot be read does not count.
func MemoryPressure() bool {
	psi, _ := os.ReadFile("/proc/pressure/memory") // absent on kernels without pressure information
	info, _ := os.ReadFile("/proc/meminfo")
	return pressed(psi, info)
}

func pressed(psi, info []byte) bool {
	if v, ok := psiAverage(psi); ok && v >= pressurePercent {
		return true
	}
	total, available := meminfoKiB(info, "MemTotal"), meminfoKiB(info, "MemAvailable")
	return total > 0 && available < total*leastAvailable/100
}

// psiAverage returns the "some avg10" of a pressure file.
func psiAverage(data []byte) (float64, bool) {
	for line := range bytes.Lines(data) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 || fields[0] != "some" {
			continue
		}
		text, ok := strings.CutPrefix(fields[1], "avg10=")
		v, err := strconv.ParseFloat(text, 64)
		return v, ok && err == nil
	}
	return 0, false
}

func meminfoKiB(data []byte, name string) int64 {
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		text, ok := strings.CutPrefix(s.Text(), name+":")
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(text, "kB")), 10, 64)
		if err == nil {
			return n
		}
	}
	return 0
}

// gauge remembers the machine's state for a second, so that a busy loop does not ask the kernel each time. Only the
// reconcile loop uses it.
type gauge struct {
	read  time.Time
	value bool
}

func (g *gauge) now(at time.Time, ask func() bool) bool {
	if at.Sub(g.read).Abs() >= time.Second {
		g.read, g.value = at, ask()
	}
	return g.value
}
