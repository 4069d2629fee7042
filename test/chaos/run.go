package chaos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/test/harness"
)

const (
	// settleIn is how long the cluster may take to be at rest after everything is healed.
	settleIn = time.Minute
	// late is how long after its time an operation is still begun; what is later is left out.
	late = 5 * time.Second
	// lookEvery is how often processes are compared while things go wrong, and sumEvery what the nodes have admitted.
	lookEvery = 200 * time.Millisecond
	sumEvery  = 2 * time.Second
	// asked is how many killed sandboxes the proxy is asked for after a round.
	asked = 5
	// longRun is from how many rounds on a run waits in the end for what is kept for a while.
	longRun = 10
)

// Run carries out a plan on a cluster.
type Run struct {
	tb      testing.TB
	cluster *harness.Cluster
	user    *user
	ledger  *Ledger
	scratch string
	// ids are the nodes' by the machines' names, capacity what each may admit.
	ids      map[string]string
	capacity map[string]sandbox.Resources
	spare    int
	// calls are what faults began; starting are closed when a machine's daemon is ready again.
	calls    sync.WaitGroup
	starting map[string]chan struct{}

	mu sync.Mutex
	// skews are by how much daemons' clocks are apart from the machine's, by the machines' names.
	skews map[string]time.Duration
	// serverSince is when the server was started last.
	serverSince time.Time
	round       int
	events      []event
	found       []Violation
	counts      map[string]int
	slowest     time.Duration
}

