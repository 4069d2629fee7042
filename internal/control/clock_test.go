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

// TestClocks has the end of a sandbox follow the difference between its node's clock and the server's, once that is sure.
func TestClocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil)
		box := mustCreate(t, c, control.CreateRequest{Timeout: time.Minute})
		report := func() {
			t.Helper()
			if err := c.Report(t, c.Node, false); err != nil {
				t.Fatal(err)
			}
		}
		expect := func(want time.Duration) {
			t.Helper()
			got, err := c.Control.Get(t.Context(), box.ID)
			if by := got.EndAt.Sub(box.EndAt); err != nil || by != want {
				t.Errorf("its end moved by %s, want %s; %v", by, want, err)
			}
		}
		report()
		c.Ahead = time.Hour
		report()
		expect(0) // it may be one answer that was long on its way
		report()
		expect(-time.Hour)
		c.Ahead = time.Hour - time.Second
		report()
		report()
		expect(-time.Hour)
		c.Ahead = time.Hour - 8*time.Second
		report()
		c.Ahead = time.Hour
		report()
		expect(-time.Hour)
		later := mustCreate(t, c, control.CreateRequest{Timeout: 2 * time.Minute})
		if by := later.EndAt.Sub(box.EndAt); by != time.Minute-time.Hour {
			t.Errorf("the end of the next one is later by %s", by)
		}
		c.Ahead = 0
		report()
		report()
		expect(0)
	})
}

// TestClockOfProxy has uses that a proxy reports count by the server's clock.
func TestClockOfProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := apitest.NewCluster(t, nil).Control
		used := time.Now().Add(-time.Minute)
		for i, ahead := range []time.Duration{-time.Hour, 0, time.Hour} {
			id := sandbox.NewID("aaaaaa")
			_, err := c.RouteService(aProxy).Report(t.Context(), &proxyv1.ReportRequest{
				Sequence: int64(i + 1), Full: true, Time: timestamppb.New(time.Now().Add(ahead)),
				Activities: []*proxyv1.Activity{{Id: string(id), Last: timestamppb.New(used.Add(ahead))}},
			})
			if _, last, _ := c.Activity(id); err != nil || !last.Equal(used) {
				t.Errorf("a proxy %s ahead: last used %s, want %s; %v", ahead, last, used, err)
			}
		}
	})
}
