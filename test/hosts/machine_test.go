package hosts_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/test/harness"
)

// nodeOf returns the id of the daemon's node, which is part of the name of everything that it makes on the machine.
func nodeOf(t *testing.T, d *harness.Daemon) string {
	t.Helper()
	nodes, err := d.Client().Nodes(t.Context())
	if err != nil || len(nodes) != 1 {
		t.Fatalf("nodes: %v, %v; want one", nodes, err)
	}
	return nodes[0].ID
}

// traces returns what of the daemon is on the machine: links, tables, control groups, processes. The kernel takes a namespace
// away some time after its last process, so what is there is looked at again for a few seconds.
func traces(t *testing.T, d *harness.Daemon, node string) []string {
	t.Helper()
	var found []string
	deadline := time.NewTimer(5 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		found = slices.DeleteFunc(things(t), func(s string) bool { return !strings.Contains(s, node) })
		for _, pid := range sentries(t, d.DataDir(), "") {
			text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
			if err == nil {
				found = append(found, "process "+strings.ReplaceAll(string(text), "\x00", " "))
			}
		}
		if len(found) == 0 || d.Running() {
			return found
		}
		select {
		case <-deadline.C:
			return found
		case <-tick.C:
		}
	}
}

// strangers returns what on the machine is not the node's, of the things that stay as long as nobody removes them.
func strangers(t *testing.T, node string) []string {
	t.Helper()
	return slices.DeleteFunc(things(t), func(s string) bool {
		return strings.Contains(s, node) || strings.Contains(s, "clo") // other daemons come and go
	})
}

// things returns the links, nftables tables and control groups of the machine.
func things(t *testing.T) []string {
	t.Helper()
	lines := func(name string, args ...string) []string {
		out, err := exec.CommandContext(t.Context(), name, args...).Output()
		if err != nil {
			t.Fatalf("%s %v: %v", name, args, err)
		}
		return slices.DeleteFunc(strings.Split(string(out), "\n"), func(l string) bool { return strings.TrimSpace(l) == "" })
	}
	var all []string
	for _, l := range lines("ip", "-br", "link") {
		if f := strings.Fields(l); len(f) > 0 {
			all = append(all, "link "+f[0])
		}
	}
	all = append(all, lines("nft", "list", "tables")...)
	return append(all, lines("find", "/sys/fs/cgroup", "-mindepth", "2", "-type", "d", "-name", "*cloister*")...)
}
