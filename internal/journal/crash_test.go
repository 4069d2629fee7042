package journal

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

var crashPath = flag.String("journal.crash", "", "run as the helper of TestKilled on this journal")

// TestKilledHelper is the process that TestKilled kills: it writes as fast as it can and says what was acknowledged.
func TestKilledHelper(t *testing.T) {
	if *crashPath == "" {
		return // not the helper
	}
	ctx := t.Context()
	j := openAt(t, *crashPath, Options{Capacity: times(small(), 1e6)})
	for range 8 {
		go func() {
			for n := 0; ; n++ {
				r := j.newRecord()
				if _, _, err := j.Admit(ctx, r); err != nil {
					return
				}
				r = r.next(sandbox.StateRunning)
				r, err := j.Put(ctx, r, change("started", r))
				if err != nil {
					return
				}
				if n%3 == 0 {
					if r, err = j.Put(ctx, r.next(sandbox.StateDeleted), change("killed", r)); err != nil {
						return
					}
				}
				_, _ = fmt.Fprintf(os.Stderr, "ack %s %s %d\n", r.ID, r.State, r.Last.Sequence)
			}
		}()
	}
	<-ctx.Done()
}

func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	acked := map[sandbox.ID]string{}
	for _, lines := range []int{5, 120, 333} {
		runAndKill(t, path, lines, acked)
		checkAcked(t, path, acked)
	}
}

// runAndKill starts the helper, reads so many acknowledgements, and kills it.
func runAndKill(t *testing.T, path string, lines int, acked map[sandbox.ID]string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilledHelper$", "-journal.crash="+path)
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := bufio.NewScanner(out)
	for n := 0; s.Scan(); n++ {
		if n == lines {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		id, rest, ok := strings.Cut(strings.TrimPrefix(s.Text(), "ack "), " ")
		if ok && strings.Count(rest, " ") == 1 {
			acked[sandbox.ID(id)] = rest
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the helper ended by itself")
	}
}

func checkAcked(t *testing.T, path string, acked map[sandbox.ID]string) {
	t.Helper()
	j := openAt(t, path, Options{Capacity: times(small(), 1e6)})
	recs, err := j.Records(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	got := map[sandbox.ID]string{}
	for _, r := range recs {
		got[r.ID] = fmt.Sprint(r.State, " ", r.Last.Sequence)
	}
	for id, want := range acked {
		if got[id] != want {
			t.Errorf("sandbox %s: %q after the kill, acknowledged was %q", id, got[id], want)
		}
	}
	verify(t, j)
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
}
