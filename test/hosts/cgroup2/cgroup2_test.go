// Package cgroup2_test runs the tests of the gVisor engine on control groups of version 2, on any machine: in a virtual one
// under QEMU's emulator, which needs neither hardware support nor version 2 on the machine itself. Where the machine has
// version 2, they run on it directly.
//
// The machine is Debian's kernel, a first file system that holds testdata/init and modules, and a disk that holds the test
// binary of internal/engine/gvisor and what its guests run. Each of its tests is a subtest here. The kernel package is
// unpacked into the user's cache, once; everything else is made anew and removed.
package cgroup2_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"
)

const (
	// patience is for the machine, which takes a minute or two where nothing else runs. Its tests have less, so that they say
	// where they hang.
	patience      = 7 * time.Minute
	suitePatience = 6 * time.Minute

	tail = 6000 // characters of the console that a failure shows

	// The engine's tests include those that a machine of version 1 cannot run. Left out are those that say nothing about
	// control groups: what asks the go command, what shares the blocks of a disk, and what looks at checkpoints closer than
	// TestEngine and TestRestoredLimits, which would take the machine a minute. The pattern with a slash is last, since no
	// pattern after one applies to whole tests.
	testTag  = "cgroup2"
	leaveOut = "^TestFilterVersion$|^TestManySaves$|^TestLongLife$|^TestSaveK|^TestHold$|^TestDamage$|^TestProgramIsNeverHidden$|/^shared$"
)

func TestEngine(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // a setting of test runs alone
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	if ownVersion2() {
		output(t, filepath.Join("..", "..", ".."), "go", "test", "-count=1", "-tags="+testTag, "./internal/engine/gvisor")
		return
	}
	if runtime.GOARCH != "amd64" {
		t.Fatal("this machine has control groups of version 1, and the emulated one with version 2 is an amd64 machine")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatalf("%v: run test/script/install-deps test", err)
	}
	m := machine{qemu: qemu, dir: t.TempDir(), kernel: findKernel(t)}
	m.makeStart(t)
	m.makeRoot(t)
	m.makeDisk(t)
	err = m.boot(t)
	if errors.Is(err, context.DeadlineExceeded) { // not even the suite's own timeout came: it is the emulator that stands still
		t.Logf("the machine stood still, and is started anew; the end of its output:\n%s\nand of its console:\n%s",
			last(text(t, m.file("results"))), last(text(t, m.file("console"))))
		m.makeDisk(t)
		err = m.boot(t)
	}
	if err != nil {
		t.Error(err)
	}
	report(t, m)
}

// ownVersion2 reports whether this machine has what the emulated one is for.
func ownVersion2() bool {
	controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	return err == nil && strings.Contains(string(controllers), "memory")
}

// machine is a virtual machine with its files in dir.
type machine struct {
	qemu, dir string
	kernel    kernel
}

func (m machine) file(name string) string { return filepath.Join(m.dir, name) }

// makeStart writes the kernel's first file system.
func (m machine) makeStart(t *testing.T) {
	t.Helper()
	output(t, ".", "go", "build", "-ldflags=-s -w", "-o", m.file("init"), "./testdata/init")
	modules, err := m.kernel.order("virtio_pci", "virtio_blk", "veth")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(m.file("start.cpio.gz"))
	if err != nil {
		t.Fatal(err)
	}
	a := newArchive(f)
	err = a.addFile("init", m.file("init"))
	for i, file := range modules {
		err = errors.Join(err, a.addFile(fmt.Sprintf("modules/%02d-%s", i, filepath.Base(file)), file))
	}
	if err := errors.Join(err, a.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// makeRoot makes the directory that the disk begins with.
func (m machine) makeRoot(t *testing.T) {
	t.Helper()
	root := m.file("root")
	for _, d := range []string{"dev", "proc", "sys", "run", "etc", "bin"} {
		mkdir(t, filepath.Join(root, d))
	}
	if err := os.Chmod(mkdir(t, filepath.Join(root, "tmp")), os.ModeSticky|0o777); err != nil {
		t.Fatal(err)
	}
	const engine = "github.com/cloister-dev/cloister/internal/engine/gvisor"
	bin := filepath.Join(root, "bin")
	output(t, ".", "go", "build", "-ldflags=-s -w", "-o", filepath.Join(bin, "guest"), engine+"/testdata/guest")
	output(t, ".", "go", "test", "-c", "-tags="+testTag, "-ldflags=-s -w", "-o", filepath.Join(bin, "engine.test"), engine)
	if err := os.Link(m.file("init"), filepath.Join(bin, "sleep")); err != nil {
		t.Fatal(err)
	}
	suite := "engine /bin/engine.test -test.v -test.timeout=" + suitePatience.String() + " -test.skip=" + leaveOut + "\n"
	if err := os.WriteFile(filepath.Join(root, "suite"), []byte(suite), 0o600); err != nil {
		t.Fatal(err)
	}
}

// makeDisk makes a disk with the programs and much room.
func (m machine) makeDisk(t *testing.T) {
	t.Helper()
	output(t, ".", "mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", m.file("root"), m.file("disk"), "6G")
}

// boot runs the machine until it turns itself off. One that does not in time is context.DeadlineExceeded.
func (m machine) boot(t *testing.T) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, m.qemu, "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-smp", "2", "-m", "2048",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:"+m.file("console"), "-serial", "file:"+m.file("results"),
		"-kernel", m.kernel.image, "-initrd", m.file("start.cpio.gz"), "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
		"-drive", "file="+m.file("disk")+",if=virtio,format=raw,cache=unsafe,discard=unmap")
	var says bytes.Buffer
	cmd.Stdout, cmd.Stderr = &says, &says
	begin := time.Now()
	err := cmd.Run()
	t.Logf("the machine ran for %v", time.Since(begin).Round(time.Millisecond))
	if err == nil {
		return nil
	}
	return fmt.Errorf("machine: %w: %w: %s", cmp.Or(ctx.Err(), errStopped), err, says.Bytes())
}

var errStopped = errors.New("it stopped by itself")

// result is how a line of a test's output names a test and its end.
var result = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) \(([0-9.]+s)\)`)

// report makes a subtest of each test that the machine ran.
func report(t *testing.T, m machine) {
	t.Helper()
	console, results := text(t, m.file("console")), text(t, m.file("results"))
	var said strings.Builder
	for line := range strings.Lines(results) {
		said.WriteString(line)
		f := result.FindStringSubmatch(line)
		if f == nil {
			continue
		}
		output := said.String()
		said.Reset()
		t.Run(f[2], func(t *testing.T) {
			if f[1] != "PASS" {
				t.Errorf("%s in the machine after %s:\n%s", f[1], f[3], output)
			}
		})
	}
	if strings.Contains(results, "--- SKIP") {
		t.Errorf("a test was skipped in the machine:\n%s", results)
	}
	if !strings.Contains(results, "\n== engine: status 0\n") {
		t.Errorf("the engine's tests did not end well; the end of their output:\n%s\nand of the console:\n%s", last(results), last(console))
	}
}

func text(t *testing.T, file string) string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Error(err)
	}
	return string(raw)
}

// last returns the end of a long text.
func last(s string) string { return s[max(0, len(s)-tail):] }
