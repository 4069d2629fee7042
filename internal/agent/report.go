package agent

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"connectrpc.com/connect"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/gen/node/v1/nodev1connect"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// serverTimeout bounds one call to the server.
	serverTimeout = 10 * time.Second
	// maxReport is how many changes one report carries, except a full one.
	maxReport = 256
	// maxServerBackoff bounds the wait after the server did not answer.
	maxServerBackoff = 5 * time.Second
	// wholePace is the time between two reports of everything, where the journal no longer has what changed.
	wholePace = 250 * time.Millisecond
)

// registration is what the server made of the node.
type registration struct {
	epoch int64
	acked int64
	full  bool // the server wants everything
	whole bool // it was told everything because the journal no longer has what it lacks
}

// reporter tells one server about the node.
type reporter struct {
	*Agent
	server nodev1connect.NodeServiceClient
	// counts means that what the server has need not be kept, and that its token secret is the cluster's.
	counts bool
	news   chan struct{} // of capacity 1: the journal may have something to report
	// remember keeps the cluster's token secret, if it is not the one that is kept.
	remember func(secret []byte) error
	kept     []byte
}

// newReporter returns the reporter to a server. Only of the one that counts is there something to remember.
func newReporter(a *Agent, server nodev1connect.NodeServiceClient, remember func([]byte) error) *reporter {
	return &reporter{
		Agent: a, server: server, counts: remember != nil, news: make(chan struct{}, 1), remember: remember, kept: a.cfg.TokenSecret,
	}
}

// run registers and then tells the server every change, soon after it was made, and the load every so often.
func (a *reporter) run(ctx context.Context) error {
	var reg *registration
	timer := time.NewTimer(0)
	defer timer.Stop()
	for tries := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-a.news:
		}
		var err error
		if reg == nil {
			reg, err = a.register(ctx)
		}
		if err == nil {
			err = a.tell(ctx, reg)
		}
		wait := a.cfg.ReportInterval
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			tries = 0
			a.told(ctx, reg)
		case refused(err) && reg != nil:
			a.log.InfoContext(ctx, "registering again", slog.Any("err", err))
			reg, wait = nil, min(maxServerBackoff, backoff(tries))
			tries++
		default:
			wait = min(maxServerBackoff, backoff(tries))
			tries++
			a.log.WarnContext(ctx, "server not told, trying again", slog.Duration("in", wait), slog.Any("err", err))
		}
		timer.Reset(wait)
		if err != nil {
			drain(a.news) // the timer says when to go on
		}
	}
}

// told notes that a server has everything. One whose word does not count falls behind what the journal keeps, and is told all
// there is instead of what has changed; that is not done for each change.
func (a *reporter) told(ctx context.Context, reg *registration) {
	switch {
	case a.counts:
		a.metrics.reported.SetToCurrentTime()
	case reg.whole:
		reg.whole = false
		pause(ctx, wholePace)
	}
}

func drain(c chan struct{}) {
	select {
	case <-c:
	default:
	}
}

// refused reports whether the server does not know the node, or not by this epoch.
func refused(err error) bool {
	if errors.Is(err, sandbox.ErrConflict) || isNotFound(err) || errors.Is(err, sandbox.ErrDenied) {
		return true
	}
	switch connect.CodeOf(err) { //nolint:exhaustive // everything else is tried again as it is
	case connect.CodeFailedPrecondition, connect.CodeNotFound, connect.CodeAborted, connect.CodeUnauthenticated:
		return true
	default:
		return false
	}
}

// tell sends reports until the server has everything. The last one always carries the load.
func (a *reporter) tell(ctx context.Context, reg *registration) error {
	for {
		req, last, err := a.nextReport(ctx, reg)
		if err != nil {
			return err
		}
		rctx, cancel := context.WithTimeout(ctx, serverTimeout)
		resp, err := a.server.Report(rctx, req)
		cancel()
		if err != nil {
			return err
		}
		if a.counts {
			a.heed(resp)
		}
		acked := resp.GetAcknowledgedSequence()
		switch {
		case req.GetFull():
			acked = max(acked, last) // everything up to there is in what was sent
			reg.full = false
		case len(req.GetChanges()) == 0:
			acked = reg.acked // there was nothing to acknowledge
		case acked <= reg.acked:
			reg.full = acked < reg.acked
			return sandbox.Unavailablef("the server acknowledged changes up to %d; it was sent those from %d to %d", acked, reg.acked+1, last)
		}
		if acked > reg.acked {
			reg.acked = acked
			if err := a.acknowledge(ctx, acked); err != nil {
				return err
			}
		}
		if acked >= a.journal.Ledger().Sequence {
			return nil
		}
	}
}

// heed takes what the server that counts says beside what it knows.
func (a *reporter) heed(resp *nodev1.ReportResponse) {
	a.setDecided(resp.GetDecides().AsDuration())
	if a.cordoned.Swap(resp.GetCordoned()) != resp.GetCordoned() {
		a.poke()
	}
}

// acknowledge notes that the server has the changes up to n, if it is the one that counts.
func (a *reporter) acknowledge(ctx context.Context, n int64) error {
	if !a.counts {
		return nil
	}
	if err := a.journal.Acknowledge(ctx, n); err != nil {
		return err
	}
	a.acked.Store(n)
	a.poke()
	return nil
}

// nextReport makes the next report, and says up to which change it tells everything.
func (a *reporter) nextReport(ctx context.Context, reg *registration) (req *nodev1.ReportRequest, last int64, err error) {
	l := a.journal.Ledger()
	req = &nodev1.ReportRequest{
		NodeId: string(a.node), Epoch: reg.epoch, Load: toWireLoad(&l, a.used.now()), Busy: a.busyBoxes(), Time: toWireTime(now()),
	}
	if !reg.full {
		changes, complete, err := a.journal.Changes(ctx, reg.acked, maxReport)
		if err != nil {
			return nil, 0, err
		}
		if complete {
			for i := range changes {
				req.Changes = append(req.Changes, toWireChange(&changes[i]))
			}
			return req, reg.acked + int64(len(changes)), nil
		}
		reg.whole = true
	}
	req.Full = true
	if req.Changes, err = a.everything(ctx); err != nil {
		return nil, 0, err
	}
	return req, l.Sequence, nil
}

// everything returns the newest change of every sandbox that somebody was told of, and all changes that no server has
// acknowledged, in their order.
func (a *reporter) everything(ctx context.Context) ([]*nodev1.Change, error) {
	recs, err := a.journal.Records(ctx)
	if err != nil {
		return nil, err
	}
	var all []journal.Change
	for i := range recs {
		if r := &recs[i]; r.Last.Sequence > 0 {
			all = append(all, journal.Change{Sequence: r.Last.Sequence, Time: r.Last.Time, Type: r.Last.Type, Sandbox: r.Sandbox})
		}
	}
	l := a.journal.Ledger()
	for after := max(l.Acknowledged, l.Oldest-1); after < l.Sequence; after += maxReport {
		changes, _, err := a.journal.Changes(ctx, after, maxReport)
		if err != nil {
			return nil, err
		}
		all = append(all, changes...)
	}
	slices.SortStableFunc(all, func(x, y journal.Change) int { return cmp.Compare(x.Sequence, y.Sequence) })
	all = slices.CompactFunc(all, func(x, y journal.Change) bool { return x.Sequence == y.Sequence })
	out := make([]*nodev1.Change, 0, len(all))
	for i := range all {
		out = append(out, toWireChange(&all[i]))
	}
	return out, nil
}
