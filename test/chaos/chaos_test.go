package chaos

import (
	"bufio"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/test/harness"
)

// setting reads what the caller wants of a run.
func setting[T any](t *testing.T, name string, usual T, parse func(string) (T, error)) T {
	t.Helper()
	value := os.Getenv(name) //nolint:forbidigo // how long and from which seed is the caller's wish
	if value == "" {
		return usual
	}
	v, err := parse(value)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return v
}

// TestChaos breaks a cluster for CHAOS_TIME. CHAOS_SEED repeats the plan of a run; CHAOS_LOG names a file for the time line.
func TestChaos(t *testing.T) {
	seed := setting(t, "CHAOS_SEED", uint64(time.Now().UnixNano()), func(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) })
	setup := Setup{
		Total: setting(t, "CHAOS_TIME", time.Minute, time.ParseDuration), Nodes: 3, Slots: 12, Clock: canSkew,
	}
	t.Logf("CHAOS_SEED=%d CHAOS_TIME=%s", seed, setup.Total)
	const poolMax = 2
	c := harness.NewCluster(t, harness.Shape{Nodes: setup.Nodes, Proxies: 1, Disk: "2G", Flags: []string{
		"--node-heartbeat", "500ms", "--node-down-after", "3s", "--pool-min", "1", "--pool-max", strconv.Itoa(poolMax),
		"--reserved-disk", "64MiB", "--sandbox-disk", "256MiB",
	}})
	r := NewRun(t, c, poolMax)
	r.Do(Make(seed, setup))
	if name := setting(t, "CHAOS_LOG", "", func(s string) (string, error) { return s, nil }); name != "" {
		writeLog(t, r, name)
	}
}

func writeLog(t *testing.T, r *Run, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	w := bufio.NewWriter(f)
	err = r.WriteEvents(func(line string) error { _, err := w.WriteString(line); return err })
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		t.Error(err)
	}
}
