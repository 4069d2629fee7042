package gvisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/erofs/go-erofs"
	"gvisor.dev/gvisor/runsc/config"
)

// The engine takes the main thread's network namespace as the machine's.
func init() { runtime.LockOSThread() } //nolint:gochecknoinits // before the main goroutine can move

func TestMain(m *testing.M) {
	Maybe()
	maybeHelper()
	code := make(chan int)
	go func() { code <- m.Run() }()
	c := <-code
	if buildDir != "" {
		_ = os.RemoveAll(buildDir)
	}
	os.Exit(c) //nolint:forbidigo // this is the tests' main
}

// buildDir holds what the tests build, for the whole run; errBuild is why it could not be built.
var (
	buildOnce sync.Once
	buildDir  string
	errBuild  error
)

// built returns the path of something that the tests build.
func built(tb testing.TB, name string) string {
	tb.Helper()
	buildOnce.Do(func() {
		buildDir, errBuild = os.MkdirTemp("", "gvisor-test-") //nolint:usetesting // for all tests
		if errBuild != nil {
			return
		}
		if errBuild = buildImage(buildDir); errBuild == nil && ownSentry() {
			errBuild = goBuild(filepath.Join(buildDir, "sentry"), "./testdata/sentry")
		}
		if errBuild == nil {
			errBuild = os.Chmod(buildDir, 0o755) // the sentry's user must reach its binary
		}
	})
	if errBuild != nil {
		tb.Fatal(errBuild)
	}
	return filepath.Join(buildDir, name)
}

// ownSentry reports whether this test binary cannot be a sentry.
func ownSentry() bool { return raceEnabled || config.CgoEnabled }

func goBuild(out, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", pkg, err, msg)
	}
	return nil
}

// guestImage returns a root file system that holds /guest alone.
func guestImage(tb testing.TB) string {
	tb.Helper()
	return built(tb, "root.erofs")
}

func addFile(w *erofs.Writer, name string, content []byte) error {
	f, err := w.Create(name)
	if err != nil {
		return err
	}
	if _, err := f.Write(content); err != nil {
		return err
	}
	if err := f.Chmod(0o755); err != nil {
		return err
	}
	return f.Close()
}

func buildImage(dir string) error {
	bin := os.Getenv("GVISOR_TEST_GUEST") //nolint:forbidigo // built before, for a machine that cannot build
	if bin == "" {
		bin = filepath.Join(dir, "guest")
		if err := goBuild(bin, "./testdata/guest"); err != nil {
			return err
		}
	}
	raw, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(dir, "root.erofs"))
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }() // the image is checked by its use
	w := erofs.Create(out)
	for _, d := range []string{"/proc", "/dev", "/sys", "/tmp", "/etc", "/srv", "/srv/d"} {
		if err := w.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	for name, content := range map[string][]byte{
		"/guest": raw, "/etc/keep": []byte("keep"), "/etc/gone": []byte("gone"), "/srv/d/old": []byte("old"),
	} {
		if err := addFile(w, name, content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	st, err := out.Stat()
	if err != nil {
		return err
	}
	const block = 4096
	return out.Truncate((st.Size() + block - 1) / block * block)
}
