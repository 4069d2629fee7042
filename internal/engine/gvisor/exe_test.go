package gvisor

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/specutils"
)

// TestProgramIsNeverHidden executes the sentry's program with every highest number around its own among the files that are
// passed, some of which have to be moved out of the way.
func TestProgramIsNeverHidden(t *testing.T) {
	old := specutils.ExePath
	t.Cleanup(func() { specutils.ExePath = old })
	program, err := exec.LookPath("true")
	if err != nil {
		t.Fatal(err)
	}
	between, err := unix.FcntlInt(os.Stdin.Fd(), unix.F_DUPFD_CLOEXEC, firstSafe+guardNumbers/2) // somebody's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(between) })
	exe, err := useSentry(program)
	if err != nil {
		t.Fatal(err)
	}
	if n := openTimes(t, program); n != guardNumbers+1 {
		t.Errorf("the program is open %d times, want %d", n, guardNumbers+1)
	}
	var open []*os.File
	for len(open) == 0 || open[len(open)-1].Fd() < exe.Fd()+guardNumbers {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, f)
		t.Cleanup(func() { _ = f.Close() })
	}
	for _, top := range open {
		if top.Fd()+2*guardNumbers < exe.Fd() {
			continue
		}
		files := make([]*os.File, 0, guardNumbers/2)
		for len(files) < guardNumbers/2-1 {
			files = append(files, os.Stdin)
		}
		p, err := os.StartProcess(specutils.ExePath, []string{"true"}, &os.ProcAttr{Files: append(files, top)})
		if err != nil {
			t.Fatalf("with %d the highest, the program at %d: %v", top.Fd(), exe.Fd(), err)
		}
		if state, err := p.Wait(); err != nil || !state.Success() {
			t.Errorf("with %d the highest: %v, %v", top.Fd(), state, err)
		}
	}
}

// openTimes returns how often this process has a file open.
func openTimes(t *testing.T, path string) int {
	t.Helper()
	want, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range all {
		if got, err := os.Stat("/proc/self/fd/" + fd.Name()); err == nil && os.SameFile(want, got) {
			n++
		}
	}
	return n
}
