package gvisor

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// needHost skips a test that this machine cannot run, or fails it where a machine that can was promised.
func needHost(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // a setting of test runs alone
		tb.Fatal("needs root")
	}
	tb.Skip("needs root")
}

// times is for long runs, such as go test ./internal/engine/gvisor -run 'ManySaves|LongLife' -timeout 1h -times 200.
var times = flag.Int("times", 1, "how many times as often the tests repeat that look for what is lost little by little")

// place is where the engines of one test keep their guests.
type place struct {
	root, scratch, saves, parent string
	exe                          string // the sentry's program; empty means the tests' own where it can be
}

func newPlace(tb testing.TB) place {
	tb.Helper()
	return newPlaceIn(tb, "")
}

// newPlaceIn makes a place below a directory; empty means the usual one.
func newPlaceIn(tb testing.TB, parent string) place {
	tb.Helper()
	needHost(tb)
	dir, err := os.MkdirTemp(parent, "gv") //nolint:usetesting // its end has to be after Purge, and its path short
	if err != nil {
		tb.Fatal(err)
	}
	p := place{
		root: filepath.Join(dir, "run"), scratch: filepath.Join(dir, "disk"), saves: filepath.Join(dir, "saves"),
		parent: "cloister-test-" + string(sandbox.NewNodeID()),
	}
	for _, sub := range []string{p.scratch, p.saves} {
		if err := os.Mkdir(sub, 0o700); err != nil {
			tb.Fatal(err)
		}
	}
	tb.Cleanup(func() {
		if err := p.open(tb).Purge(context.Background()); err != nil {
			tb.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	return p
}

func (p place) config(tb testing.TB) Config {
	tb.Helper()
	c := Config{Root: p.root, CgroupParent: p.parent, ExePath: p.exe}
	if ownSentry() {
		c.ExePath = built(tb, "sentry")
	}
	return c
}

func (p place) open(tb testing.TB) *Engine {
	tb.Helper()
	e, err := New(p.config(tb))
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

// spec returns a guest of the usual size that runs the test program with args.
func (p place) spec(tb testing.TB, args ...string) engine.Spec {
	tb.Helper()
	return engine.Spec{
		ID: sandbox.NewID("testno"), RootFS: guestImage(tb), ScratchDir: p.scratch,
		Args:   append([]string{"/guest"}, args...),
		Limits: sandbox.Resources{MilliCPU: 1500, MemoryBytes: 512 << 20, DiskBytes: 1 << 30},
	}
}

func testContext(tb testing.TB) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	tb.Cleanup(cancel)
	return ctx
}

// helperArg is the only argument of a process that starts a guest for a test.
const helperArg = "start-elsewhere"

// help is what a process of its own does for a test: it starts a guest, or saves one.
type help struct {
	Config Config
	Spec   engine.Spec
	ID     sandbox.ID
	Save   *engine.SaveSpec
}

func (h help) do(e *Engine) error {
	if h.Save == nil {
		return e.Start(context.Background(), h.Spec)
	}
	_, err := e.Save(context.Background(), h.ID, *h.Save)
	return err
}

// maybeHelper runs what the tests start in a process of its own: it does what standard input says, says so, and waits to be
// killed.
func maybeHelper() {
	if len(os.Args) != 2 || os.Args[1] != helperArg {
		return
	}
	var in help
	failed := make(chan error)
	go func() {
		if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
			failed <- err
			return
		}
		e, err := New(in.Config)
		if err != nil {
			failed <- err
			return
		}
		if err := in.do(e); err != nil {
			failed <- err
			return
		}
		_, _ = fmt.Fprintln(os.Stdout, "started") // the test sees that it is missing
	}()
	_, _ = fmt.Fprintln(os.Stdout, <-failed) // as above
	os.Exit(1)                               //nolint:forbidigo // called by TestMain
}

// await repeats until done.
func await(tb testing.TB, what string, done func() bool) {
	tb.Helper()
	ctx := testContext(tb)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			tb.Fatalf("waited in vain: %s", what)
		case <-tick.C:
		}
	}
}
