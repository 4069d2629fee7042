package gvisor

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/engine"
)

// BenchmarkStart measures a guest from nothing to a running first process, and reports what its end costs apart. cpu-ms is
// the processor time of everything that a start takes, in this process and in the sentry.
func BenchmarkStart(b *testing.B) {
	p := newPlace(b)
	e := p.open(b)
	ctx := context.Background()
	var starts, stops []time.Duration
	var cpu time.Duration
	self := processorTime()
	for b.Loop() {
		s := p.spec(b, "sleep")
		begin := time.Now()
		if err := e.Start(ctx, s); err != nil {
			b.Fatal(err)
		}
		starts = append(starts, time.Since(begin))
		st, err := e.Stats(ctx, s.ID)
		if err != nil {
			b.Fatal(err)
		}
		cpu += st.CPUTime
		begin = time.Now()
		if err := e.Stop(ctx, s.ID); err != nil {
			b.Fatal(err)
		}
		stops = append(stops, time.Since(begin))
	}
	cpu += processorTime() - self
	b.ReportMetric(quantile(starts, 0.5), "p50-ms")
	b.ReportMetric(quantile(starts, 0.95), "p95-ms")
	b.ReportMetric(quantile(stops, 0.5), "stop-p50-ms")
	b.ReportMetric(float64(cpu.Microseconds())/1000/float64(len(starts)), "cpu-ms/op")
}

// BenchmarkIdle reports what a guest that does nothing costs, as one of ten that share their binary's pages.
func BenchmarkIdle(b *testing.B) {
	const guests = 10
	p := newPlace(b)
	e := p.open(b)
	ctx := context.Background()
	var specs []engine.Spec
	for range guests {
		s := p.spec(b, "sleep")
		if err := e.Start(ctx, s); err != nil {
			b.Fatal(err)
		}
		specs = append(specs, s)
	}
	span := func() {
		timer := time.NewTimer(3 * time.Second)
		defer timer.Stop()
		<-timer.C
	}
	total := func() (sum engine.Stats) {
		for _, s := range specs {
			st, err := e.Stats(ctx, s.ID)
			if err != nil {
				b.Fatal(err)
			}
			sum.Time = st.Time
			sum.CPUTime += st.CPUTime
			sum.MemoryBytes += st.MemoryBytes
		}
		return sum
	}
	span()
	before := total()
	for b.Loop() {
		span()
	}
	after := total()
	var pss int64
	processes := 0
	for _, s := range specs {
		for _, pid := range e.cgroups.pids(s.ID) {
			pss += readPSS(pid)
			processes++
		}
	}
	seconds := after.Time.Sub(before.Time).Seconds()
	b.ReportMetric(float64((after.CPUTime-before.CPUTime).Microseconds())/seconds/guests, "cpu-us/s")
	b.ReportMetric(float64(pss)/(1<<20)/guests, "pss-MiB")
	b.ReportMetric(float64(after.MemoryBytes)/(1<<20)/guests, "memory-MiB")
	b.ReportMetric(float64(processes)/guests, "processes")
}

// readPSS returns a process's share of memory in bytes.
func readPSS(pid int) int64 {
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(raw)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "Pss: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	return 0
}

// processorTime returns what this process has used so far.
func processorTime() time.Duration {
	var ru unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

func quantile(all []time.Duration, q float64) float64 {
	slices.Sort(all)
	return float64(all[int(q*float64(len(all)-1))].Microseconds()) / 1000
}
