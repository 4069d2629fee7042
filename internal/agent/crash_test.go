package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/fake"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

var errCrashed = errors.New("the process is gone")

// crash ends the effects of a process at one of its steps: that step and all later ones do nothing. Steps are what the
// process does to the machine, and each write to the journal happens between two of them.
type crash struct {
	mu      sync.Mutex
	armed   bool
	at      int // the step that does not happen; below zero none
	after   bool
	steps   []string
	gone    bool
	journal func()
}

// step counts a step, and reports whether the process is gone before it.
func (c *crash) step(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return errCrashed
	}
	if !c.armed {
		return nil
	}
	c.steps = append(c.steps, name)
	if len(c.steps)-1 == c.at && !c.after {
		c.end()
		return errCrashed
	}
	return nil
}

// did ends the process after a step that has had its effect.
func (c *crash) did() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.armed && !c.gone && len(c.steps)-1 == c.at && c.after {
		c.end()
	}
}

func (c *crash) end() {
	c.gone = true
	c.journal()
}

// arm begins to count steps; when it ends, whatever comes is after the process's end.
func (c *crash) arm(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.armed, c.gone = on, !on
}

// crashes puts a crash in front of what the machine's next process works with.
func (m *machine) crashes(c *crash) {
	m.engine = func(e engine.Engine) engine.Engine { return crashEngine{e, c} }
	m.saves = func(s checkpoints) checkpoints { return crashSaves{s, c} }
	m.network = func(f *fakeNet) network { return crashNet{f, c} }
}

// crashEngine, crashSaves and crashNet put a crash in front of what the agent works with.
type crashEngine struct {
	engine.Engine
	c *crash
}

func (e crashEngine) Start(ctx context.Context, s engine.Spec) error {
	if err := e.c.step("start guest"); err != nil {
		return err
	}
	defer e.c.did()
	return e.Engine.Start(ctx, s)
}

func (e crashEngine) Stop(ctx context.Context, id sandbox.ID) error {
	if err := e.c.step("stop guest"); err != nil {
		return err
	}
	defer e.c.did()
	return e.Engine.Stop(ctx, id)
}

func (e crashEngine) Save(ctx context.Context, id sandbox.ID, s engine.SaveSpec) (engine.Saved, error) {
	if err := e.c.step("save guest"); err != nil {
		return engine.Saved{}, err
	}
	defer e.c.did()
	return e.Engine.Save(ctx, id, s)
}

func (e crashEngine) Thaw(ctx context.Context, id sandbox.ID) error {
	if err := e.c.step("thaw guest"); err != nil {
		return err
	}
	defer e.c.did()
	return e.Engine.Thaw(ctx, id)
}

type crashSaves struct {
	checkpoints
	c *crash
}

func (s crashSaves) Begin(id string) (*snapshot.Staging, error) {
	if err := s.c.step("begin checkpoint"); err != nil {
		return nil, err
	}
	defer s.c.did()
	return s.checkpoints.Begin(id)
}

func (s crashSaves) Commit(st *snapshot.Staging, m snapshot.Manifest) (snapshot.Manifest, error) {
	if err := s.c.step("commit checkpoint"); err != nil {
		return m, err
	}
	defer s.c.did()
	return s.checkpoints.Commit(st, m)
}

func (s crashSaves) Remove(id string) error {
	if err := s.c.step("remove checkpoint"); err != nil {
		return err
	}
	defer s.c.did()
	return s.checkpoints.Remove(id)
}

type crashNet struct {
	*fakeNet
	c *crash
}

func (f crashNet) Acquire(ctx context.Context, id sandbox.ID, p guestnet.Policy) (guestnet.Attachment, error) {
	if err := f.c.step("acquire network"); err != nil {
		return guestnet.Attachment{}, err
	}
	defer f.c.did()
	return f.fakeNet.Acquire(ctx, id, p)
}

func (f crashNet) Release(ctx context.Context, id sandbox.ID) error {
	if err := f.c.step("release network"); err != nil {
		return err
	}
	defer f.c.did()
	return f.fakeNet.Release(ctx, id)
}

