package gvisor

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestRestoredConnections checks that a guest's connections end, that it listens on, and that its clock is right.
func TestRestoredConnections(t *testing.T) {
	p := newPlace(t)
	e := p.open(t)
	s, w := p.servingIn(t, e, 0)
	l, err := net.Listen("tcp", strings.TrimSuffix(hostSide(0), "/30")+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if got := w.ask(t, "dial "+l.Addr().String()); got != "<nil>" {
		t.Fatal(got)
	}
	out, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close() })
	w.tell(t, "hold")
	for _, end := range []string{"in", "out"} {
		await(t, "the guest holds both ends", func() bool { return w.ask(t, "held "+end) == "open" })
	}
	random := w.ask(t, "random")
	dir, _ := p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory})
	for _, end := range []string{"in", "out"} {
		if got := w.ask(t, "held "+end); got != "open" {
			t.Errorf("%s in the saved guest: %s, want that it stays open", end, got)
		}
	}
	_, w2 := p.again(t, e, s, dir, 1)
	for _, end := range []string{"in", "out"} {
		await(t, end+" ends", func() bool { return strings.HasPrefix(w2.ask(t, "held "+end), "ended: ") })
		t.Log(end, w2.ask(t, "held "+end))
	}
	now, err := strconv.ParseInt(w2.ask(t, "now"), 10, 64)
	if off := time.Since(time.Unix(0, now)); err != nil || off.Abs() > 5*time.Second {
		t.Errorf("the guest's clock is off by %v, %v", off, err)
	}
	if got := w2.ask(t, "random"); got == random || got == w.ask(t, "random") {
		t.Errorf("the guest's random numbers repeat: %s", got)
	}
	if got := w2.ask(t, "dial "+l.Addr().String()); !strings.Contains(got, "unreachable") && got != "<nil>" {
		t.Errorf("a new connection: %s", got)
	}
}

// TestRestoredLimits checks that the memory of a guest that starts from a checkpoint counts as its own, and is limited.
func TestRestoredLimits(t *testing.T) {
	disks(t, func(t *testing.T, p place, _ bool) {
		t.Helper()
		const heap = 96 << 20
		e := p.open(t)
		s, w := p.servingIn(t, e, 0)
		w.ask(t, "write /tmp/a 8388608")
		w.ask(t, fmt.Sprintf("alloc %d", heap))
		dir, saved := p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory})
		if saved.MemoryBytes < heap || saved.MemoryBytes > heap+(32<<20) {
			t.Errorf("got %+v, want %d bytes of memory and little more", saved, heap)
		}
		if err := e.Stop(testContext(t), s.ID); err != nil {
			t.Fatal(err)
		}
		r, w2 := p.again(t, e, s, dir, 1)
		st, err := e.Stats(testContext(t), r.ID)
		if err != nil || st.MemoryBytes < heap || st.MemoryBytes > heap+(96<<20) || st.DiskBytes < 8<<20 {
			t.Errorf("got %+v, %v, want its memory and disk", st, err)
		}
		for _, pid := range e.cgroups.pids(r.ID) {
			raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if strings.HasPrefix(string(raw), fileServerName) {
				t.Errorf("process %d still serves files", pid)
			}
		}
		if got := w2.ask(t, "cpus"); got != "2" {
			t.Errorf("processors: got %s, want 2", got)
		}
		w2.tell(t, "alloc "+strconv.Itoa(400<<20))
		exit, err := e.Wait(testContext(t), r.ID)
		if err != nil || !exit.OOM || exit.Reason != "out of memory: the limit is 256 MiB" {
			t.Errorf("got %+v, %v, want that it is out of memory", exit, err)
		}
	})
}

// TestManySaves checks that saving a guest, or going from checkpoint to checkpoint, uses nothing up.
func TestManySaves(t *testing.T) {
	disks(t, func(t *testing.T, p place, _ bool) {
		t.Helper()
		e := p.open(t)
		s, w := p.servingIn(t, e, 0)
		w.ask(t, "write /tmp/a 8388608")
		sum := w.ask(t, "sum /tmp/a")
		round := func(i int) {
			kind := []engine.SaveKind{engine.SaveMemory, engine.SaveFiles, engine.SaveLayer}[i%3]
			dir, _ := p.save(t, e, s.ID, engine.SaveSpec{Kind: kind, Hold: i%2 == 0})
			if err := e.Thaw(testContext(t), s.ID); err != nil {
				t.Fatal(err)
			}
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
		list, err := e.List(testContext(t))
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		count := func() (ours, sentrys, processes int) {
			return openFiles(t, os.Getpid()), openFiles(t, list[0].PID), len(e.cgroups.pids(s.ID))
		}
		for i := range 6 {
			round(i)
		}
		ours, sentrys, processes := count()
		// The sentry closes its copy of each file that a save passes when its garbage collector comes by.
		const slack = 10
		for i := range 12 * *times {
			round(i)
		}
		if o, s, n := count(); o > ours+slack || s > sentrys+slack || n > processes+1 {
			t.Errorf("got %d open files here, %d in the sentry, %d processes; before %d, %d, %d", o, s, n, ours, sentrys, processes)
		}
		if got := w.ask(t, "sum /tmp/a"); got != sum {
			t.Errorf("got %s, want %s", got, sum)
		}
	})
}

// TestLongLife pauses and resumes a guest again and again: each round it is another process, from the last one's checkpoint.
func TestLongLife(t *testing.T) {
	disks(t, longLife)
}

func longLife(t *testing.T, p place, _ bool) {
	t.Helper()
	e := p.open(t)
	s, w := p.servingIn(t, e, 0)
	w.ask(t, "write /tmp/a 8388608")
	sum := w.ask(t, "sum /tmp/a")
	var opened int
	var state int64
	rounds := 5 * *times
	for i := range rounds {
		w.ask(t, fmt.Sprintf("put /tmp/%d x", i))
		dir, saved := p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true})
		if err := e.Stop(testContext(t), s.ID); err != nil {
			t.Fatal(err)
		}
		w.renew(t, 0)
		s.ID, s.Checkpoint = sandbox.NewID("testno"), dir
		if err := e.Start(testContext(t), s); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			runtime.GC() // gVisor leaves some files to it
			opened, state = openFiles(t, os.Getpid()), saved.MemoryBytes
		} else if i > 2 && saved.MemoryBytes > state+(8<<20) {
			t.Errorf("round %d: %+v saved, %d before", i, saved, state)
		}
	}
	await(t, "no more files are open than before", func() bool { runtime.GC(); return openFiles(t, os.Getpid()) <= opened })
	if got := w.ask(t, "sum /tmp/a"); got != sum {
		t.Errorf("got %s, want %s", got, sum)
	}
	for i := range rounds {
		if got := w.ask(t, fmt.Sprintf("cat /tmp/%d", i)); got != "x" {
			t.Errorf("file %d: %s", i, got)
		}
	}
}

// openFiles returns how many files a process has open.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
