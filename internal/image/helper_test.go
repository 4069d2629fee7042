package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The test binary runs itself as a process that builds one image, so that it can be killed.
var (
	helperDir         = flag.String("helper.dir", "", "build an image in this store and exit")
	helperSource      = flag.String("helper.source", "", "from this source")
	helperBase        = flag.String("helper.base", "", "instead, compose on this image again and again")
	helperLayers      = flag.String("helper.layers", "", "with these layers")
	helperDebootstrap = flag.String("helper.debootstrap", "", "with this debootstrap")
)

func runHelper() bool {
	flag.Parse()
	if *helperDir == "" {
		return false
	}
	s, err := New(Config{Dir: *helperDir})
	if err == nil && *helperBase != "" {
		err = composeForever(s, *helperBase, strings.Split(*helperLayers, ","))
		_, _ = fmt.Fprintln(os.Stdout, "helper:", err)
		return true
	}
	if err == nil {
		fakeTools(s, *helperDebootstrap)
		_, err = s.Build(context.Background(), Request{Sources: []string{*helperSource}}, func(p Progress) {
			_, _ = fmt.Fprintln(os.Stdout, p.Message)
		})
	}
	_, _ = fmt.Fprintln(os.Stdout, "helper:", err)
	return true
}

// composeForever composes an image and removes it, until it is killed.
func composeForever(s *Store, base string, layers []string) error {
	for ctx := context.Background(); ; {
		img, err := s.Compose(ctx, base, layers, nil)
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintln(os.Stdout, img.Digest)
		if err := s.Remove(ctx, img.Digest); err != nil {
			return err
		}
	}
}

// fakeTools puts a script in place of debootstrap.
func fakeTools(s *Store, script string) {
	if script == "" {
		return
	}
	dir := filepath.Dir(script)
	s.tools = tools{debootstrap: script, keyringDir: dir, scriptDir: dir}
	s.cfg.AptDir = dir
}

// holdingRegistry stops in the middle of the first layer that it hands out.
type holdingRegistry struct {
	http.Handler
	hold    atomic.Bool
	layers  atomic.Int32
	once    sync.Once
	reached chan struct{}
	release chan struct{}
}

func (h *holdingRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !h.hold.Load() || r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
		h.Handler.ServeHTTP(w, r)
		return
	}
	rec := &recorder{header: http.Header{}}
	h.Handler.ServeHTTP(rec, r)
	if strings.HasPrefix(rec.body.String(), "{") {
		_, _ = w.Write(rec.body.Bytes()) // the configuration
		return
	}
	h.layers.Add(1)
	body := rec.body.Bytes()
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body[:len(body)/2])
	_ = http.NewResponseController(w).Flush()
	h.once.Do(func() { close(h.reached) })
	select {
	case <-h.release:
		_, _ = w.Write(body[len(body)/2:])
	case <-r.Context().Done():
	}
}

type recorder struct {
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }
func (r *recorder) WriteHeader(int)             {}

// waiting counts the callers of all builds.
func (s *Store) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, f := range s.flights {
		f.mu.Lock()
		n += len(f.callers)
		f.mu.Unlock()
	}
	return n
}

// waitFor waits for a condition that another goroutine or process brings about.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatal("it did not happen")
		}
	}
}

// startHelper runs the helper and returns its output, line by line.
func startHelper(t *testing.T, args ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewScanner(out)
}