// TestKilledAtEachStep ends the node's process before and after each step of each operation, with the machine going on or
// starting anew, and checks that the next process finds the old or the new state of the sandbox, never neither.
func TestKilledAtEachStep(t *testing.T) {
	running := func(*node, sandbox.ID) error { return nil }
	paused := func(n *node, id sandbox.ID) error { return n.pauseIt(id, kindMemory) }
	departed := func(n *node, id sandbox.ID) error { _, err := n.depart(id); return err }
	var comes comer
	for name, c := range map[string]struct {
		prepare func(*node, sandbox.ID) error
		act     func(*node, sandbox.ID) error
		// old and acted are what may be found, as "state memory/files".
		old, acted string
		steps      string
	}{
		"pause": {
			running, func(n *node, id sandbox.ID) error { return n.pauseIt(id, kindMemory) }, "running new/new", "paused new/new",
			"begin checkpoint, save guest, commit checkpoint, stop guest, release network",
		},
		"pause of files": {
			running, func(n *node, id sandbox.ID) error { return n.pauseIt(id, kindFiles) }, "running new/new", "paused /new",
			"begin checkpoint, save guest, commit checkpoint, stop guest, release network",
		},
		"resume": {
			paused, func(n *node, id sandbox.ID) error { _, err := n.resumeIt(id); return err }, "paused new/new", "running new/new",
			"acquire network, start guest, remove checkpoint",
		},
		"snapshot": {
			running, func(n *node, id sandbox.ID) error { _, err := n.save(id, "later", kindMemory); return err }, "running new/new", "running new/new",
			"begin checkpoint, save guest, commit checkpoint",
		},
		"snapshot of a paused one": {
			paused, func(n *node, id sandbox.ID) error { _, err := n.save(id, "later", kindMemory); return err }, "paused new/new", "paused new/new",
			"begin checkpoint, commit checkpoint",
		},
		"rollback": {
			running, func(n *node, id sandbox.ID) error { return n.rewind(id, "snap") }, "running new/new", "running old/old",
			"begin checkpoint, commit checkpoint, stop guest, release network, acquire network, start guest, remove checkpoint",
		},
		"rollback of a paused one": {
			paused, func(n *node, id sandbox.ID) error { return n.rewind(id, "snap") }, "paused new/new", "running old/old, paused old/old",
			"begin checkpoint, commit checkpoint, acquire network, start guest, remove checkpoint, remove checkpoint",
		},
		"kill of a paused one": {
			paused, func(n *node, id sandbox.ID) error { return n.kill(id) }, "paused new/new", "deleted: killed",
			"stop guest, release network, remove checkpoint",
		},
		"depart": {
			running, departed, "running new/new", "departed new/new",
			"",
		},
		"return": {
			departed, func(n *node, id sandbox.ID) error { return n.comeBack(id, 0) }, "departed new/new", "running new/new",
			"thaw guest",
		},
		"forget where it was": {
			departed, func(n *node, id sandbox.ID) error { return n.forget(id, 0) }, "departed new/new", "none",
			"stop guest, release network",
		},
		"receive": {
			comes.bring, func(n *node, _ sandbox.ID) error { return n.receive(comes.parcel, comes.generation) }, "none", "received new/new",
			"acquire network, start guest",
		},
		"arrive": {
			comes.receive, func(n *node, id sandbox.ID) error { return n.arrive(id, comes.generation) }, "received new/new", "running new/new",
			"thaw guest",
		},
		"forget where it came": {
			comes.receive, func(n *node, id sandbox.ID) error { return n.forget(id, comes.generation+1) }, "received new/new", "none",
			"stop guest, release network",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var steps []string
			for at := -1; at < len(steps); at++ {
				for _, after := range []bool{false, true} {
					for _, reboot := range []bool{false, true} {
						if at < 0 && (after || reboot) {
							continue // there is no step to end it at
						}
						bubble(t, func(m *machine) {
							trial := crashTrial{m: m, from: &comes, c: &crash{at: at, after: after}, reboot: reboot, prepare: c.prepare, act: c.act}
							found := trial.run()
							if at < 0 {
								steps = trial.steps
								if got := strings.Join(steps, ", "); got != c.steps {
									m.t.Errorf("steps: %s\nwant: %s", got, c.steps)
								}
							}
							where := "no step"
							if at >= 0 {
								where = fmt.Sprintf("step %d, %s (after it: %v)", at, steps[at], after)
							}
							allowed := append(strings.Split(c.acted, ", "), c.old)
							if name == "forget where it was" {
								allowed = append(allowed, "departed no guest") // it is forgotten when that is asked for again
							}
							if at < 0 {
								allowed = strings.Split(c.acted, ", ")[:1]
							}
							if reboot { // what ran is gone with the machine, and so is a guest that nobody watched
								allowed = append(allowed, "lost no guest", strings.Replace(allowed[0], "running", "paused", 1))
								if strings.HasPrefix(c.acted, "departed") || strings.HasPrefix(c.old, "departed") {
									allowed = append(allowed, "departed no guest")
								}
								if name == "arrive" { // it did not, and where it came from it is still
									allowed = append(allowed, "none")
								}
							}
							if !slices.Contains(allowed, found) {
								m.t.Errorf("killed at %s, machine restarted: %v: found %q, want one of %q", where, reboot, found, allowed)
							}
						})
					}
				}
			}
		})
	}
}

