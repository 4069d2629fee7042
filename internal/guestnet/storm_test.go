package guestnet

import (
	"bufio"
	"context"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// stormSwitch turns the test program into the process that TestKill kills.
const stormSwitch = "GUESTNET_STORM"

// storm takes and gives networks back until it is killed.
func storm() {
	m, err := New(Config{Range: netip.MustParsePrefix(labRange), Name: labName, PoolSize: 8})
	check(err)
	ctx := context.Background()
	check(m.Sweep(ctx))
	go func() { check(m.Run(ctx)) }()
	_, _ = io.WriteString(os.Stdout, "ready\n")
	for worker := range 3 {
		go func() {
			for i := 0; ; i++ {
				id := sandbox.ID("w" + strconv.Itoa(worker) + "n" + strconv.Itoa(i))
				_, err := m.Acquire(ctx, id, Policy{AllowInternet: i%2 == 0})
				check(err)
				if i >= 10 {
					check(m.Release(ctx, sandbox.ID("w"+strconv.Itoa(worker)+"n"+strconv.Itoa(i-10))))
				}
			}
		}()
	}
	select {}
}

func check(err error) {
	if err != nil {
		_, _ = io.WriteString(os.Stdout, err.Error()+"\n")
		os.Exit(1) //nolint:forbidigo // the child process's main function
	}
}

// TestKill kills a process at random moments of its work and wants nothing left behind.
func TestKill(t *testing.T) {
	l := newLab(t)
	for range 5 {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), stormSwitch+"=1")
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewReader(out)
		if line, err := lines.ReadString('\n'); line != "ready\n" {
			t.Fatalf("child says %q, %v", line, err)
		}
		<-time.After(time.Duration(rand.IntN(100)) * time.Millisecond)
		must(t, cmd.Process.Kill())
		if line, _ := lines.ReadString('\n'); line != "" {
			t.Errorf("child says %q", line)
		}
		_ = cmd.Wait() // killed
	}
	m := l.manager()
	must(t, m.Sweep(t.Context()))
	eventually(t, "no link is left", func() bool {
		links, err := m.wire.list()
		return err == nil && len(links) == 0
	})
	if rules := nft(t, "list table inet cloister_"+labName+"\n"); strings.Contains(rules, `"`+linkPrefix+labName+`0`) {
		t.Errorf("elements of dead sandboxes are left: %s", rules)
	}
	l.acquire(m, "sandboxa", true)
}
