package gvisor

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gvisor.dev/gvisor/pkg/bpf"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/runsc/boot/filter"
	filterconfig "gvisor.dev/gvisor/runsc/boot/filter/config"
	"gvisor.dev/gvisor/runsc/config"
)

const regenerate = "; run: go generate ./internal/engine/gvisor"

func TestFilterVersion(t *testing.T) {
	if filterVersion == "" {
		t.Skip("no filter for this architecture")
	}
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Version}}", modulePath).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(out)); got != filterVersion {
		t.Errorf("the filter is that of gVisor %s, but %s is in use%s", filterVersion, got, regenerate)
	}
}

// TestFilterIsExact compares the generated filter, instruction by instruction, with what a sentry would compile. It does
// so as process 1 of a PID namespace, which is what a sentry is: a filter names the process that it was compiled in.
func TestFilterIsExact(t *testing.T) {
	if config.CgoEnabled || len(filters()) == 0 {
		t.Skip("sentries of this build compile their filter")
	}
	if os.Getpid() == 1 {
		compareFilters(t)
		return
	}
	needHost(t)
	cmd := exec.CommandContext(testContext(t), "/proc/self/exe", "-test.run=^TestFilterIsExact$")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func compareFilters(t *testing.T) {
	t.Helper()
	registerSeccomp()
	systrap, err := platform.Lookup("systrap")
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range systrap.PrecompiledSeccompInfo() {
		opts := filterconfig.Options{Platform: info, ControllerFD: 77}
		p, ok := filter.GetPrecompiled(opts.ConfigKey())
		if !ok {
			t.Fatalf("no filter for %s%s", opts.ConfigKey(), regenerate)
		}
		got, err := p.RenderInstructions(opts.Vars())
		if err != nil {
			t.Fatalf("%v%s", err, regenerate)
		}
		rules, deny := filterconfig.Rules(opts)
		program := seccomp.Program{
			RuleSets: []seccomp.RuleSet{{Rules: deny}, {Rules: rules, Action: seccomp.Allow}},
			Options:  filterconfig.SeccompOptions(opts),
		}
		want, _, err := program.Build()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(bpf.Instruction{})); diff != "" {
			t.Errorf("the filter differs from what gVisor compiles%s: %s", regenerate, diff)
		}
	}
}
