package routes

import (
	"context"
	"log/slog"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/timestamppb"

	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// reporter tells the server what sandboxes are used for. What a report that was not acknowledged said is said again.
type reporter struct {
	table    *Table
	traffic  traffic
	sequence int64
	// since is until when everything is acknowledged; full that the server may have forgotten what was.
	since time.Time
	full  bool
	every time.Duration
	// leaving that the proxy takes no new requests.
	leaving bool
}

// Reports that are prompted come at most promptsPerSecond times a second, but for as many as promptsAtOnce: a pause is held up
// by milliseconds, and thousands of them at once cause no more reports than that.
const (
	promptsPerSecond = 20
	promptsAtOnce    = 4
)

// prompted has the next report be made now: a server holds a sandbox back that is to pause, until it is known that nobody uses it.
func (t *Table) prompted() {
	select {
	case t.prompt <- struct{}{}:
	default:
	}
}

// report reports until ctx ends.
func (t *Table) report(ctx context.Context, tr traffic) {
	rp := &reporter{table: t, traffic: tr, full: true, every: t.cfg.ReportEvery}
	prompts := rate.NewLimiter(promptsPerSecond, promptsAtOnce)
	var told chan<- error
	for {
		err := rp.send(ctx)
		if err != nil && ctx.Err() == nil {
			t.log.LogAttrs(ctx, slog.LevelDebug, "activity not reported", slog.Any("err", err))
		}
		if told != nil {
			told <- err // it has room
		}
		told = nil
		wait := time.NewTimer(rp.every)
		select {
		case <-ctx.Done():
			wait.Stop()
			return
		case told = <-t.leaving:
			rp.leaving = true
			wait.Stop()
		case <-t.prompt:
			wait.Stop()
			_ = prompts.Wait(ctx) // where ctx has ended, the next report fails and the loop ends
		case <-wait.C:
		}
	}
}

// send makes one report.
func (rp *reporter) send(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rp.table.cfg.CallTimeout)
	defer cancel()
	since, now := rp.since, time.Now()
	if rp.full {
		since = time.Time{}
	}
	rp.sequence++
	self := rp.table.self() // first: requests that are held back since the table's version are not among the activities that follow
	resp, err := rp.table.server.Report(ctx, &proxyv1.ReportRequest{
		Sequence: rp.sequence, Activities: activitiesToWire(rp.traffic.Activities(since)), Full: rp.full, Proxy: self, Leaving: rp.leaving,
		Time: timestamppb.Now(),
	})
	if err != nil {
		rp.full = true
		rp.table.metrics.reports.WithLabelValues("failed").Inc()
		return fromServer(ctx, err)
	}
	if within := resp.GetWithin().AsDuration(); within > 0 {
		rp.every = min(rp.table.cfg.ReportEvery, within/3)
	}
	if resp.GetAcknowledgedSequence() != rp.sequence {
		rp.full = true
		rp.table.metrics.reports.WithLabelValues("refused").Inc()
		return nil
	}
	rp.since, rp.full = now, false
	rp.table.metrics.reports.WithLabelValues("acknowledged").Inc()
	return nil
}

// self is what the proxy says of itself; nil for one that is in no list.
func (t *Table) self() *proxyv1.Proxy {
	if t.cfg.Self == nil {
		return nil
	}
	s := t.cfg.Self()
	t.mu.RLock()
	defer t.mu.RUnlock()
	return &proxyv1.Proxy{
		Version: s.Version, Address: s.Address, StartedAt: timestamppb.New(s.Started), Connections: int32(min(s.Connections, 1<<30)), //nolint:gosec // bounded
		Requests: int32(min(s.Requests, 1<<30)), Table: t.name, TableVersion: t.version, //nolint:gosec // bounded
	}
}

func activitiesToWire(all []sandbox.Activity) []*proxyv1.Activity {
	out := make([]*proxyv1.Activity, 0, len(all))
	for _, a := range all {
		out = append(out, &proxyv1.Activity{Id: string(a.ID), Open: int32(min(a.Open, 1<<30)), Last: timestamppb.New(a.Last)}) //nolint:gosec // bounded
	}
	return out
}
