// Package harness starts the real binary for tests: each daemon with its own data directory, ports and address range.
//
// It needs root. Everything that a test's daemon owns is purged when the test ends, also when it fails.
package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

// startTimeout bounds a first start, which builds a template from packages of the distribution.
const startTimeout = 15 * time.Minute

// Root returns the root of the source tree.
func Root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Binary returns the path of the built program: bin/cloister, or what TEST_BINARY names.
func Binary(tb testing.TB) string {
	tb.Helper()
	path := os.Getenv("TEST_BINARY") //nolint:forbidigo // another build, where bin/ is somebody else's
	if path == "" {
		path = filepath.Join(Root(), "bin", "cloister")
	}
	if _, err := os.Stat(path); err != nil { //nolint:gosec // the caller's own choice
		tb.Fatalf("%v: run `make build` first", err)
	}
	return path
}

// NeedRoot skips the test without root, and fails it where REQUIRE_HOSTS=1 says that it must run.
func NeedRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the switch of the tests themselves
		tb.Fatal("this test needs root")
	}
	tb.Skip("this test needs root")
}

// Daemon is one `cloister up` of a test.
type Daemon struct {
	Dir, APIURL, ProxyURL string
	// Key is the admin key; set once the daemon was ready.
	Key string
	// Flags are those that each start gets.
	Flags []string

	tb     testing.TB
	binary string
	cmd    *exec.Cmd
	log    string
}

// ranges counts the address ranges that this test process has handed out.
var ranges atomic.Int32 //nolint:gochecknoglobals // unique within the process

// New prepares a daemon without starting it. The extra flags come after the harness's own and win over them.
func New(tb testing.TB, flags ...string) *Daemon {
	tb.Helper()
	NeedRoot(tb)
	dir, err := os.MkdirTemp("/var/tmp", "cloister-test-") //nolint:usetesting // on a disk: /tmp may be memory
	if err != nil {
		tb.Fatal(err)
	}
	api, proxy := freeAddr(tb), freeAddr(tb)
	d := &Daemon{Dir: dir, APIURL: "http://" + api, ProxyURL: "http://" + proxy, tb: tb, binary: Binary(tb), log: filepath.Join(dir, "test.log")}
	n := int(ranges.Add(1)) + os.Getpid()*7
	d.Flags = append([]string{
		"--data-dir", filepath.Join(dir, "data"), "--api-addr", api, "--proxy-addr", proxy,
		"--network-range", fmt.Sprintf("10.%d.%d.0/20", 128+n%64, n/64%16*16),
		"--cache-dir", cacheDir(tb), "--base-sources", "debian:bookworm", "--log-level", "debug",
	}, flags...)
	tb.Cleanup(d.purge)
	return d
}

// cacheDir outlives the tests: what it holds is fetched from the distribution once.
func cacheDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = "/var/cache"
	}
	return filepath.Join(dir, "cloister")
}

// Start returns a ready daemon.
func Start(tb testing.TB, flags ...string) *Daemon {
	tb.Helper()
	d := New(tb, flags...)
	d.Up()
	return d
}

// DataDir is the daemon's data directory.
func (d *Daemon) DataDir() string { return filepath.Join(d.Dir, "data") }

// PID is the running daemon's process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Up starts the daemon and waits until it is ready.
func (d *Daemon) Up() {
	d.tb.Helper()
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.tb.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	out, in, err := os.Pipe()
	if err != nil {
		d.tb.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	d.cmd = exec.Command(d.binary, append([]string{"up", "-o", "json"}, d.Flags...)...) //nolint:gosec,noctx // our own binary, which outlives the call
	d.cmd.Stdout, d.cmd.Stderr = in, log
	if err := d.cmd.Start(); err != nil {
		d.tb.Fatal(err)
	}
	_ = in.Close()
	timer := time.AfterFunc(startTimeout, func() { _ = d.cmd.Process.Kill() })
	defer timer.Stop()
	var ready struct {
		KeyFile string `json:"key_file"`
	}
	if err := json.NewDecoder(out).Decode(&ready); err != nil {
		_ = d.cmd.Wait()
		d.tb.Fatalf("the daemon did not become ready: %v\n%s", err, d.Log())
	}
	key, err := os.ReadFile(ready.KeyFile)
	if err != nil {
		d.tb.Fatal(err)
	}
	d.Key = strings.TrimSpace(string(key))
}

// Running reports whether the daemon was started and not stopped again through this value.
func (d *Daemon) Running() bool { return d.cmd != nil }

// Signal sends the daemon a signal and waits until it has ended.
func (d *Daemon) Signal(sig os.Signal) {
	d.tb.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil {
		d.tb.Fatal(err)
	}
	_ = d.cmd.Wait() // how it ended is the test's business
	d.cmd = nil
}

// Log is the end of what the daemon has logged.
func (d *Daemon) Log() string {
	const most = 64 << 10
	text, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	return string(text[max(len(text)-most, 0):])
}

// Client returns a client with the admin key.
func (d *Daemon) Client() *client.Client {
	return client.New(d.APIURL, d.Key)
}

// CLI runs the command line against the daemon and returns its standard output and exit code.
func (d *Daemon) CLI(ctx context.Context, args ...string) (string, int) {
	d.tb.Helper()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, d.binary, append([]string{"--data-dir", d.DataDir()}, args...)...) //nolint:gosec // our own binary
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if cmd.ProcessState == nil {
		d.tb.Fatalf("run cloister %v: %v", args, err)
	}
	if errOut.Len() > 0 {
		d.tb.Logf("cloister %v: %s", args, errOut.Bytes())
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// Env is the environment that points the E2B packages at the daemon.
func (d *Daemon) Env() []string {
	return append(os.Environ(), "E2B_API_URL="+d.APIURL, "E2B_SANDBOX_URL="+d.ProxyURL, "E2B_API_KEY="+d.Key,
		"CLOISTER_BINARY="+d.binary, "CLOISTER_DATA_DIR="+d.DataDir())
}

func (d *Daemon) purge() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if d.tb.Failed() {
		d.tb.Logf("the daemon's log ends:\n%s", d.Log())
	}
	args := append([]string{"down", "--purge"}, d.Flags...)
	if out, err := exec.CommandContext(ctx, d.binary, args...).CombinedOutput(); err != nil { //nolint:gosec // our own binary
		d.tb.Errorf("purge: %v\n%s", err, out)
	}
	if d.cmd != nil {
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait()
	}
	if err := os.RemoveAll(d.Dir); err != nil {
		d.tb.Error(err)
	}
}

// freeAddr returns a loopback address that nothing listens on now.
func freeAddr(tb testing.TB) string {
	tb.Helper()
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}