// crashTrial is one operation that is ended at one step.
type crashTrial struct {
	m            *machine
	from         peers
	c            *crash
	reboot       bool
	prepare, act func(*node, sandbox.ID) error
	steps        []string // what the operation did
}

// run returns what the next process finds of the sandbox, after all has settled.
func (k *crashTrial) run() string {
	m := k.m
	m.crashes(k.c)
	m.peers = k.from
	n := m.boot()
	k.c.journal = func() { _ = n.jour.Close() }
	id := n.create()
	m.put(id, "old", "old")
	_, err := n.save(id, "snap", kindMemory)
	m.check(err)
	m.put(id, "new", "new")
	m.check(k.prepare(n, id))
	synctest.Wait()
	k.c.arm(true)
	if err := k.act(n, id); err != nil && k.c.at < 0 {
		m.t.Error(err)
	}
	synctest.Wait()
	k.c.arm(false)
	_ = n.jour.Close()
	n.down()
	if k.reboot {
		for _, g := range m.guests() {
			_ = m.host.Crash(g) // one that has ended already
		}
		m.net.wipe()
	}
	k.steps = k.c.steps
	m.crashes(&crash{at: -1})
	next := m.boot()
	pass(time.Minute)
	next.verify()
	return k.describe(next, id)
}

// describe says in which state a sandbox is and what it holds; of one that does not run, what it would hold.
func (k *crashTrial) describe(n *node, id sandbox.ID) string {
	switch state := n.state(id); {
	case strings.HasSuffix(state, "is not on node "+string(n.NodeID())):
		return "none"
	case state == "migrating":
		return k.moving(n, id)
	case state == "running":
		if k.m.host.Still(id) {
			return "running, but it stands still"
		}
		return "running " + k.m.holds(id)
	case state == "paused":
		if _, err := n.resumeIt(id); err != nil {
			return "paused, but " + err.Error()
		}
		n.verify()
		return "paused " + k.m.holds(id)
	case strings.HasPrefix(state, "lost"):
		return "lost " + k.m.holds(id)
	default:
		return state
	}
}

// moving describes a sandbox that moves, by what it holds when it goes on.
func (k *crashTrial) moving(n *node, id sandbox.ID) string {
	in, _ := n.get(id)
	r := in.record()
	what, goOn := "departed ", func() error { return n.comeBack(id, 0) }
	if r.Received {
		what, goOn = "received ", func() error { return n.arrive(id, r.Generation) }
	}
	if err := goOn(); err != nil {
		return what + err.Error()
	}
	n.verify()
	return what + k.m.holds(id)
}

// comer is a sandbox that comes from another node, and that node.
type comer struct {
	parcel     *agentv1.Parcel
	generation int64
	stream     bytes.Buffer
}

