package scheduler

import "github.com/cloister-dev/cloister/internal/sandbox"

// judge applies the filters in the order in which a person would want to hear of them, then scores.
func (p *rules) judge(n *Node, r *Request) Verdict {
	v := Verdict{
		Node: n.ID, Want: r.Resources, State: n.State, Creating: n.Creating, Warm: n.Warm, Sandboxes: n.Sandboxes,
		Limit: p.limit(n.Capacity),
	}
	v.Free = v.Limit.Sub(n.Allocated)
	taint, against := untolerated(n.Taints, r.Tolerations)
	missing, lacks := r.Selector.missing(n.Labels)
	hasImage := n.hasImage(r.Image)
	switch {
	case n.Cordoned:
		v.Refusal = Cordoned
	case n.State != sandbox.NodeReady:
		v.Refusal = NotReady
	case !n.hasEngine(r.Engine):
		v.Refusal = NoEngine
	case !n.Machine.Takes(r.MadeOn):
		v.Refusal, v.Machine, v.MadeOn = NoFit, n.Machine, r.MadeOn
	case lacks:
		v.Refusal, v.Missing = NoLabel, missing
	case taint != nil:
		v.Refusal, v.Taint = Tainted, taint
	case !r.Resources.Fits(v.Limit):
		v.Refusal = TooLarge
	case !hasImage && !r.Fetch:
		v.Refusal = NoImage
	case !r.Resources.Fits(v.Free):
		v.Refusal = NoRoom
	case n.Creating >= p.MaxCreating:
		v.Refusal = Busy
	}
	if v.Refusal != Accepted {
		return v
	}
	v.Load = load(n.Allocated.Add(r.Resources), v.Limit)
	v.Score = p.Weights.apply(p.parts(n, r, &v, against, hasImage))
	if n.Failures.Count >= p.MaxFailures {
		if v.Failures = n.Failures.Now(r.Now, p.FailureHalfLife); v.Failures >= p.MaxFailures {
			v.Refusal = Broken
		}
	}
	return v
}

// fewSandboxes is the number of sandboxes at which a node counts as half as good as an empty one.
const fewSandboxes = 100

// parts returns what speaks for a node, each part 0 to 1.
func (p *rules) parts(n *Node, r *Request, v *Verdict, against int, hasImage bool) Weights {
	parts := Weights{
		Load: 1 - v.Load, Creating: 1 - float64(v.Creating)/float64(p.MaxCreating),
		Sandboxes: fewSandboxes / float64(fewSandboxes+max(0, n.Sandboxes)),
		UsedCPU:   1 - min(1, max(0, n.UsedCPU)), UsedMemory: 1 - min(1, max(0, n.UsedMemory)),
		Affinity: preferred(n.Labels, r.Preferences, against),
	}
	if p.Strategy == Binpack {
		parts.Load, parts.Sandboxes = 1-parts.Load, 1-parts.Sandboxes
	}
	if v.Warm > 0 {
		parts.Warm = 1
	}
	if hasImage {
		parts.Image = 1
	}
	return parts
}

// apply returns the weighted mean of the parts, 0 to 1.
func (w Weights) apply(parts Weights) float64 {
	sum := w.Load*parts.Load + w.Warm*parts.Warm + w.Creating*parts.Creating + w.Sandboxes*parts.Sandboxes +
		w.UsedCPU*parts.UsedCPU + w.UsedMemory*parts.UsedMemory + w.Image*parts.Image + w.Affinity*parts.Affinity
	return sum / w.sum()
}

// preferred returns 1 where everything speaks for the node, 0 where everything speaks against it, and one half where there
// is nothing to prefer. A taint that speaks against it counts as a preference of the largest weight.
func preferred(labels map[string]string, preferences []Preference, against int) float64 {
	if len(preferences) == 0 && against == 0 {
		return 0.5
	}
	sum, most := -against*maxPreference, against*maxPreference
	for i := range preferences {
		weight := preferences[i].Weight
		if _, lacks := preferences[i].Selector.missing(labels); !lacks {
			sum += weight
		}
		most += max(weight, -weight)
	}
	return (1 + float64(sum)/float64(max(1, most))) / 2
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