func closeTest(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

// TestKilledInTheMiddle kills a process that unpacks a layer, and goes on with its store.
func TestKilledInTheMiddle(t *testing.T) {
	h := &holdingRegistry{Handler: quietRegistry(), reached: make(chan struct{}), release: make(chan struct{})}
	ref := push(t, serve(t, h), "app:1", testImage(t))
	h.hold.Store(true)
	s := newStore(t, nil)
	cmd, _ := startHelper(t, "-helper.dir="+s.cfg.Dir, "-helper.source="+ref)
	<-h.reached
	kill(t, cmd)
	close(h.release)
	if left, err := os.ReadDir(s.tempDir()); err != nil || len(left) == 0 {
		t.Fatalf("nothing was in the middle: %v, %v", left, err)
	}
	if all, err := s.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("a half-made image is in the cache: %v, %v", all, err)
	}
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertNoLeftovers(t, s)
	if _, err := s.Build(t.Context(), Request{Sources: []string{ref}}, nil); err != nil {
		t.Errorf("the next build: %v", err)
	}
}

func requireHosts(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the tests' own switch
		t.Fatal("this test needs root")
	}
	t.Skip("needs root")
}

// fakeDebootstrap writes a script that is called as debootstrap, and what it looks for.
func fakeDebootstrap(t *testing.T, body string) string {
	t.Helper()
	dir := t.TempDir()
	script := filepath.Join(dir, "debootstrap")
	text := "#!/bin/sh\nset -e\n" + `for arg; do mirror=$target; target=$suite; suite=$arg; done
# The last three arguments are suite, target and mirror.
eval "set -- $mirror $target $suite"; suite=$1; target=$2; mirror=$3
` + body
	if err := errors.Join(os.WriteFile(script, []byte(text), 0o700), os.WriteFile(filepath.Join(dir, "bookworm"), nil, 0o600),
		os.WriteFile(filepath.Join(dir, "debian-archive-keyring.gpg"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	return script
}

const protocol = `
P() { echo "P: $*" >&3; echo "PF: text" >&3; }
P 0 100 DOWNREL; P 100 100 DOWNREL
P 0 20971520 DOWNDEBS; P 10485760 20971520; P 20971520 20971520 DOWNDEBS
P 1 2 UNPACKBASE; P 2 2 UNPACKBASE; P 2 2 CONFBASE
mkdir -p "$target/etc" "$target/var/cache/apt/archives" "$target/var/lib/dpkg"
echo deb > "$target/var/cache/apt/archives/a.deb"
echo old > "$target/etc/apt-was-here"; touch "$target/var/lib/dpkg/status"
`

func TestDebianSource(t *testing.T) {
	requireHosts(t)
	cache := t.TempDir()
	if err := unix.Mount("none", cache, "tmpfs", 0, ""); err != nil { // another file system than the store's
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(cache, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s := newStore(t, func(c *Config) { c.CacheDir = cache })
	count := filepath.Join(t.TempDir(), "count")
	fakeTools(s, fakeDebootstrap(t, "echo run >> "+count+protocol))
	var said []string
	req := Request{Sources: []string{"debian:bookworm"}}
	img, err := s.Build(t.Context(), req, func(p Progress) { said = append(said, p.Message) })
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(said, "\n")
	for _, want := range []string{
		"bootstrapping bookworm from " + defaultMirror, "downloading packages: 10 of 20 MiB", "unpacking packages: 1 of 2",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the progress does not say %q:\n%s", want, text)
		}
	}
	have := strings.Join(paths(t, s, img.Digest), "\n")
	if strings.Contains(have, "a.deb") || !strings.Contains(have, "/etc/apt/sources.list.d/debian.sources") {
		t.Errorf("paths:\n%s", have)
	}
	if diff := cmp.Diff(2, len(img.Config.Env)); diff != "" {
		t.Errorf("environment %v", img.Config.Env)
	}

	again, err := s.Build(t.Context(), req, nil)
	if err != nil || again.Digest != img.Digest {
		t.Errorf("the cached tree gives %s, %v; want %s", again.Digest, err, img.Digest)
	}
	if runs := strings.Count(readAll(t, count), "run"); runs != 1 {
		t.Errorf("debootstrap ran %d times, want once", runs)
	}

	s.cfg.CacheAge = time.Nanosecond
	fakeTools(s, fakeDebootstrap(t, "echo broken mirror; exit 1\n"))
	said = nil
	old, err := s.Build(t.Context(), req, func(p Progress) { said = append(said, p.Message) })
	if err != nil || old.Digest != img.Digest {
		t.Errorf("an old tree gives %s, %v; want %s", old.Digest, err, img.Digest)
	}
	if text := strings.Join(said, "\n"); !strings.Contains(text, "using the tree of") {
		t.Errorf("the progress does not say that the tree is old:\n%s", text)
	}
	assertNoLeftovers(t, s)
}

func TestDebianSourceFails(t *testing.T) {
	requireHosts(t)
	s := newStore(t, nil)
	fakeTools(s, fakeDebootstrap(t, `echo "W: dpkg said no" ; { echo "E: BAD"; echo "EA: apt"; echo "EF: could not get %s"; } >&3; exit 7`+"\n"))
	_, err := s.Build(t.Context(), Request{Sources: []string{"debian:bookworm"}}, nil)
	if !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	for _, want := range []string{"could not get apt", "dpkg said no", "exit status 7"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	if _, err := s.Build(t.Context(), Request{Sources: []string{"debian:nosuch"}}, nil); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("an unknown suite: %v", err)
	}
	s.tools.keyringDir = "/nowhere"
	if _, err := s.Build(t.Context(), Request{Sources: []string{"debian:bookworm"}}, nil); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("no keys: %v", err)
	}
	assertNoLeftovers(t, s)
}

// TestKilledBootstrap kills a process while its debootstrap has mounts and children: nothing of them may stay.
func TestKilledBootstrap(t *testing.T) {
	requireHosts(t)
	s := newStore(t, nil)
	lock := filepath.Join(t.TempDir(), "lock")
	script := fakeDebootstrap(t, `mkdir -p "$target/proc"; mount -t tmpfs none "$target/proc"
exec 9>`+lock+`; flock 9
echo "W: READY" >&3; echo "WF: ready" >&3
sleep 1000 & wait
`)
	cmd, out := startHelper(t, "-helper.dir="+s.cfg.Dir, "-helper.source=debian:bookworm", "-helper.debootstrap="+script)
	for out.Scan() && out.Text() != "ready" {
		if strings.HasPrefix(out.Text(), "helper:") {
			t.Fatal(out.Text())
		}
	}
	kill(t, cmd)
	f, err := os.Open(lock)
	if err != nil {
		t.Fatal(err)
	}
	defer closeTest(t, f)
	waitFor(t, func() bool { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil })
	if points := mountsBelow(readAll(t, "/proc/self/mountinfo"), s.cfg.Dir); len(points) != 0 {
		t.Errorf("mounts are left: %v", points)
	}
	if err := s.Recover(t.Context()); err != nil {
		t.Error(err)
	}
	assertNoLeftovers(t, s)
}

// TestCancelledBootstrap ends a build whose debootstrap has children.
func TestCancelledBootstrap(t *testing.T) {
	requireHosts(t)
	s := newStore(t, nil)
	fakeTools(s, fakeDebootstrap(t, `echo "W: READY" >&3; echo "WF: ready" >&3; sleep 1000 & wait`+"\n"))
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := s.Build(ctx, Request{Sources: []string{"debian:bookworm"}}, func(p Progress) {
		if p.Message == "ready" {
			cancel(errGone)
		}
	})
	if !errors.Is(err, errGone) {
		t.Errorf("got %v", err)
	}
	assertNoLeftovers(t, s)
}

// TestRecoverUnmounts leaves a mount where an older version of the program could have.
func TestRecoverUnmounts(t *testing.T) {
	requireHosts(t)
	s := newStore(t, nil)
	point := filepath.Join(s.tempDir(), "build-x", "root", "proc dir")
	if err := os.MkdirAll(point, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", point, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(point, unix.MNT_DETACH) })
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertNoLeftovers(t, s)
}
