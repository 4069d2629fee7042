package hosts_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestNoForeignPacketSockets starts sandboxes side by side; no sentry may hold the packet socket of another one's network.
func TestNoForeignPacketSockets(t *testing.T) {
	d := harness.Start(t, "--pool-max", "0", "--pool-min", "0")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := d.Client().CreateSandbox(t.Context(), client.CreateSandbox{TimeoutSeconds: 300}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	all := sentries(t, d.DataDir(), "")
	if len(all) < 8 {
		t.Fatalf("%d sentries, want 8 or more", len(all))
	}
	owner := map[string]int{} // inode of a packet socket -> a sentry whose network it is in
	for _, pid := range all {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/packet", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(strings.TrimSpace(string(text)), "\n")[1:] {
			f := strings.Fields(line)
			owner[f[len(f)-1]] = pid
		}
	}
	for _, pid := range all {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			target, err := os.Readlink(fd)
			inode, isSocket := strings.CutPrefix(target, "socket:[")
			if err != nil || !isSocket {
				continue
			}
			if of, packet := owner[strings.TrimSuffix(inode, "]")]; packet && network(t, of) != network(t, pid) {
				t.Errorf("sentry %d holds %s, a packet socket of the network of sentry %d", pid, fd, of)
			}
		}
	}
}

func network(t *testing.T, pid int) string {
	t.Helper()
	ns, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return ns
}