// NewRun prepares a run on a cluster whose nodes are ready; spare is how many network links each keeps ready.
func NewRun(tb testing.TB, c *harness.Cluster, spare int) *Run {
	tb.Helper()
	r := &Run{
		tb: tb, cluster: c, ledger: NewLedger(), scratch: tb.TempDir(), ids: map[string]string{},
		capacity: map[string]sandbox.Resources{}, spare: spare, counts: map[string]int{}, starting: map[string]chan struct{}{},
		skews: map[string]time.Duration{}, serverSince: time.Now(),
	}
	nodes, err := c.Client().Nodes(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	const perNode = 5
	var least int64
	for _, n := range nodes {
		r.ids[n.Name], r.capacity[n.Name] = n.ID, sandbox.Resources(n.Capacity)
		if share := n.Capacity.MemoryBytes / perNode; least == 0 || share < least {
			least = share
		}
	}
	r.user = newUser(c, least)
	for _, m := range slices.Concat(c.Nodes, c.Proxies, []*harness.Machine{c.Server}) {
		m.Started = func(pid int) { r.started(m, pid) }
	}
	tb.Cleanup(r.user.close)
	return r
}

// Do carries out the rounds, and stops after the first that breaks a promise.
func (r *Run) Do(rounds []Round) {
	for i, round := range rounds {
		r.mu.Lock()
		r.round = i + 1
		r.mu.Unlock()
		r.active(round)
		if r.tb.Failed() || !r.settle() { // a daemon did not start
			break
		}
	}
	if !r.tb.Failed() {
		r.finish()
	}
	r.tb.Logf("%d rounds; %s; settled within %s", r.round, r.summary(), r.slowest.Round(time.Millisecond))
	r.tb.Logf("of it the server tells: %s", r.history())
}

// history counts what the server itself says that has happened.
func (r *Run) history() string {
	var out []string
	for _, kind := range []string{"node_suspect", "node_down", "lost", "found", "moved", "recovered", "kill_wanted"} {
		events, err := r.user.api.Events(r.tb.Context(), client.ListEvents{Type: kind, Limit: 1000})
		if err != nil {
			return err.Error()
		}
		out = append(out, fmt.Sprintf("%s %d", kind, len(events)))
	}
	return strings.Join(out, ", ")
}

// summary counts what was done.
func (r *Run) summary() string {
	var out []string
	for _, what := range slices.Sorted(maps.Keys(r.counts)) {
		out = append(out, fmt.Sprintf("%s %d", what, r.counts[what]))
	}
	return strings.Join(out, ", ")
}

// note keeps an event and counts it.
func (r *Run) note(e event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.Time, e.Round = time.Now(), r.round
	r.events = append(r.events, e)
	what := e.What
	if e.Err != "" {
		what += " (no)"
	}
	r.counts[what]++
}

// violated keeps what broke a promise.
func (r *Run) violated(all ...Violation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.found = append(r.found, all...)
}

// active has things go wrong while the cluster is used.
func (r *Run) active(round Round) {
	ctx, cancel := context.WithCancel(r.tb.Context())
	defer cancel()
	began := time.Now()
	var slots, watch sync.WaitGroup
	for _, ops := range round.Load {
		slots.Go(func() { r.use(ctx, began, ops) })
	}
	watch.Go(func() { r.watch(ctx) })
	for _, s := range steps(round.Faults) {
		pause(ctx, time.Until(began.Add(s.at)))
		err := r.take(ctx, s)
		if s.begin {
			r.note(event{What: "fault " + string(s.fault.Kind), Fault: &s.fault})
		} else {
			r.note(event{What: "end of " + string(s.fault.Kind), Fault: &s.fault})
		}
		if err != nil {
			r.tb.Fatalf("%+v: %v", s, err)
		}
	}
	slots.Wait()
	r.calls.Wait()
	cancel()
	watch.Wait()
}

// use carries out the operations of one slot.
func (r *Run) use(ctx context.Context, began time.Time, ops []Operation) {
	for _, op := range ops {
		wait := time.Until(began.Add(op.At))
		if wait < -late {
			r.note(event{What: "left out"})
			continue
		}
		if !pause(ctx, wait) {
			return
		}
		at := time.Now()
		verb, b, err := r.user.do(ctx, r.ledger, op.Slot, op.Verb)
		e := event{What: string(verb), Slot: &op.Slot, ID: b.ID, Took: time.Since(at)}
		if err != nil {
			e.Err = err.Error()
		}
		r.note(e)
		switch {
		case errors.Is(err, errHang):
			r.violated(Violation{Rule: "hang", ID: b.ID, Text: err.Error()})
		case errors.Is(err, errEarly) && !r.ledger.Promises().Boxes[op.Slot].Excused:
			r.violated(Violation{Rule: "early", ID: b.ID, Text: err.Error()})
		case client.IsNotFound(err) && verb != Create && !r.ledger.Promises().Boxes[op.Slot].Excused:
			r.violated(Violation{Rule: "lost", ID: b.ID, Text: "the server does not know a sandbox that was acknowledged: " + err.Error()})
		case errors.Is(err, errContent):
			r.violated(Violation{Rule: "lost", ID: b.ID, Text: err.Error()})
		}
	}
}

// watch looks for what must not be at any time.
func (r *Run) watch(ctx context.Context) {
	for last := time.Now(); pause(ctx, lookEvery); {
		found := r.twice(ctx)
		if time.Since(last) >= sumEvery {
			last = time.Now()
			for _, m := range r.cluster.Nodes {
				records, err := readJournal(ctx, m, r.scratch)
				if err != nil {
					continue // it is being written to: the next time
				}
				r.note(event{What: "sum"})
				found = append(found, Overcommit(&MachineView{Name: m.Name, Capacity: r.capacity[m.Name], Records: records})...)
			}
		}
		r.violated(found...)
		if len(found) > 0 {
			return
		}
	}
}

// settle waits until the healed cluster keeps every promise, and reports whether it does.
func (r *Run) settle() bool {
	ctx, cancel := context.WithTimeout(r.tb.Context(), settleIn)
	defer cancel()
	began := time.Now()
	for {
		v, found := r.check(ctx)
		if len(found) == 0 {
			r.resolve(ctx, v)
			break
		}
		if time.Since(began) > settleIn-settleIn/10 || !pause(ctx, 250*time.Millisecond) {
			r.violated(found...)
			break
		}
	}
	r.slowest = max(r.slowest, time.Since(began))
	r.note(event{What: "settled", Took: time.Since(began)})
	return r.tell()
}

// check heals what can be healed and says which promises are not kept now.
func (r *Run) check(ctx context.Context) (*View, []Violation) {
	r.heal(ctx)
	if found := r.crashed(); len(found) > 0 {
		return nil, found
	}
	v, err := r.look(ctx)
	if err != nil {
		return nil, []Violation{{Rule: "stuck", Text: err.Error()}}
	}
	if found := Check(r.ledger.Promises(), v); len(found) > 0 {
		return v, found
	}
	return v, r.contents(ctx)
}

// crashed says which daemons have ended by themselves.
func (r *Run) crashed() []Violation {
	var out []Violation
	for _, m := range slices.Concat(r.cluster.Nodes, r.cluster.Proxies, []*harness.Machine{r.cluster.Server}) {
		if _, ok := alive(m.PID()); !ok { // all were started
			out = append(out, Violation{Rule: "crash", Machine: m.Name, Text: "the daemon has ended by itself: " + tail(m.Log())})
		}
	}
	return out
}

func tail(text string) string { return text[max(0, len(text)-2000):] }

// look returns what is found on all machines.
func (r *Run) look(ctx context.Context) (*View, error) {
	v := &View{Sandboxes: map[string]client.Sandbox{}, Routed: map[string]bool{}}
	var err error
	if v.Nodes, err = r.user.api.Nodes(ctx); err != nil {
		return nil, fmt.Errorf("the server does not list its nodes: %w", err)
	}
	v.Up = time.Since(r.serverSince)
	all := sentries(r.cluster.Nodes)
	for _, m := range r.cluster.Nodes {
		mv := MachineView{
			Name: m.Name, NodeID: r.ids[m.Name], Capacity: r.capacity[m.Name], Sentries: all[m.Name], Groups: groups(r.ids[m.Name]),
			Links: links(r.tb.Context(), m, r.ids[m.Name]), Spare: r.spare, Checkpoints: checkpoints(m),
		}
		if mv.Records, err = readJournal(ctx, m, r.scratch); err != nil {
			return nil, err
		}
		v.Machines = append(v.Machines, mv)
	}
	for s, err := range r.user.api.AllSandboxes(ctx, client.ListSandboxes{Limit: 1000}) {
		if err != nil {
			return nil, fmt.Errorf("the server does not list its sandboxes: %w", err)
		}
		v.Sandboxes[s.ID] = s
	}
	for _, id := range r.lastDead() {
		gone, err := r.user.unknown(ctx, Box{ID: id})
		v.Routed[id] = err == nil && !gone
	}
	return v, nil
}

// lastDead returns the sandboxes that were killed last.
func (r *Run) lastDead() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, e := range slices.Backward(r.events) {
		if e.What == string(End) && e.Err == "" && len(out) < asked {
			out = append(out, e.ID)
		}
	}
	return out
}

