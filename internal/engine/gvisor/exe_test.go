package gvisor

import (
	"os"
	"os/exec"
	"testing"

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
	exe, err := useSentry(program)
	if err != nil {
		t.Fatal(err)
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
