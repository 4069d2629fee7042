package lifecycle

import (
	"fmt"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Activity is what is known of a sandbox's use.
type Activity struct {
	// Open counts the requests that are open now, streams included.
	Open int
	// Last is when the last byte passed, or the last request ended; zero means never.
	Last time.Time
	// Busy means that its processes use the processor, where that counts as use.
	Busy bool
	// Complete means that everybody was heard who could know more.
	Complete bool
}

// Item is one sandbox whose time may have come.
type Item struct {
	Sandbox  sandbox.Sandbox
	Activity Activity
	// Known means that its node has reported since this leader began; what is known of others may be old.
	Known bool
}

// Kind is what is to be done with a sandbox.
type Kind string

// The kinds of verdicts.
const (
	// Nothing means that its time comes with the next change, if ever.
	Nothing Kind = "nothing"
	// Wait means to look again at Verdict.At.
	Wait  Kind = "wait"
	Kill  Kind = "kill"
	Pause Kind = "pause"
)

// Verdict is what is decided about one sandbox, and why.
type Verdict struct {
	ID         sandbox.ID
	Generation int64
	Kind       Kind
	// At is when to look again, for Wait.
	At time.Time
	// Forced means that it does not matter whether somebody uses it.
	Forced bool
	// Reason is for people.
	Reason string
}

// Policy is what can be set. The zero value of a field means its default.
type Policy struct {
	// PauseGrace is how long requests that are open at a fixed end may go on before the sandbox is paused; 5 s by default.
	// A sandbox whose timeout counts from its last use is never paused while a request is open.
	PauseGrace time.Duration
	// Recheck is how soon a sandbox that is in use, or of which not everything is known, is looked at again; 1 s by default.
	Recheck time.Duration
}

// WithDefaults returns p with what is not set.
func (p Policy) WithDefaults() Policy {
	if p.PauseGrace == 0 {
		p.PauseGrace = 5 * time.Second
	}
	if p.Recheck == 0 {
		p.Recheck = time.Second
	}
	return p
}

// Plan decides about each item, in their order. It never decides on an end before its time, and never pauses a sandbox
// whose use is not fully known, unless its end is fixed and the grace has passed.
func Plan(now time.Time, items []Item, p Policy) []Verdict {
	p = p.WithDefaults()
	out := make([]Verdict, 0, len(items))
	for i := range items {
		out = append(out, p.decide(now, &items[i]))
	}
	return out
}

func (p Policy) decide(now time.Time, it *Item) Verdict {
	s := &it.Sandbox
	v := Verdict{ID: s.ID, Generation: s.Generation}
	if s.State != sandbox.StateRunning || s.EndAt.IsZero() {
		v.Kind = Nothing
		return v
	}
	due := End(s, it.Activity)
	switch {
	case now.Before(due):
		v.Kind, v.At, v.Reason = Wait, due, "its time has not come"
	case !it.Known:
		v.Kind, v.At, v.Reason = Wait, now.Add(p.Recheck), "its node has not reported yet"
	case s.IdleTimeout:
		p.idle(now, it, &v)
	case s.AutoPause:
		p.fixedPause(now, it, &v)
	default:
		v.Kind, v.Forced, v.Reason = Kill, true, fixedReason
	}
	return v
}

// idle decides about a sandbox whose timeout, counted from its last use, has passed.
func (p Policy) idle(now time.Time, it *Item, v *Verdict) {
	a := &it.Activity
	switch {
	case a.Open > 0:
		v.Kind, v.At, v.Reason = Wait, now.Add(p.Recheck), "a request is open"
	case a.Busy:
		v.Kind, v.At, v.Reason = Wait, now.Add(p.Recheck), "its processes are at work"
	case !a.Complete:
		v.Kind, v.At, v.Reason = Wait, now.Add(p.Recheck), "not every proxy has said whether it is in use"
	case it.Sandbox.AutoPause:
		v.Kind, v.Reason = Pause, fmt.Sprintf("idle for %s", it.Sandbox.Timeout)
	default:
		v.Kind, v.Reason = Kill, fmt.Sprintf("idle for %s", it.Sandbox.Timeout)
	}
}

// fixedPause decides about a sandbox that is to be paused at a fixed end, which has come.
func (p Policy) fixedPause(now time.Time, it *Item, v *Verdict) {
	last := it.Sandbox.EndAt.Add(p.PauseGrace)
	if (it.Activity.Open > 0 || !it.Activity.Complete) && now.Before(last) {
		v.Kind, v.At, v.Reason = Wait, earlier(last, now.Add(p.Recheck)), "a request may be open"
		return
	}
	v.Kind, v.Forced, v.Reason = Pause, !now.Before(last), fixedReason
}

// fixedReason is why a sandbox ends at a fixed time, in the words that nodes use too.
const fixedReason = "timeout"

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// End returns when a running sandbox's time comes, as far as is known: its fixed end or, where the timeout counts from the
// last use, the timeout after that, whichever is later. Zero means never.
func End(s *sandbox.Sandbox, a Activity) time.Time {
	return s.EndAfter(a.Last)
}
