package routes_test

import (
	"testing"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/routes"
)

// TestPrompted has a sandbox turn to pausing: the server, which waits for that, is told at once what it is used for, and by a report
// that comes from after the turn.
func TestPrompted(t *testing.T) {
	r := newRig(t, func(c *routes.Config) {
		c.ReportEvery = time.Hour
		c.Self = func() routes.Self { return routes.Self{Version: "v1"} }
	})
	r.report(t, 0)
	s := r.stream()
	s <- whole(1, route("i1", 1))
	for version := int64(2); version < 8; version++ { // more than may come at once, too
		n := r.reported()
		pausing := route("i1", version)
		pausing.State = agentv1.State_STATE_PAUSING
		s <- &proxyv1.WatchResponse{Table: "t", Version: version, Routes: []*proxyv1.Route{pausing}}
		if got := r.report(t, n).GetProxy(); got.GetTable() != "t" || got.GetTableVersion() != version {
			t.Errorf("reported with %v; want version %d", got, version)
		}
	}
	close(s)
}
