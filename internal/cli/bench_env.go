package cli

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/daemon"
)

// environment is the machine that figures were measured on.
type environment struct {
	Time    time.Time `json:"time"`
	Version string    `json:"version"`
	CPU     string    `json:"cpu"`
	Cores   int       `json:"cores"`
	Memory  int64     `json:"memory_bytes"`
	Kernel  string    `json:"kernel"`
	Load    string    `json:"load"`
}

func (e environment) String() string {
	return fmt.Sprintf("%s, %d cores, %s, Linux %s, load %s, cloister %s, %s",
		e.CPU, e.Cores, size(e.Memory), e.Kernel, e.Load, e.Version, e.Time.Format(time.RFC3339))
}

func readEnvironment() environment {
	e := environment{Time: time.Now().UTC().Truncate(time.Second), Version: version, Cores: runtime.NumCPU(), CPU: "unknown processor"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		e.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		e.Memory = int64(info.Totalram) * int64(info.Unit) //nolint:gosec // no machine has 2^63 bytes
	}
	e.CPU = cpuModel(e.CPU)
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		e.Load = strings.Join(strings.Fields(string(text))[:3], " ")
	}
	return e
}

func cpuModel(unknown string) string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return unknown
	}
	for sc := bufio.NewScanner(bytes.NewReader(text)); sc.Scan(); {
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return unknown
}

// processGroup is the host processes that are one sandbox.
type processGroup []int

// pss is the proportional memory of the group in bytes; processes that have ended count nothing.
func (g processGroup) pss() int64 {
	var sum int64
	for _, pid := range g {
		sum += procField(pid, "smaps_rollup", "Pss:")
	}
	return sum
}

// cpuTime is the processor time that the group's threads have used, to the nanosecond.
func (g processGroup) cpuTime() time.Duration {
	var sum int64
	for _, pid := range g {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil {
			continue
		}
		for _, name := range threads {
			text, err := os.ReadFile(name) //nolint:gosec // a file of the kernel's
			if fields := strings.Fields(string(text)); err == nil && len(fields) > 0 {
				n, _ := strconv.ParseInt(fields[0], 10, 64) // the kernel writes numbers
				sum += n
			}
		}
	}
	return time.Duration(sum)
}

// procField returns a "Name: N kB" field of a /proc file in bytes, or 0.
func procField(pid int, file, name string) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64) // the kernel writes numbers
			return n << 10
		}
	}
	return 0
}

// daemonMemory is the resident memory of the daemon of a data directory in bytes, or 0.
func daemonMemory(dataDir string) int64 {
	h, held := daemon.HolderOf(dataDir)
	if !held {
		return 0
	}
	return procField(h.PID, "status", "VmRSS:")
}

// sandboxProcesses finds the processes of each sandbox of a data directory: the sentry, which names the directory and
// the sandbox in its command line, and everything below it.
func sandboxProcesses(dataDir string) (map[string]processGroup, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	roots := map[int]string{}
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if parent := procParent(pid); parent > 0 {
			children[parent] = append(children[parent], pid)
		}
		if id := sentryOf(pid, dataDir); id != "" {
			roots[pid] = id
		}
	}
	out := map[string]processGroup{}
	for pid, id := range roots {
		out[id] = append(out[id], below(pid, children)...)
	}
	return out, nil
}

func below(pid int, children map[int][]int) []int {
	all := []int{pid}
	for _, c := range children[pid] {
		all = append(all, below(c, children)...)
	}
	return all
}

func procParent(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	ppid, _ := strconv.Atoi(fields[1]) // the kernel writes a number
	return ppid
}

// sentryOf returns the sandbox that a process is the sentry of, or "".
func sentryOf(pid int, dataDir string) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	args := strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
	if filepath.Base(args[0]) != "runsc-sandbox" || !strings.Contains(string(text), filepath.Clean(dataDir)+"/node/") {
		return ""
	}
	return args[len(args)-1] // the engine gives the id last
}