// bring makes a sandbox one that another node has.
func (c *comer) bring(n *node, id sandbox.ID) error {
	p, err := n.depart(id)
	if err != nil {
		return err
	}
	c.parcel, c.generation = p, p.GetSandbox().GetGeneration()+1
	c.stream.Reset()
	_, err = fake.New(n.m.host).Save(n.m.t.Context(), id, engine.SaveSpec{Kind: engine.SaveMemory, Stream: &c.stream})
	return errors.Join(err, n.forget(id, c.generation))
}

// DialPeer connects to the node that has the guest, and nothing else.
func (c *comer) DialPeer(context.Context, sandbox.NodeID, string) (net.Conn, error) {
	near, far := net.Pipe()
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = writeHead(w, struct{}{}) // who gets it sees what is missing
		_, _ = w.Write(c.stream.Bytes())
	})}
	go func() { _ = srv.Serve(&oneConn{conn: far}) }() // ends with the listener
	return near, nil
}

func (c *comer) receive(n *node, id sandbox.ID) error {
	if err := c.bring(n, id); err != nil {
		return err
	}
	return n.receive(c.parcel, c.generation)
}

// copyCheckpoint does what a fetch does.
func copyCheckpoint(from, to checkpoints, id string) error {
	h, err := from.Hold(id)
	if err != nil {
		return err
	}
	defer h.Release()
	st, err := to.Begin(id)
	if err != nil {
		return err
	}
	if err := st.LinkFrom(h); err != nil {
		return err
	}
	_, err = to.Commit(st, h.Manifest)
	return err
}

// TestQuarrels has several clients pause, resume, save, roll back, kill and prolong the same sandboxes at once.
func TestQuarrels(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.cfg.WarmMin, m.cfg.WarmMax = 1, 2
		m.host.SetLatency(3 * time.Millisecond)
		m.host.OnSave(func(sandbox.ID, engine.SaveSpec) error {
			time.Sleep(2 * time.Millisecond) //nolint:forbidigo // the bubble's clock
			return nil
		})
		n := m.boot()
		var ids []sandbox.ID
		for i := range 6 {
			id := n.create(func(r *agentv1.CreateRequest) { r.Timeout, r.AutoPause = durationpb.New(50*time.Millisecond), i%2 == 0 })
			m.put(id, string(id), string(id))
			_, err := n.save(id, "of-"+string(id), kindMemory)
			m.check(err)
			ids = append(ids, id)
		}
		var wg sync.WaitGroup
		for c := range 8 {
			rng := rand.New(rand.NewPCG(1, uint64(c)))
			wg.Go(func() {
				for i := range 40 {
					id := ids[rng.IntN(len(ids))]
					var err error
					switch rng.IntN(12) {
					case 0, 1, 2:
						err = n.pauseIt(id, kindMemory)
					case 3, 4, 5, 6:
						_, err = n.resumeIt(id, func(r *agentv1.ResumeRequest) { r.Timeout = durationpb.New(20 * time.Millisecond) })
					case 7:
						_, err = n.save(id, fmt.Sprintf("s-%d-%d", c, i), kindMemory)
					case 8:
						err = n.rewind(id, "of-"+string(id))
					case 9:
						_, err = n.SetTimeout(t.Context(), &agentv1.SetTimeoutRequest{Id: string(id), Timeout: durationpb.New(30 * time.Millisecond)})
					case 10:
						if i > 30 && id != ids[0] {
							err = n.kill(id)
						}
					case 11:
						n.create()
					}
					for _, bad := range []error{sandbox.ErrUnavailable, sandbox.ErrExhausted, sandbox.ErrUnsupported, context.DeadlineExceeded} {
						if errors.Is(err, bad) && !strings.Contains(err.Error(), "is being ended") {
							t.Errorf("client %d, call %d: %v", c, i, err)
						}
					}
				}
			})
		}
		wg.Wait()
		pass(time.Minute)
		n.verify()
		for _, id := range ids {
			switch state := n.state(id); state {
			case "paused", "paused: timeout":
				_, err := n.resumeIt(id)
				m.check(err)
				if got := m.holds(id); got != string(id)+"/"+string(id) {
					t.Errorf("sandbox %s holds %s", id, got)
				}
			case "deleted: killed", "deleted: timeout":
			default:
				t.Errorf("state: %s", state)
			}
		}
		n.verify()
	})
}