// contents compares what running sandboxes hold with what was written.
func (r *Run) contents(ctx context.Context) []Violation {
	var out []Violation
	boxes := r.ledger.Promises().Boxes
	for _, slot := range slices.Sorted(maps.Keys(boxes)) {
		b := boxes[slot]
		if b.Belief != Running || b.Excused || b.mayEnd(time.Now()) {
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, bound)
		if err := r.user.read(callCtx, b); err != nil {
			out = append(out, Violation{Rule: "lost", ID: b.ID, Text: "the sandbox cannot be read from: " + err.Error()})
		}
		cancel()
	}
	return out
}

// resolve notes what has become of what was not known, and ends what nobody knew of.
func (r *Run) resolve(ctx context.Context, v *View) {
	known := map[string]bool{}
	for slot, b := range r.ledger.Promises().Boxes {
		known[b.ID] = true
		s, ok := v.Sandboxes[b.ID]
		switch {
		case !ok || sandbox.State(s.State).Ended():
			r.ledger.Drop(slot, !b.Excused)
		case b.Belief == Unsure:
			b.Belief = Belief(s.State)
			r.ledger.Set(slot, b)
		}
	}
	for id, s := range v.Sandboxes {
		if !known[id] && !sandbox.State(s.State).Ended() {
			err := r.user.api.KillSandbox(ctx, id)
			r.note(event{What: "unknown killed", ID: id, Err: text(err)})
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// finish reads every sandbox once more, the paused ones too, and ends it. Then nothing may be left.
func (r *Run) finish() {
	ctx := r.tb.Context()
	boxes := r.ledger.Promises().Boxes
	order := slices.SortedFunc(maps.Keys(boxes), func(a, b int) int {
		return strings.Compare(string(boxes[b].Belief), string(boxes[a].Belief)) // those that run make room
	})
	for _, slot := range order {
		for _, verb := range []Verb{Toggle, Read, End} {
			if brief(slot) && verb != End {
				continue
			}
			if belief := boxes[slot].Belief; verb == Toggle && belief == Running || verb != End && belief == Doomed {
				continue
			}
			done, b, err := r.user.do(ctx, r.ledger, slot, verb)
			r.note(event{What: "last " + string(done), ID: b.ID, Err: text(err)})
			if err != nil && boxes[slot].Belief != Doomed {
				r.violated(Violation{Rule: "lost", ID: b.ID, Text: "the sandbox cannot be used in the end: " + err.Error()})
			}
		}
	}
	if r.settle() && r.round >= longRun {
		r.emptied()
	}
}

// emptied waits until no node has a checkpoint any more, which takes as long as copies are kept that nothing needs.
func (r *Run) emptied() {
	for began := time.Now(); ; {
		var left []string
		for _, m := range r.cluster.Nodes {
			for name := range checkpoints(m) {
				if !strings.HasPrefix(name, partialPrefix) {
					left = append(left, m.Name+" "+name)
				}
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Since(began) > staleAfter || !pause(r.tb.Context(), time.Second) {
			r.violated(Violation{Rule: "orphan", Text: fmt.Sprintf("checkpoints after the end of every sandbox: %v", left)})
			r.tell()
			return
		}
	}
}

// tell fails the test for what was found, with what there is to know about it. It reports whether nothing was.
func (r *Run) tell() bool {
	r.mu.Lock()
	found := r.found
	r.found = nil
	events := slices.Clone(r.events)
	r.mu.Unlock()
	for _, v := range found {
		r.tb.Errorf("round %d: %+v", r.round, v)
	}
	if len(found) == 0 {
		return true
	}
	for _, e := range events {
		if e.Round == r.round && (e.Fault != nil || e.What == "settled" || slices.ContainsFunc(found, func(v Violation) bool { return v.ID == e.ID && v.ID != "" })) {
			r.tb.Log(e)
		}
	}
	told := map[string]bool{}
	for _, v := range found {
		if v.ID != "" && !told[v.ID] && len(told) < 3 {
			told[v.ID] = true
			r.evidence(v.ID)
		}
	}
	return false
}

// evidence logs everything that names a sandbox.
func (r *Run) evidence(id string) {
	ctx := r.tb.Context()
	s, err := r.user.api.GetSandbox(ctx, id)
	r.tb.Logf("the server on %s: %+v, %v", id, s, err)
	all := sentries(r.cluster.Nodes)
	for _, m := range r.cluster.Nodes {
		records, err := readJournal(ctx, m, r.scratch)
		if err != nil {
			r.tb.Log(err)
		}
		for i := range records {
			if string(records[i].ID) == id {
				r.tb.Logf("%s has %+v", m.Name, records[i])
			}
		}
		if pids := all[m.Name][id]; len(pids) > 0 {
			r.tb.Logf("%s has processes %v", m.Name, pids)
		}
	}
	const most = 60
	for _, m := range slices.Concat(r.cluster.Nodes, r.cluster.Proxies, []*harness.Machine{r.cluster.Server}) {
		for _, line := range m.LogLines(id, most) {
			r.tb.Logf("%s: %s", m.Name, line)
		}
	}
}

// WriteEvents writes the whole time line, one JSON object per line.
func (r *Run) WriteEvents(write func(string) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if err := write(e.String() + "\n"); err != nil {
			return err
		}
	}
	return nil
}
