package scheduler

import (
	"cmp"
	"hash/fnv"
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
	// Next is where RoundRobin goes on with the next request.
	Next int
}

// Place picks a random sample of the nodes that can take the request and orders it by score. It looks at nodes until
// the sample is full, so that a create costs the same in a large cluster; only when too few nodes fit does it look at
// all of them, so that a refusal means that there is no room anywhere in the snapshot.
//
// Nodes that failed too often lately are candidates only where there are no others.
func Place(s Snapshot, r Request) Decision {
	policy := rules{s.Policy.WithDefaults()}
	c := collector{policy: &policy, keep: keptRefusals, fits: make([]Verdict, 0, min(policy.Sample, len(s.Nodes)))}
	steps, skip := newWalk(len(s.Nodes), &policy.Policy, &r), -1
	if policy.Strategy == Sticky && r.Previous > 0 && r.Previous <= len(s.Nodes) {
		skip = r.Previous - 1
		c.add(policy.judge(&s.Nodes[skip], &r))
	}
	next := r.Start
	for range s.Nodes {
		i := steps.next()
		if i == skip {
			continue
		}
		before := len(c.fits)
		c.add(policy.judge(&s.Nodes[i], &r))
		if before == 0 && len(c.fits) == 1 {
			next = i + 1
		}
		if len(c.fits) == policy.Sample {
			break
		}
	}
	d := c.decide(&r)
	d.Next = next
	return d
}

// collector sorts verdicts into those that fit, those that fit but are broken, and refusals.
type collector struct {
	policy *rules
	// keep bounds the refusals that are explained.
	keep     int
	fits     []Verdict
	broken   []Verdict
	refused  []Verdict
	refusals int
	tooLarge int
}

func (c *collector) add(v Verdict) {
	if v.Refusal == Accepted {
		c.fits = append(c.fits, v)
		return
	}
	c.refusals++
	if v.Refusal == TooLarge {
		c.tooLarge++
	}
	if v.Refusal == Broken && len(c.broken) < c.policy.Sample {
		c.broken = append(c.broken, v)
		return
	}
	if len(c.refused) < c.keep {
		c.refused = append(c.refused, v)
	}
}

func (c *collector) decide(r *Request) Decision {
	fits, last := c.fits, c.broken
	if len(fits) == 0 { // a node that fails may work again; no node at all never does
		fits, last = c.broken, nil
		c.refusals -= len(fits)
		for i := range fits {
			fits[i].Refusal = Accepted
		}
	}
	if c.policy.Strategy.ordered() {
		for i := range fits {
			fits[i].Score = 1 - float64(i)/float64(len(fits))
		}
	} else {
		// The sample's own order is random, and a stable sort keeps it among equals.
		slices.SortStableFunc(fits, func(a, b Verdict) int { return cmp.Compare(b.Score, a.Score) })
		c.policy.draw(fits, r.Random)
	}
	d := Decision{Refused: c.refusals, TooLarge: len(fits) == 0 && c.refusals > 0 && c.tooLarge == c.refusals}
	d.Candidates = make([]sandbox.NodeID, len(fits))
	for i := range fits {
		d.Candidates[i] = fits[i].Node
	}
	room := max(0, c.keep-len(last))
	d.Verdicts = append(append(fits, last...), c.refused[:min(room, len(c.refused))]...)
	return d
}

// draw moves one of the best candidates to the front; the others keep their order.
func (p *rules) draw(fits []Verdict, random Source) {
	n := min(p.PrioritySelectNum, len(fits))
	if n < 2 || random == nil {
		return
	}
	i := int(random.Uint64() % uint64(n)) //nolint:gosec // below n, which is an int
	if p.LeastSelectName == Weighted {
		i = drawWeighted(fits[:n], random)
	}
	chosen := fits[i]
	copy(fits[1:i+1], fits[:i])
	fits[0] = chosen
}

func drawWeighted(fits []Verdict, random Source) int {
	sum := 0.0
	for i := range fits {
		sum += fits[i].Score
	}
	const mantissa = 53
	at := float64(random.Uint64()>>(64-mantissa)) / (1 << mantissa) * sum
	for i := range fits {
		if at -= fits[i].Score; at < 0 {
			return i
		}
	}
	return 0
}

// walk visits each of n positions once, in an order that is random enough to balance load and costs no memory: from a
// random start in steps of a random length that shares no factor with n.
type walk struct{ n, at, step int }

// newWalk begins where the strategy says: anywhere, where the key says, or where the decision before left off.
func newWalk(n int, p *Policy, r *Request) walk {
	w := walk{n: n, at: n - 1, step: 1}
	switch {
	case n < 2:
	case p.Strategy == RoundRobin:
		w.at = (max(0, r.Start) + n - 1) % n
	case p.Strategy == Sticky && r.Key != "":
		h := fnv.New64a()
		_, _ = h.Write([]byte(r.Key)) // a hash takes everything
		sum := h.Sum64()
		w.jump(sum, mix(sum))
	case r.Random != nil:
		w.jump(r.Random.Uint64(), r.Random.Uint64())
	}
	return w
}

// mix makes another number of a hash: the finalizer of SplitMix64 (Steele, Lea, Flood 2014).
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (w *walk) jump(start, length uint64) {
	size := uint64(w.n)               //nolint:gosec // a number of nodes
	w.at = int(start % size)          //nolint:gosec // below n, which is an int
	w.step = 1 + int(length%(size-1)) //nolint:gosec // below n, which is an int
	for commonFactor(w.step, w.n) != 1 {
		w.step = w.step%(w.n-1) + 1
	}
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
