package control_test

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// reporter reports as the proxy pppppp.
func report(t *testing.T, c *control.Control, sequence int64, full bool, uses ...*proxyv1.Activity) int64 {
	t.Helper()
	resp, err := c.RouteService(aProxy).Report(t.Context(), &proxyv1.ReportRequest{Sequence: sequence, Full: full, Activities: uses, Proxy: &proxyv1.Proxy{Version: "v1"}})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetAcknowledgedSequence()
}

func used(id sandbox.ID, open int32, at time.Time) *proxyv1.Activity {
	return &proxyv1.Activity{Id: string(id), Open: open, Last: timestamppb.New(at)}
}

// TestActivity checks what is known of the use of sandboxes, and when it is the whole truth.
func TestActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		there := newPresences()
		c := apitest.NewCluster(t, func(cfg *control.Config) { cfg.Presences = there }).Control
		expect := func(when string, id sandbox.ID, wantOpen int, wantComplete bool) {
			t.Helper()
			if open, _, complete := c.Activity(id); open != wantOpen || complete != wantComplete {
				t.Errorf("%s: %d open, complete %t; want %d, %t", when, open, complete, wantOpen, wantComplete)
			}
		}
		asleep(20 * time.Second)
		expect("before it is known which proxies there are", "i1", 0, false)
		serving(t, c)
		expect("without a proxy", "i1", 0, true)
		if ack := report(t, c, 5, false, used("i1", 1, time.Now())); ack == 5 {
			t.Error("a first report that is not full was taken")
		}
		synctest.Wait()
		expect("before its first report", "i1", 0, false)
		now := time.Now()
		if ack := report(t, c, 6, true, used("i1", 2, now), used("i2", 0, now.Add(time.Hour))); ack != 6 {
			t.Errorf("a full report was acknowledged as %d", ack)
		}
		expect("reported", "i1", 2, true)
		if _, last, _ := c.Activity("i2"); last.After(time.Now()) {
			t.Errorf("last used in the future: %v", last)
		}
		if ack := report(t, c, 8, false); ack != 6 {
			t.Errorf("a report after a missing one was acknowledged as %d", ack)
		}
		if ack := report(t, c, 9, true); ack != 9 {
			t.Errorf("a full report was acknowledged as %d", ack)
		}
		if open, last, _ := c.Activity("i1"); open != 0 || !last.Equal(now) {
			t.Errorf("a full report without it: %d open, last used %v, want %v", open, last, now)
		}
		report(t, c, 10, false, used("i1", 1, time.Now()))
		asleep(30 * time.Second)
		expect("a silent proxy", "i1", 1, false)
		asleep(20 * time.Second)
		expect("after its lease", "i1", 0, true)
	})
}
