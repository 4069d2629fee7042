package gvisor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestTakeFiles(t *testing.T) {
	rest, taken := takeFiles([]string{
		"runsc-sandbox", "--root=/r", "boot", "--pass-fd=9:268435456", "--pass-fd=10:268435457", "--pass-fd=4:5",
		"--pass-fd=x:268435456", "--pass-fd=11:999999999", "--pass-fd=1", "id",
	})
	wantRest := []string{
		"runsc-sandbox", "--root=/r", "boot", "--pass-fd=4:5", "--pass-fd=x:268435456", "--pass-fd=11:999999999", "--pass-fd=1", "id",
	}
	if diff := cmp.Diff(wantRest, rest); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[int]int{bootFile: 9, joinFile: 10}, taken); diff != "" {
		t.Error(diff)
	}
}

func TestSized(t *testing.T) {
	got := sized([]string{"a", "boot", "--total-host-memory", "9", "--total-memory", "9", "boot"}, boot{CPUs: 2, MemoryBytes: 512})
	want := []string{"a", "boot", "--cpu-num=2", "--total-host-memory", "9", "--total-memory", "512", "boot"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// Arguments of another shape are left alone.
	if diff := cmp.Diff([]string{"--total-memory"}, sized([]string{"--total-memory"}, boot{})); diff != "" {
		t.Error(diff)
	}
}

func TestGuestCPUs(t *testing.T) {
	for milli, want := range map[int64]int64{1: 1, 500: 1, 1000: 1, 1001: 2, 1500: 2, 8000: 8} {
		if got := guestCPUs(milli); got != want {
			t.Errorf("%d: got %d, want %d", milli, got, want)
		}
	}
}

func TestDescribe(t *testing.T) {
	exited := func(code int) status { return status{known: true, wait: unix.WaitStatus(code << 8)} }
	killed := status{known: true, wait: unix.WaitStatus(unix.SIGKILL)}
	for _, tt := range []struct {
		name            string
		s               status
		stopped, killed bool
		want            engine.Exit
	}{
		{"own end", exited(3), false, false, engine.Exit{Code: 3, Reason: "its first process exited with code 3"}},
		{"own end after a kill inside", exited(0), false, true, engine.Exit{Reason: "its first process exited with code 0"}},
		{"stopped", killed, true, false, engine.Exit{Code: -1, Reason: "stopped"}},
		{"out of memory", killed, false, true, engine.Exit{Code: -1, OOM: true, Reason: "out of memory: the limit is 512 MiB"}},
		{"killed", killed, false, false, engine.Exit{Code: -1, Reason: "the sentry was killed by signal 9 (killed)"}},
		{"unknown", status{}, false, false, engine.Exit{Code: -1, Reason: "it ended while nobody watched: how is not known"}},
		{"unknown, out of memory", status{}, false, true, engine.Exit{Code: -1, OOM: true, Reason: "out of memory: the limit is 512 MiB"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := describe(tt.s, tt.stopped, tt.killed, 512<<20); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
	if got := size(1000); got != "1000 bytes" {
		t.Errorf("size: got %q", got)
	}
}

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "panic: x\ngoroutine 1": "panic: x", "a\x1b[31mb\x00c": "a[31mbc", "\xff\xfeü": "ü", "\n": "",
	} {
		if got := oneLine([]byte(in)); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	if _, err := readRecord(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want that it does not exist", err)
	}
	want := record{PID: 77, StartTicks: 5, StartedAt: time.Unix(9, 0).UTC(), MemoryBytes: 1, Device: 2, Inode: 3}
	if err := writeRecord(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := readRecord(dir)
	if err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the record alone", entries, err)
	}
	put(t, filepath.Join(dir, recordFile), `{"pid":`)
	if _, err := readRecord(dir); err == nil {
		t.Error("half a record was accepted")
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"pid":5,"start_ticks":6}`))
	f.Add([]byte(`{"pid":-1}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		// A process number of 1 or less would mean everybody to kill.
		if r, err := parseRecord(raw); err == nil && (r.PID <= 1 || r.StartTicks == 0) {
			t.Errorf("accepted %+v", r)
		}
	})
}

func TestConfigCheck(t *testing.T) {
	for _, tt := range []struct {
		name string
		c    Config
		want string
	}{
		{"good", Config{Root: "/var/lib/cloister/node/gvisor", CgroupParent: "cloister-abc123"}, ""},
		{"relative", Config{Root: "x", CgroupParent: "c"}, "absolute path"},
		{"long group", Config{Root: "/x", CgroupParent: strings.Repeat("x", 65)}, "control group name"},
		{"no group", Config{Root: "/x"}, "control group name"},
		{"group that climbs", Config{Root: "/x", CgroupParent: ".."}, "control group name"},
		{"group below another", Config{Root: "/x", CgroupParent: "a/b"}, "control group name"},
		{"budget", Config{Root: "/x", CgroupParent: "c", MemoryBudgetBytes: -1}, "memory budget"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.c.check()
			if tt.want == "" {
				if err != nil || tt.c.SentryBytes != DefaultSentryBytes || tt.c.Logger == nil {
					t.Errorf("got %+v, %v", tt.c, err)
				}
				return
			}
			if !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an ErrInvalid with %q", err, tt.want)
			}
		})
	}
}

func TestProcessIdentity(t *testing.T) {
	p, err := openProcess(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if p.ended() || p.start == 0 {
		t.Errorf("this process: got %+v", p)
	}
	if _, err := openProcess(os.Getpid(), p.start+1); !errors.Is(err, unix.ESRCH) {
		t.Errorf("another process of that number: got %v, want ESRCH", err)
	}
}

// TestSentryIsNotHidden opens the sentry while low numbers are free, which the files of a new process would take.
func TestSentryIsNotHidden(t *testing.T) {
	f, err := useSentry("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { specutils.ExePath = "/proc/self/exe"; _ = f.Close() })
	if f.Fd() < firstSafe {
		t.Errorf("the sentry has number %d, want at least %d", f.Fd(), firstSafe)
	}
}
