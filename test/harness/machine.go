package harness

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

// Machine is one machine of a lab: a network of its own, a data directory, and the daemon that is started there. Processes
// and files are those of the machine that the test runs on.
type Machine struct {
	Name string
	// Addr is where the others see it.
	Addr netip.Addr
	// Dir holds its data directory and its daemon's log.
	Dir string
	// Ready is what the daemon said when it was ready.
	Ready Ready
	// Started, unless nil, is called with the process of each daemon as soon as that is there.
	Started func(pid int)

	lab    *Lab
	binary string
	cmd    *exec.Cmd
	starts [][]string
}

// Ready is the part of a daemon's first words that tests use.
type Ready struct {
	KeyFile string         `json:"key_file"`
	Member  *client.Member `json:"member"`
}

// labMark is the variable by which a machine's processes are known, whatever becomes of their parents.
const labMark = "CLOISTER_LAB_MACHINE="

// DataDir is the machine's data directory.
func (m *Machine) DataDir() string { return filepath.Join(m.Dir, "data") }

// settings are those that every start gets. Sandboxes of every machine have a range of their own, so that a packet that
// strays is seen.
func (m *Machine) settings() []string {
	return []string{
		"--data-dir", m.DataDir(), "--cache-dir", cacheDir(m.lab.tb), "--node-name", m.Name,
		"--network-range", fmt.Sprintf("10.%d.0.0/20", 140+int(m.Addr.As4()[3])), "--log-level", "debug",
		"--proxy-drain-delay", "0s",
	}
}

// Start runs a command that is a daemon, such as up or node, and waits until it is ready. Later flags win over earlier ones.
func (m *Machine) Start(args ...string) {
	m.lab.tb.Helper()
	m.starts = append(m.starts, args)
	log, err := os.OpenFile(m.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		m.lab.tb.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	out, in, err := os.Pipe()
	if err != nil {
		m.lab.tb.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	full := append(append([]string{args[0], "-o", "json"}, m.settings()...), args[1:]...)
	m.cmd = exec.Command(m.binary, full...) //nolint:gosec,noctx // our own binary, which outlives the call
	m.cmd.Stdout, m.cmd.Stderr, m.cmd.Env = in, log, append(os.Environ(), labMark+m.Dir)
	err = m.lab.inside(m.Name, m.cmd.Start)
	_ = in.Close()
	if err != nil {
		m.lab.tb.Fatal(err)
	}
	if m.Started != nil {
		m.Started(m.PID())
	}
	timer := time.AfterFunc(startTimeout, func() { _ = m.cmd.Process.Kill() })
	defer timer.Stop()
	m.Ready = Ready{}
	if err := json.NewDecoder(out).Decode(&m.Ready); err != nil {
		_ = m.cmd.Wait()
		m.cmd = nil
		m.lab.tb.Fatalf("%s: cloister %s did not become ready: %v\n%s", m.Name, strings.Join(args, " "), err, m.Log())
	}
}

// Again starts what was started last with the same arguments, and more.
func (m *Machine) Again(more ...string) {
	m.lab.tb.Helper()
	m.Start(slices.Concat(m.starts[len(m.starts)-1], more)...)
}

// Upgrade starts what was started last from a program of the machine's own, as after its file was replaced.
func (m *Machine) Upgrade() {
	m.lab.tb.Helper()
	to := filepath.Join(m.Dir, "cloister-new")
	raw, err := os.ReadFile(m.binary)
	if err == nil {
		err = os.WriteFile(to, raw, 0o755) //nolint:gosec // a program
	}
	if err != nil {
		m.lab.tb.Fatal(err)
	}
	m.binary = to
	m.Again()
}

// Running reports whether the machine's daemon was started and not stopped again through this value.
func (m *Machine) Running() bool { return m.cmd != nil }

// PID is the running daemon's process id.
func (m *Machine) PID() int { return m.cmd.Process.Pid }

// LogLines returns the lines that the machine's daemons have logged and that contain text, the last of them where there are
// more than most.
func (m *Machine) LogLines(text string, most int) []string {
	f, err := os.Open(m.logFile())
	if err != nil {
		return []string{err.Error()}
	}
	defer func() { _ = f.Close() }()
	var found []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.Contains(lines.Text(), text) {
			found = append(found, lines.Text())
		}
	}
	return found[max(len(found)-most, 0):]
}

func (m *Machine) logFile() string { return filepath.Join(m.Dir, "test.log") }

// Log is the end of what the machine's daemons have logged, without the details.
func (m *Machine) Log() string {
	const most = 32 << 10
	text, err := os.ReadFile(m.logFile())
	if err != nil {
		return err.Error()
	}
	var kept []byte
	for line := range bytes.Lines(text) {
		if !bytes.Contains(line, []byte(`"level":"DEBUG"`)) {
			kept = append(kept, line...)
		}
	}
	return string(kept[max(len(kept)-most, 0):])
}

// Signal sends the daemon a signal and waits until it has ended; its sandboxes go on.
func (m *Machine) Signal(sig os.Signal) {
	m.lab.tb.Helper()
	if err := m.cmd.Process.Signal(sig); err != nil {
		m.lab.tb.Fatal(err)
	}
	_ = m.cmd.Wait() // how it ended is the test's business
	m.cmd = nil
}

// Kill ends everything that runs in the machine at once, sandboxes too, as a power failure does.
func (m *Machine) Kill() {
	m.lab.tb.Helper()
	end(m.lab.tb, m.Dir)
	if m.cmd != nil {
		_ = m.cmd.Wait() // it was killed
		m.cmd = nil
	}
}

// end kills everything of a machine and waits until it is gone: also what was being started, and what takes time to end.
func end(tb testing.TB, dir string) {
	tb.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		left := processesOf(dir)
		if len(left) == 0 {
			return
		}
		killAll(left, syscall.SIGKILL)
		select {
		case <-tick.C:
		case <-deadline.C:
			tb.Errorf("processes of %s do not end: %v", dir, left)
			return
		}
	}
}

