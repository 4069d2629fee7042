package proxy

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// retryInterval is how long a request that a node refused waits for news of the sandbox before it asks that node again.
const retryInterval = 250 * time.Millisecond

// again says whether a request that met u instead of an answer is to be sent again, and where: it waits until the
// sandbox runs. What was not sent is always sent again when its sandbox is on its way; what may have been sent only
// where resendable says that this is harmless. Where it is to be answered instead, the failure says with what; a nil one
// leaves that to diagnose.
func (f *forwarder) again(ctx context.Context, dest destination, u unanswered, resendable bool) (destination, bool, *failure) {
	if u.cut != nil || u.clientLeft || !dest.until.IsZero() && !time.Now().Before(dest.until) {
		return dest, false, nil
	}
	var dial *dialError
	unsent := errors.As(u.err, &dial)
	refused := unsent && errors.Is(u.err, sandbox.ErrConflict)
	switch {
	case unsent && !refused && !errors.Is(u.err, sandbox.ErrNotFound):
		return dest, false, nil
	case !unsent && !resendable:
		return dest, false, nil
	}
	if dest.until.IsZero() {
		dest.until = time.Now().Add(f.waits.timeout)
	}
	route, known := f.news(ctx, dest, min(patience(u, unsent, refused), time.Until(dest.until)))
	switch {
	case !known && refused && ctx.Err() == nil && !time.Now().Before(dest.until):
		return dest, false, overdue(dest.target, sandbox.StatePausing, u.err)
	case !known && refused && ctx.Err() == nil:
		return dest, true, nil // the node knew before the router, or has changed its mind
	case !known, !awaited(route) && route.State != sandbox.StateRunning, !unsent && byHand(route) && time.Since(dest.came) >= f.young:
		return dest, false, nil
	}
	next := dest
	next.route = route
	next, fail := f.waits.serving(ctx, next)
	if fail != nil && fail.cause == causeNotRunning && !unsent {
		return dest, false, nil // it was cut: diagnose says by what
	}
	return next, fail == nil, fail
}

// young is the age up to which a request that a pause by hand has cut counts as one that came during the pause, or after it:
// those resume the sandbox. An older one, such as a poll that was open for minutes, is answered: sent again, it would undo at
// once what somebody asked for.
const young = time.Second

// byHand reports whether somebody has a sandbox paused, in place of its end.
func byHand(r sandbox.Route) bool {
	return (r.State == sandbox.StatePausing || r.State == sandbox.StatePaused) && r.Reason == ""
}

// patience is how long news of a sandbox is waited for after a request met u. A connection that its node did not close
// says nothing about the sandbox.
func patience(u unanswered, unsent, refused bool) time.Duration {
	switch {
	case refused:
		return retryInterval
	case unsent, errors.Is(u.err, errSandboxEnded), errors.Is(u.broken, errSandboxEnded):
		return settleTime
	}
	return 0
}

// news waits a moment for the news that a sandbox is not any more where, or what, it was for a request.
func (f *forwarder) news(ctx context.Context, dest destination, patience time.Duration) (sandbox.Route, bool) {
	if patience <= 0 {
		route, err := f.router.Route(ctx, dest.id)
		return route, err == nil && route.News(dest.route)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	route, err := f.router.Await(ctx, dest.id, dest.route)
	return route, err == nil
}

// resendable reports whether a request that may have been sent can be sent once more: it does the same twice as once, or
// nothing of it was written, and nothing of its body is lost.
func resendable(method string, written, bodyBegun bool) bool {
	if bodyBegun {
		return false
	}
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return !written
}
