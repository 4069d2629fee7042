package scheduler

import (
	"cmp"
	"slices"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// keptRefusals bounds the explanations of a decision in a large and full cluster; Refused counts them all.
const keptRefusals = 32

// Decision is an answer and its reasons.
type Decision struct {
	// Candidates are the nodes to ask, best first.
	Candidates []sandbox.NodeID
	// Verdicts explain each node that was looked at, the candidates first, in their order; of the refused ones at most 32.
	Verdicts []Verdict
	// Refused counts the nodes that were looked at and cannot take the request.
	Refused int
	// TooLarge means that nodes were looked at and not one of them could take the request even if it were empty.
	TooLarge bool
}

// Place picks a random sample of the nodes that can take the request and orders it by score. It looks at nodes until
// the sample is full, so that a create costs the same in a large cluster; only when too few nodes fit does it look at
// all of them, so that a refusal means that there is no room anywhere in the snapshot.
func Place(s Snapshot, r Request) Decision {
	policy := s.Policy.withDefaults()
	var d Decision
	fits := make([]Verdict, 0, min(policy.Sample, len(s.Nodes)))
	var refused []Verdict
	tooLarge := 0
	steps := newWalk(len(s.Nodes), r.Random)
	for range s.Nodes {
		v := policy.judge(&s.Nodes[steps.next()], &r)
		if v.Refusal == Accepted {
			fits = append(fits, v)
			if len(fits) == policy.Sample {
				break
			}
			continue
		}
		d.Refused++
		if v.Refusal == TooLarge {
			tooLarge++
		}
		if len(refused) < keptRefusals {
			refused = append(refused, v)
		}
	}
	// The sample's own order is random, and a stable sort keeps it among equals.
	slices.SortStableFunc(fits, func(a, b Verdict) int { return cmp.Compare(b.Score, a.Score) })
	d.Candidates = make([]sandbox.NodeID, len(fits))
	for i, v := range fits {
		d.Candidates[i] = v.Node
	}
	d.Verdicts = append(fits, refused...)
	d.TooLarge = len(fits) == 0 && d.Refused > 0 && tooLarge == d.Refused
	return d
}

// judge applies the filters in the order in which a person would want to hear of them, then scores.
func (p Policy) judge(n *Node, r *Request) Verdict {
	v := Verdict{Node: n.ID, Want: r.Resources, State: n.State, Creating: n.Creating, Warm: n.Warm}
	limit := p.limit(n.Capacity)
	v.Limit, v.Free = limit, limit.Sub(n.Allocated)
	switch {
	case n.State != sandbox.NodeReady:
		v.Refusal = NotReady
	case !n.hasEngine(r.Engine):
		v.Refusal = NoEngine
	case !n.hasLabels(r.Labels):
		v.Refusal = NoLabel
	case !r.Resources.Fits(limit):
		v.Refusal = TooLarge
	case !n.hasImage(r.Image):
		v.Refusal = NoImage
	case !r.Resources.Fits(v.Free):
		v.Refusal = NoRoom
	case n.Creating >= p.MaxCreating:
		v.Refusal = Busy
	default:
		v.Load = load(n.Allocated.Add(r.Resources), limit)
		v.Score = p.score(&v)
	}
	return v
}

// score returns 0 to 1, more being better.
func (p Policy) score(v *Verdict) float64 {
	w := p.Weights
	use := 1 - v.Load
	if p.Strategy == Binpack {
		use = v.Load
	}
	sum := w.Load * use
	if v.Warm > 0 {
		sum += w.Warm
	}
	sum += w.Creating * (1 - float64(v.Creating)/float64(p.MaxCreating))
	return sum / (w.Load + w.Warm + w.Creating)
}

// load returns the fullest part of the machine, 0 to 1.
func load(used, limit sandbox.Resources) float64 {
	return max(part(used.MilliCPU, limit.MilliCPU), part(used.MemoryBytes, limit.MemoryBytes),
		part(used.DiskBytes, limit.DiskBytes))
}

func part(used, limit int64) float64 {
	if limit <= 0 {
		return 0
	}
	return min(1, max(0, float64(used)/float64(limit)))
}

// walk visits each of n positions once, in an order that is random enough to balance load and costs no memory: from a
// random start in steps of a random length that shares no factor with n.
type walk struct{ n, at, step int }

func newWalk(n int, random Source) walk {
	w := walk{n: n, at: n - 1, step: 1}
	if n < 2 || random == nil {
		return w
	}
	size := uint64(n)
	w.at = int(random.Uint64() % size)         //nolint:gosec // below n, which is an int
	w.step = 1 + int(random.Uint64()%(size-1)) //nolint:gosec // below n, which is an int
	for commonFactor(w.step, n) != 1 {
		w.step = w.step%(n-1) + 1
	}
	return w
}

func (w *walk) next() int {
	w.at = (w.at + w.step) % w.n
	return w.at
}

func commonFactor(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
