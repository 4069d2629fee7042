package agent

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestProcessorTime(t *testing.T) {
	for text, want := range map[string][2]int64{
		"cpu  100 20 30 400 50 6 7 8 9 10\ncpu0 1 2 3 4 5\n": {171, 621}, // the guests' 9 and 10 are in the 100 and 20
		"cpu  1 0 0 1 0": {1, 2},
		"cpu  1 x 0 1 0": {}, "cpu  1 -1 0 1 0": {}, "cpu 1": {}, "": {}, "intr 1 2 3 4 5 6": {},
	} {
		busy, total := processorTime([]byte(text))
		if busy != want[0] || total != want[1] {
			t.Errorf("%q: %d of %d, want %v", text, busy, total, want)
		}
	}
}

func TestMeter(t *testing.T) {
	var m meter
	m.processors([]byte("cpu 500 0 0 500 0\n"))
	if m.last.cpu != 0.5 {
		t.Errorf("since the machine's start: %v", m.last.cpu)
	}
	m.processors([]byte("cpu 600 0 0 500 0\n"))
	if want := 0.5 + useWeight*0.5; math.Abs(m.last.cpu-want) > 1e-9 {
		t.Errorf("after it was busy for a while: %v, want %v", m.last.cpu, want)
	}
	before := m.last.cpu
	for _, odd := range []string{"cpu 600 0 0 500 0\n", "", "cpu 1 0 0 1 0\n"} { // no time has passed, nothing, another machine's
		m.processors([]byte(odd))
	}
	if m.last.cpu != before {
		t.Errorf("after readings that say nothing: %v, want %v", m.last.cpu, before)
	}
	for range 50 {
		m.processors([]byte("cpu 600 0 0 500 0\n"))
		m.busy, m.total = 0, 100
	}
	if m.last.cpu > 1 {
		t.Errorf("more than all: %v", m.last.cpu)
	}
	m = meter{dir: t.TempDir()}
	if u := m.now(); u.memory <= 0 || u.memory >= 1 || u.disk <= 0 || u.disk > 1 {
		t.Errorf("of this machine: %+v", u)
	}
	if again := m.now(); again != m.last {
		t.Errorf("looked at again at once: %+v, want %+v", again, m.last)
	}
}

func TestMemoryShare(t *testing.T) {
	for text, want := range map[string]float64{
		"MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 250 kB\n": 0.75,
		"MemTotal: 1000 kB\nMemAvailable: 2000 kB\n":               0,
		"MemAvailable: 2000 kB\n":                                  0,
		"":                                                         0,
	} {
		if got := memoryShare([]byte(text)); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

func TestProcessorFeatures(t *testing.T) {
	for text, want := range map[string][]string{
		"processor\t: 0\nflags\t\t: fpu vme sse2\nbugs\t: x\nflags : other\n": {"fpu", "vme", "sse2"},
		"Features\t: fp asimd\n": {"fp", "asimd"},
		"vendor_id : flags\n":    nil,
		"":                       nil,
	} {
		if diff := cmp.Diff(want, processorFeatures([]byte(text))); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
	}
}
