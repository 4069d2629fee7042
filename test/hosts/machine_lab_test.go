package hosts_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// answerer runs a server in a machine that says the machine's name to whoever connects.
func answerer(t *testing.T, m *harness.Machine) {
	t.Helper()
	l, err := m.Listen(t.Context(), ":7000")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, m.Name)
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); serving.Wait() })
}

// reaches reports whether a machine gets another's answer within half a second.
func reaches(t *testing.T, from, to *harness.Machine) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", net.JoinHostPort(to.Addr.String(), "7000"))
	if err != nil {
		return false
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(500 * time.Millisecond))
	name, err := io.ReadAll(c)
	if err == nil && string(name) != to.Name {
		t.Fatalf("%s answered as %q", to.Name, name)
	}
	return err == nil
}

// TestLab cuts and heals the network between machines.
func TestLab(t *testing.T) {
	lab := harness.NewLab(t)
	a, b, hidden := lab.Machine("a"), lab.Machine("b"), lab.NAT("hidden")
	for _, m := range []*harness.Machine{a, b, hidden} {
		answerer(t, m)
	}
	check := func(when string, want map[string]bool) {
		t.Helper()
		for way, ok := range map[string]bool{
			"ab": reaches(t, a, b), "ba": reaches(t, b, a), "ha": reaches(t, hidden, a), "ah": reaches(t, a, hidden),
		} {
			if ok != want[way] {
				t.Errorf("%s: %s reaches: %t; want %t", when, way, ok, want[way])
			}
		}
	}
	whole := map[string]bool{"ab": true, "ba": true, "ha": true}
	check("whole", whole)
	lab.Partition(a, b)
	check("a and b cut", map[string]bool{"ha": true})
	lab.Heal()
	check("healed", whole)
	lab.Isolate(a)
	check("a alone", nil)
	lab.Heal()
	lab.PartitionOneWay(hidden, a)
	check("hidden cannot send to a", map[string]bool{"ab": true, "ba": true})
	lab.Heal()
	check("healed again", whole)
}

// TestLabDaemons runs a whole installation in each of two machines, whose addresses and ports are the same.
func TestLabDaemons(t *testing.T) {
	lab := harness.NewLab(t)
	tree := harness.TinyTree(t)
	machines := []*harness.Machine{lab.Machine("one"), lab.Machine("two")}
	ids := map[*harness.Machine]string{}
	for _, m := range machines {
		m.Start("up", "--base-sources", "dir:"+tree)
		ids[m] = sandboxIn(t, m)
	}
	for _, m := range machines {
		if out, code := m.CLI(t.Context(), "sandbox", "exec", ids[m], "cat /proc/sys/kernel/hostname >/dev/null; echo $((6*7))"); code != 0 || strings.TrimSpace(out) != "42" {
			t.Errorf("%s: exit code %d, output %q", m.Name, code, out)
		}
	}
	one, two := machines[0], machines[1]
	one.Kill()
	if _, err := one.Client().GetSandbox(t.Context(), ids[one]); err == nil {
		t.Error("a killed machine answers")
	}
	if s, err := two.Client().GetSandbox(t.Context(), ids[two]); err != nil || s.State != "running" {
		t.Errorf("the other machine's sandbox: %s, %v", s.State, err)
	}
	one.Again()
	if s, err := one.Client().GetSandbox(t.Context(), ids[one]); err != nil || s.State != "lost" {
		t.Errorf("the sandbox of a machine that lost power: %s, %v; want lost", s.State, err)
	}
	two.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := two.Client().Nodes(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a stopped machine: %v; want no answer", err)
	}
	two.Cont()
	if _, err := two.Client().Nodes(t.Context()); err != nil {
		t.Error(err)
	}
	two.Signal(os.Interrupt)
}

// sandboxIn creates a sandbox through a machine's own server.
func sandboxIn(t *testing.T, m *harness.Machine) string {
	t.Helper()
	s, err := m.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 900})
	if err != nil {
		t.Fatal(err)
	}
	return s.ID
}
