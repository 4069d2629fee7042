package gvisor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// sentryAlone gives guests the sentry as a program of its own, as Cloister has it.
func (p place) sentryAlone(b *testing.B) place {
	b.Helper()
	dir, err := os.MkdirTemp("", "gvsentry") //nolint:usetesting // reachable for the sentry's user
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	p.exe = filepath.Join(dir, "sentry")
	if err := goBuild(p.exe, "./testdata/sentry"); err != nil {
		b.Fatal(err)
	}
	if err := os.Chmod(p.exe, 0o755); err != nil {
		b.Fatal(err)
	}
	return p
}

// BenchmarkSave measures a save that the guest stands still for until it is stopped, a start from it, and how long after the
// begin of that start the guest answers.
func BenchmarkSave(b *testing.B) {
	for _, bench := range []struct {
		name       string
		heap, disk int64
		sharing    bool
	}{
		{"idle", 0, 0, false},
		{"heap-200MiB", 200 << 20, 0, false},
		{"disk-1GiB", 0, 1 << 30, false},
		{"xfs-idle", 0, 0, true},
		{"xfs-heap-200MiB", 200 << 20, 0, true},
		{"xfs-disk-1GiB", 0, 1 << 30, true},
	} {
		b.Run(bench.name, func(b *testing.B) {
			p := benchPlace(b, bench.sharing)
			e := p.open(b)
			s, w := loaded(b, p, e, bench.heap, bench.disk)
			var saves, starts, answers []time.Duration
			var saved engine.Saved
			for b.Loop() {
				begin := time.Now()
				var dir string
				dir, saved = p.save(b, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true})
				saves = append(saves, time.Since(begin))
				if err := e.Stop(context.Background(), s.ID); err != nil {
					b.Fatal(err)
				}
				w.renew(b, 0)
				s.ID, s.Checkpoint = sandbox.NewID("testno"), dir
				begin = time.Now()
				if err := e.Start(context.Background(), s); err != nil {
					b.Fatal(err)
				}
				starts = append(starts, time.Since(begin))
				w.ask(b, "host")
				answers = append(answers, time.Since(begin))
				if err := os.RemoveAll(dir); err != nil {
					b.Fatal(err)
				}
			}
			report(b, "save", saves)
			report(b, "start", starts)
			report(b, "answer", answers)
			b.ReportMetric(float64(saved.Bytes)/(1<<20), "own-MiB")
		})
	}
}

// BenchmarkSnapshot measures a save that the guest runs on after, with 256 MiB on its disk that do not change.
func BenchmarkSnapshot(b *testing.B) {
	for _, sharing := range []bool{false, true} {
		b.Run(fmt.Sprintf("sharing-%t", sharing), func(b *testing.B) {
			p := benchPlace(b, sharing)
			e := p.open(b)
			s, _ := loaded(b, p, e, 0, 256<<20)
			var saves []time.Duration
			for b.Loop() {
				begin := time.Now()
				dir, _ := p.save(b, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory})
				saves = append(saves, time.Since(begin))
				if err := os.RemoveAll(dir); err != nil {
					b.Fatal(err)
				}
			}
			report(b, "save", saves)
		})
	}
}

// BenchmarkFork measures three guests that start at once from one checkpoint with 1 GiB on its disk, and what they occupy.
func BenchmarkFork(b *testing.B) {
	const forks = 3
	for _, sharing := range []bool{false, true} {
		b.Run(fmt.Sprintf("sharing-%t", sharing), func(b *testing.B) {
			p := benchPlace(b, sharing)
			e := p.open(b)
			s, _ := loaded(b, p, e, 0, 1<<30)
			dir, _ := p.save(b, e, s.ID, engine.SaveSpec{Kind: engine.SaveMemory})
			s.Checkpoint, s.NetNS = dir, ""
			var all []time.Duration
			var used int64
			for b.Loop() {
				before := free(b, p.scratch)
				var wg sync.WaitGroup
				ids := make([]sandbox.ID, forks)
				begin := time.Now()
				for i := range ids {
					ids[i] = sandbox.NewID("testno")
					wg.Go(func() {
						c := s
						c.ID = ids[i]
						if err := e.Start(context.Background(), c); err != nil {
							b.Error(err)
						}
					})
				}
				wg.Wait()
				all = append(all, time.Since(begin))
				unix.Sync()
				used = before - free(b, p.scratch)
				for _, id := range ids {
					if err := e.Stop(context.Background(), id); err != nil {
						b.Fatal(err)
					}
				}
			}
			report(b, "fork", all)
			b.ReportMetric(float64(used)/(1<<20), "disk-MiB")
		})
	}
}

func benchPlace(b *testing.B, sharing bool) place {
	b.Helper()
	if sharing {
		return newPlaceIn(b, sharingDisk(b, 6<<30)).sentryAlone(b)
	}
	return newPlaceIn(b, "/var/tmp").sentryAlone(b)
}

// loaded starts a guest that has written so much to its heap and disk.
func loaded(b *testing.B, p place, e *Engine, heap, disk int64) (engine.Spec, wire) {
	b.Helper()
	w := newWire(b)
	s := p.spec(b, "serve", fmt.Sprintf(":%d", guestPort))
	s.NetNS, s.Limits = w.path, sandbox.Resources{MilliCPU: 2000, MemoryBytes: 512 << 20, DiskBytes: 2 << 30}
	if err := e.Start(context.Background(), s); err != nil {
		b.Fatal(err)
	}
	w.ask(b, fmt.Sprintf("alloc %d", heap))
	w.ask(b, fmt.Sprintf("write /data %d", disk))
	unix.Sync()
	return s, w
}

func report(b *testing.B, what string, all []time.Duration) {
	b.Helper()
	b.ReportMetric(quantile(all, 0.5), what+"-p50-ms")
	b.ReportMetric(float64(slices.Min(all).Microseconds())/1000, what+"-min-ms")
}

// free returns how many bytes a file system has left.
func free(b *testing.B, dir string) int64 {
	b.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		b.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}