// Stop makes everything that runs in the machine stand still: connections stay, nobody answers.
func (m *Machine) Stop() {
	m.lab.tb.Helper()
	pids := processesOf(m.Dir)
	killAll(pids, syscall.SIGSTOP)
	// The signal takes effect when the kernel comes to it; until then an answer may go out.
	for end := time.Now().Add(stopTimeout); slices.ContainsFunc(pids, running); {
		if time.Now().After(end) {
			m.lab.tb.Fatalf("%s: its processes do not stop", m.Name)
		}
		<-time.After(time.Millisecond)
	}
}

// stopTimeout bounds the wait for processes that were told to stop.
const stopTimeout = 10 * time.Second

// running reports whether a process is there and one of its threads does not stand still.
func running(pid int) bool {
	stats, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task", "*", "stat"))
	if err != nil {
		return false
	}
	return slices.ContainsFunc(stats, func(path string) bool {
		stat, err := os.ReadFile(path) //nolint:gosec // below /proc
		if err != nil {
			return false
		}
		// The state follows the name, which is in parentheses and may hold anything.
		state := bytes.TrimSpace(stat[bytes.LastIndexByte(stat, ')')+1:])
		return len(state) > 0 && !bytes.ContainsAny(state[:1], "TtZX")
	})
}

// Cont lets everything go on that Stop has stopped.
func (m *Machine) Cont() { killAll(processesOf(m.Dir), syscall.SIGCONT) }

// Client returns a client of the machine's daemon through its local socket.
func (m *Machine) Client() *client.Client {
	return client.NewLocal(filepath.Join(m.DataDir(), "cloister.sock"))
}

// CLI runs the command line in the machine and returns its standard output and exit code.
func (m *Machine) CLI(ctx context.Context, args ...string) (string, int) {
	m.lab.tb.Helper()
	return m.Run(ctx, m.binary, append([]string{"--data-dir", m.DataDir()}, args...)...)
}

// Run runs a program in the machine and returns its standard output and exit code.
func (m *Machine) Run(ctx context.Context, name string, args ...string) (string, int) {
	m.lab.tb.Helper()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // the test's own command
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &errOut, append(os.Environ(), labMark+m.Dir)
	if err := m.lab.inside(m.Name, cmd.Start); err != nil {
		m.lab.tb.Fatalf("%s: run %s: %v", m.Name, name, err)
	}
	_ = cmd.Wait() // the exit code tells
	if errOut.Len() > 0 {
		m.lab.tb.Logf("%s: %s %v: %s", m.Name, filepath.Base(name), args, errOut.Bytes())
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// Dial connects from the machine to an address, which must be numeric.
func (m *Machine) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	var c net.Conn
	err := m.lab.inside(m.Name, func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens in the machine.
func (m *Machine) Listen(ctx context.Context, address string) (net.Listener, error) {
	var l net.Listener
	err := m.lab.inside(m.Name, func() (err error) {
		l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		return err
	})
	return l, err
}

// HTTP returns a client that dials from the machine; host names are not looked up. Its idle connections are the caller's to
// close.
func (m *Machine) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: m.Dial}}
}

// remove ends the machine and removes its files.
func (m *Machine) remove() {
	tb := m.lab.tb
	if tb.Failed() {
		tb.Logf("the log of %s ends:\n%s", m.Name, m.Log())
	}
	m.Kill()
	if err := m.lab.inside(m.Name, func() error { purge(tb, m.Dir); return nil }); err != nil {
		tb.Errorf("purge %s: %v", m.Name, err)
	}
}

// purge removes what the daemon of a machine's directory owns, and the directory. The daemon is not running.
func purge(tb testing.TB, dir string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	data := filepath.Join(dir, "data")
	if _, err := os.Stat(data); err == nil {
		cmd := exec.CommandContext(ctx, Binary(tb), "down", "--purge", "--data-dir", data) //nolint:gosec // our own binary
		if out, err := cmd.CombinedOutput(); err != nil {
			tb.Errorf("purge %s: %v\n%s", data, err, out)
		}
	}
	unmount(tb, data)
	if err := os.RemoveAll(dir); err != nil {
		tb.Error(err)
	}
}

// processesOf returns the processes of a machine by its directory: those that were started with its mark, and those that have
// the directory among their arguments, as sandboxes do, whose environment is their own.
func processesOf(dir string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		environ, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ")) // empty where the process has gone
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline")) // likewise
		if bytes.Contains(environ, []byte(labMark+dir+"\x00")) || bytes.Contains(cmdline, []byte(dir+"/")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func killAll(pids []int, sig syscall.Signal) {
	for _, pid := range pids {
		_ = syscall.Kill(pid, sig) // it may have ended by itself
	}
}
