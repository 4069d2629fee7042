package chaos

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/test/harness"
)

// step is the begin or the end of a fault.
type step struct {
	at    time.Duration
	begin bool
	fault Fault
}

// steps returns the begins and ends of faults in order of time.
func steps(faults []Fault) []step {
	out := make([]step, 0, 2*len(faults))
	for _, f := range faults {
		out = append(out, step{f.At, true, f}, step{f.At + f.For, false, f})
	}
	slices.SortStableFunc(out, func(a, b step) int { return cmp.Compare(a.at, b.at) })
	return out
}

// machine returns a machine of the cluster by its name; nil for none.
func machine(c *harness.Cluster, name string) *harness.Machine {
	for _, m := range slices.Concat(c.Nodes, c.Proxies, []*harness.Machine{c.Server}) {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// take carries out the begin or the end of a fault. A machine that is being started is waited for.
func (r *Run) take(ctx context.Context, s step) error {
	m, peer := machine(r.cluster, s.fault.Target), machine(r.cluster, s.fault.Peer)
	if started := r.starting[s.fault.Target]; started != nil && s.fault.Kind != Drain {
		<-started
	}
	switch s.fault.Kind {
	case Kill, Power:
		return r.stop(ctx, s, m)
	case Halt:
		return syscall.Kill(m.PID(), pick(s.begin, syscall.SIGSTOP, syscall.SIGCONT))
	case Freeze:
		pick(s.begin, m.Stop, m.Cont)()
	case Isolate:
		pick(s.begin, r.cluster.Lab.Isolate, r.cluster.Lab.Rejoin)(m)
	case Cut:
		pick(s.begin, r.cluster.Lab.Partition, r.cluster.Lab.Mend)(m, peer)
	case Deaf:
		pick(s.begin, r.cluster.Lab.PartitionOneWay, r.cluster.Lab.Mend)(peer, m)
	case Fill:
		return pick(s.begin, m.Fill, m.Free)()
	case Drain:
		r.calls.Go(func() { r.drain(ctx, s) })
	case Clock:
		return r.setClock(m, pick(s.begin, s.fault.Step, 0))
	}
	return nil
}

func pick[T any](first bool, a, b T) T {
	if first {
		return a
	}
	return b
}

// stop ends a daemon or its whole machine, or starts it again.
func (r *Run) stop(ctx context.Context, s step, m *harness.Machine) error {
	switch {
	case !s.begin:
		started := make(chan struct{})
		r.starting[m.Name] = started
		r.calls.Go(func() { // a daemon may wait for a server that stands still
			defer close(started)
			m.Again()
		})
	case s.fault.Kind == Kill:
		m.Signal(syscall.SIGKILL)
	default:
		m.Kill()
		records, err := readJournal(ctx, m, r.scratch)
		if err != nil {
			return err
		}
		r.ledger.Excuse(ran(records)...)
	}
	return nil
}

// ran returns the sandboxes that a power failure ends: those whose processes are not kept anywhere. One that came from elsewhere
// and has not run here is still there.
func ran(records []journal.Record) []string {
	var out []string
	for i := range records {
		r := &records[i]
		switch r.State { //nolint:exhaustive // all others are kept, or have ended
		case sandbox.StateCreating, sandbox.StateRunning, sandbox.StatePausing, sandbox.StateResuming, sandbox.StateStopping:
			out = append(out, string(r.ID))
		case sandbox.StateMigrating:
			if r.Checkpoint == "" && !r.Received {
				out = append(out, string(r.ID))
			}
		default:
		}
	}
	return out
}

// drain begins to empty a node, or opens it again. A server that does not answer is part of the game.
func (r *Run) drain(ctx context.Context, s step) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var err error
	if s.begin {
		_, err = r.user.api.DrainNode(ctx, s.fault.Target, client.DrainNode{Reason: "chaos"})
	} else {
		if n, err := r.user.api.Node(ctx, s.fault.Target); err == nil && n.Drain != nil {
			r.note(event{What: "drained", Drain: n.Drain})
		}
		err = r.uncordon(ctx, s.fault.Target)
	}
	if err != nil {
		r.note(event{What: "drain", Fault: &s.fault, Err: err.Error()})
	}
}

func (r *Run) uncordon(ctx context.Context, node string) error {
	no := false
	_, err := r.user.api.UpdateNode(ctx, node, client.UpdateNode{Cordoned: &no})
	return err
}

// setClock sets the clock of a machine's daemon apart from the others', also of one that is started later.
func (r *Run) setClock(m *harness.Machine, by time.Duration) error {
	r.mu.Lock()
	r.skews[m.Name] = by
	r.mu.Unlock()
	if !m.Running() {
		return nil
	}
	return skew(m.PID(), by)
}

// started gives a daemon that was just started its machine's clock.
func (r *Run) started(m *harness.Machine, pid int) {
	r.mu.Lock()
	by := r.skews[m.Name]
	if m == r.cluster.Server {
		r.serverSince = time.Now()
	}
	r.mu.Unlock()
	if by == 0 {
		return
	}
	if err := skew(pid, by); err != nil {
		r.tb.Errorf("%s: %v", m.Name, err)
	}
}

// heal undoes what a plan leaves: nothing but what a failed step has left.
func (r *Run) heal(ctx context.Context) {
	r.cluster.Lab.Heal()
	nodes, err := r.user.api.Nodes(ctx)
	if err != nil {
		return // settle asks again
	}
	for i := range nodes {
		if n := &nodes[i]; n.Cordoned || strings.HasPrefix(n.State, "drain") {
			if err := r.uncordon(ctx, n.Name); err != nil {
				r.note(event{What: "uncordon", Err: err.Error()})
			}
		}
	}
}
