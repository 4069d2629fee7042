package scheduler

import (
	"math"
	"time"
)

// Failures counts what went wrong at a node lately: each failure counts 1 at first and half as much after each half-life,
// so that a node that was left alone is tried again by itself. The zero value is none.
type Failures struct {
	Count float64
	At    time.Time
}

// negligible is what counts as none, so that an untroubled node costs no arithmetic.
const negligible = 0.01

// Now returns the count as of now.
func (f Failures) Now(now time.Time, halfLife time.Duration) float64 {
	if f.Count == 0 || halfLife <= 0 {
		return f.Count
	}
	return f.Count * math.Exp2(-max(0, now.Sub(f.At).Seconds())/halfLife.Seconds())
}

// Failed returns the count after another failure.
func (f Failures) Failed(now time.Time, halfLife time.Duration) Failures {
	return Failures{Count: f.Now(now, halfLife) + 1, At: now}
}

// Succeeded returns the count after a success, which speaks for half of the failures.
func (f Failures) Succeeded(now time.Time, halfLife time.Duration) Failures {
	if f.Count == 0 {
		return f
	}
	if half := f.Now(now, halfLife) / 2; half > negligible {
		return Failures{Count: half, At: now}
	}
	return Failures{}
}
