package agent

import (
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/fake"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	kindMemory = agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY
	kindFiles  = agentv1.CheckpointKind_CHECKPOINT_KIND_FILES
)

// pause, resume, save and rewind call the commands.
func (n *node) pauseIt(id sandbox.ID, kind agentv1.CheckpointKind) error {
	_, err := n.Pause(n.m.t.Context(), &agentv1.PauseRequest{Id: string(id), Kind: kind})
	return err
}

func (n *node) resumeIt(id sandbox.ID, change ...func(*agentv1.ResumeRequest)) (*agentv1.ResumeResponse, error) {
	req := &agentv1.ResumeRequest{Id: string(id), Timeout: durationpb.New(5 * time.Minute)}
	for _, f := range change {
		f(req)
	}
	return n.Resume(n.m.t.Context(), req)
}

func (n *node) save(id sandbox.ID, checkpoint string, kind agentv1.CheckpointKind) (*agentv1.Checkpoint, error) {
	resp, err := n.Snapshot(n.m.t.Context(), &agentv1.SnapshotRequest{Id: string(id), CheckpointId: checkpoint, Kind: kind})
	return resp.GetCheckpoint(), err
}

func (n *node) rewind(id sandbox.ID, checkpoint string) error {
	_, err := n.Rollback(n.m.t.Context(), &agentv1.RollbackRequest{Id: string(id), CheckpointId: checkpoint})
	return err
}

// put sets what a guest holds; holds returns it.
func (m *machine) put(id sandbox.ID, memory, files string) {
	m.t.Helper()
	if err := m.host.SetContents(id, fake.Contents{Memory: memory, Files: files}); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) holds(id sandbox.ID) string {
	c, ok := m.host.Contents(id)
	if !ok {
		return "no guest"
	}
	memory, _, _ := strings.Cut(c.Memory, "|") // what follows is demandTokens's
	return memory + "/" + c.Files
}

// check fails the test for an error.
func (m *machine) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func TestPauseAndResume(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		conn, err := n.DialGuest(t.Context(), id, 80)
		m.check(err)
		resp, err := n.Pause(t.Context(), &agentv1.PauseRequest{Id: string(id)})
		m.check(err)
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("an open connection went on")
		}
		if sb := resp.GetSandbox(); sb.GetState() != agentv1.State_STATE_PAUSED || sb.GetPausedAt() == nil || sb.GetPausedKind() != kindMemory ||
			sb.GetPausedBytes() == 0 || sb.GetEndAt() == nil {
			t.Errorf("paused: %v", sb)
		}
		if l := resp.GetLoad(); l.GetSandboxes() != 0 || l.GetAllocated().GetMemoryBytes() != 0 || l.GetAllocated().GetDiskBytes() == 0 {
			t.Errorf("load: %v", l)
		}
		n.verify()
		if len(m.guests()) != 0 || len(m.net.ids()) != 0 {
			t.Error("a guest or a network is left")
		}
		if err := n.pauseIt(id, kindMemory); !errors.Is(err, sandbox.ErrConflict) || err.Error() != "sandbox "+string(id)+" is paused already" {
			t.Errorf("paused twice: %v", err)
		}
		if _, err := n.DialGuest(t.Context(), id, 80); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("dial: %v", err)
		}
		if _, err := n.Metrics(t.Context(), &agentv1.MetricsRequest{Id: string(id)}); err != nil {
			t.Errorf("metrics: %v", err)
		}
		if logs, err := n.Logs(t.Context(), &agentv1.LogsRequest{Id: string(id)}); err != nil || len(logs.GetEntries()) != 2 {
			t.Errorf("logs: %v, %v", logs, err)
		}
		pass(24 * time.Hour) // its timeout is long past
		if got := n.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
		m.mu.Lock()
		delete(m.inits, id)
		m.mu.Unlock()

		back, err := n.resumeIt(id)
		m.check(err)
		if sb := back.GetSandbox(); !back.GetResumed() || sb.GetState() != agentv1.State_STATE_RUNNING || sb.GetPausedAt() != nil ||
			sb.GetPausedBytes() != 0 || time.Until(sb.GetEndAt().AsTime()) != 5*time.Minute {
			t.Errorf("resumed: %v", back)
		}
		if got := m.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		b := m.init(id)
		if b.AccessToken != sandbox.AccessToken(m.server.secret, id) || len(b.EnvVars) != 0 || b.DefaultUser != "" || b.SandboxID != string(id) {
			t.Errorf("init: %+v", b)
		}
		c, err := n.DialGuest(t.Context(), id, 80)
		m.check(err)
		m.check(c.Close())
		synctest.Wait()
		if got := m.server.types(id); got != "created started paused resumed" {
			t.Errorf("reported: %q", got)
		}
		n.verify()
		pass(6 * time.Minute)
		if got := n.state(id); got != "deleted: timeout" {
			t.Errorf("state at the end: %s", got)
		}
		n.verify()
	})
}

func TestPauseOfFiles(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create(func(r *agentv1.CreateRequest) {
			r.Guest = &agentv1.GuestSettings{Env: map[string]string{"A": "0", "B": "2"}, User: "root"}
		})
		m.put(id, "mem", "disk")
		m.check(n.pauseIt(id, kindFiles))
		m.mu.Lock()
		delete(m.inits, id)
		m.mu.Unlock()
		if _, err := n.resumeIt(id, func(r *agentv1.ResumeRequest) { r.Cold, r.Timeout = true, nil }); err != nil {
			t.Fatal(err)
		}
		if got := m.holds(id); got != "/disk" {
			t.Errorf("it holds %s", got)
		}
		b := m.init(id)
		if b.EnvVars["A"] != "1" || b.EnvVars["B"] != "2" || b.DefaultUser != "root" || b.DefaultWorkdir != "/root" ||
			b.AccessToken != sandbox.AccessToken(m.server.secret, id) {
			t.Errorf("init: %+v", b)
		}
		m.check(n.pauseIt(id, kindMemory))
		_, err := n.resumeIt(id, func(r *agentv1.ResumeRequest) { r.Cold = true })
		if connect.CodeOf(err) != connect.CodeUnimplemented {
			t.Errorf("cold start of one with its memory: %v", err)
		}
		n.verify()
	})
}

func TestPauseThatFails(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		m.host.OnSave(func(sandbox.ID, engine.SaveSpec) error { return sandbox.Unavailablef("the disk is full") })
		if err := n.pauseIt(id, kindMemory); !errors.Is(err, sandbox.ErrUnavailable) || !strings.Contains(err.Error(), "the disk is full") {
			t.Errorf("pause: %v", err)
		}
		if got := n.state(id); got != "running" {
			t.Errorf("state: %s", got)
		}
		if c, err := n.DialGuest(t.Context(), id, 80); err != nil {
			t.Error(err)
		} else {
			m.check(c.Close())
		}
		logs, err := n.Logs(t.Context(), &agentv1.LogsRequest{Id: string(id)})
		m.check(err)
		if text := logs.String(); !strings.Contains(text, "it goes on") || !strings.Contains(text, "the disk is full") {
			t.Errorf("logs: %s", text)
		}
		n.verify()
		m.host.OnSave(func(id sandbox.ID, _ engine.SaveSpec) error { return m.host.OOM(id) })
		if err := n.pauseIt(id, kindMemory); err == nil {
			t.Error("paused a guest that has ended")
		}
		synctest.Wait()
		if got := n.state(id); got != "failed: out of memory: the limit is 256 MiB" {
			t.Errorf("state: %s", got)
		}
		n.verify()
	})
}

func TestManyResumesAreOne(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.check(n.pauseIt(id, kindMemory))
		var mu sync.Mutex
		starts, fail := 0, true
		m.host.SetLatency(time.Second)
		m.host.OnStart(func(engine.Spec) (*engine.Exit, error) {
			mu.Lock()
			defer mu.Unlock()
			starts++
			if fail {
				return nil, errTest
			}
			return nil, nil
		})
		all := func() (resumed, failed int) {
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					resp, err := n.resumeIt(id)
					mu.Lock()
					defer mu.Unlock()
					if err != nil {
						failed++
					}
					if resp.GetResumed() {
						resumed++
					}
				})
			}
			wg.Wait()
			return resumed, failed
		}
		if resumed, failed := all(); resumed != 0 || failed != 20 || starts != 1 {
			t.Errorf("of a broken one: %d resumed, %d failed, %d starts", resumed, failed, starts)
		}
		if got := n.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
		n.verify()
		mu.Lock()
		fail, starts = false, 0
		mu.Unlock()
		if resumed, failed := all(); resumed != 1 || failed != 0 || starts != 1 {
			t.Errorf("%d resumed, %d failed, %d starts", resumed, failed, starts)
		}
		n.verify()
	})
}

func TestResumeOfARunningOne(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		for _, c := range []struct {
			timeout time.Duration
			extend  bool
			want    time.Duration
		}{
			{time.Minute, true, 5 * time.Minute}, {10 * time.Minute, true, 10 * time.Minute}, {time.Minute, false, time.Minute},
		} {
			resp, err := n.resumeIt(id, func(r *agentv1.ResumeRequest) {
				r.Timeout, r.ExtendOnly, r.AutoPause = durationpb.New(c.timeout), c.extend, new(bool)
			})
			m.check(err)
			if got := time.Until(resp.GetSandbox().GetEndAt().AsTime()); got != c.want || resp.GetResumed() {
				t.Errorf("timeout %v, extend only %v: %v left, resumed %v", c.timeout, c.extend, got, resp.GetResumed())
			}
		}
		m.check(n.kill(id))
		if _, err := n.resumeIt(id); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("resume of an ended one: %v", err)
		}
	})
}

func TestResumeNeedsRoom(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		m.opt.Capacity = times(small(), 2)
		m.opt.Capacity.DiskBytes *= 2
		m.cfg.WarmMin, m.cfg.WarmMax = 2, 2
		n := m.boot()
		id := n.create()
		m.check(n.pauseIt(id, kindMemory))
		n.eventually("warm ones fill the node", func() bool { ready, _ := n.warmCount(); return ready == 2 })
		_, err := n.resumeIt(id) // they give way
		m.check(err)
		m.check(n.pauseIt(id, kindMemory))
		first, second := n.create(), n.create()
		if _, err := n.resumeIt(id); !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("resume without room: %v", err)
		}
		if got := n.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
		m.check(n.kill(first))
		_, err = n.resumeIt(id)
		m.check(err)
		m.check(n.kill(second))
		n.eventually("nothing is made", func() bool { _, filling := n.warmCount(); return filling == 0 })
		synctest.Wait()
		n.verify()
	})
}

func TestAutoPause(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		auto := func(r *agentv1.CreateRequest) {
			r.AutoPause, r.AutoPauseKind, r.Timeout = true, kindFiles, durationpb.New(time.Minute)
		}
		id, broken, never := n.create(auto), n.create(auto), n.create(auto)
		m.host.OnSave(func(b sandbox.ID, _ engine.SaveSpec) error {
			switch b {
			case broken:
				return sandbox.Unavailablef("the disk is full")
			case never:
				return sandbox.Unsupportedf("this engine saves nothing")
			}
			return nil
		})
		pass(59 * time.Second)
		if got := n.state(id); got != "running" {
			t.Errorf("before its end: %s", got)
		}
		pass(2 * time.Second)
		if got := n.state(id); got != "paused: timeout" {
			t.Errorf("after its end: %s", got)
		}
		if got := n.state(never); !strings.HasPrefix(got, "deleted: timeout, and it could not be paused: ") || !strings.Contains(got, "saves nothing") {
			t.Errorf("one that cannot be paused: %s", got)
		}
		if got := n.state(broken); got != "running" {
			t.Errorf("one whose pause failed once: %s", got)
		}
		pass(time.Minute)
		if got := n.state(broken); !strings.HasPrefix(got, "deleted: timeout, and it could not be paused: ") {
			t.Errorf("one whose pause failed again and again: %s", got)
		}
		if got := m.server.types(id); got != "created started paused" {
			t.Errorf("reported: %q", got)
		}
		resp, err := n.resumeIt(id, func(r *agentv1.ResumeRequest) { r.AutoPause = new(bool) })
		m.check(err)
		if resp.GetSandbox().GetAutoPause() {
			t.Error("it is still paused at its end")
		}
		pass(6 * time.Minute)
		if got := n.state(id); got != "deleted: timeout" {
			t.Errorf("after its second end: %s", got)
		}
		n.verify()
	})
}

func TestKillOfAPausedOne(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.check(n.pauseIt(id, kindMemory))
		m.check(n.kill(id))
		if got := n.state(id); got != "deleted: killed" || len(n.pauses()) != 0 {
			t.Errorf("state: %s, checkpoints %v", got, n.pauses())
		}
		if l := n.jour.Ledger(); l.Paused != 0 || l.Allocated.Resources != (sandbox.Resources{}) {
			t.Errorf("ledger: %+v", l)
		}
		n.verify()
	})
}

func TestKillDuringAPause(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		saving := make(chan struct{})
		m.host.OnSave(func(sandbox.ID, engine.SaveSpec) error {
			close(saving)
			time.Sleep(time.Second) //nolint:forbidigo // the bubble's clock
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := n.pauseIt(id, kindMemory); err == nil {
				t.Error("the pause went on")
			}
		})
		<-saving
		m.check(n.kill(id))
		wg.Wait()
		if got := n.state(id); got != "deleted: killed" {
			t.Errorf("state: %s", got)
		}
		n.verify()
	})
}

func TestPausedOnesSurvive(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id, damaged, gone := n.create(), n.create(), n.create()
		m.put(id, "mem", "disk")
		var ids []string
		for _, b := range []sandbox.ID{id, damaged, gone} {
			m.check(n.pauseIt(b, kindMemory))
			in, _ := n.get(b)
			ids = append(ids, in.record().Checkpoint)
		}
		held, err := n.saves.Hold(ids[1])
		m.check(err)
		n.down()
		m.truncate(held.Dir)
		held.Release()
		m.removeAll("snapshots", ids[2])
		m.net = newFakeNet() // as after a restart of the machine
		n = m.boot()
		synctest.Wait()
		if got := n.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
		for _, b := range []sandbox.ID{damaged, gone} {
			if got := n.state(b); !strings.HasPrefix(got, "lost: what the sandbox was paused in is gone or damaged") {
				t.Errorf("state: %s", got)
			}
		}
		_, err = n.resumeIt(id)
		m.check(err)
		if got := m.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		n.verify()
	})
}

func TestStopAllDeletesWhatIsPaused(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.check(n.pauseIt(id, kindMemory))
		n.stop()
		<-n.ended
		m.check(n.StopAll(t.Context(), "the node is purged"))
		if got := n.state(id); got != "deleted: the node is purged" || len(n.pauses()) != 0 {
			t.Errorf("state: %s, checkpoints %v", got, n.pauses())
		}
	})
}

// TestGuestThatIsSilentAfterAResume checks that a restore that comes to nothing leaves the sandbox paused.
func TestGuestThatIsSilentAfterAResume(t *testing.T) {
	bubble(t, func(m *machine) {
		t := m.t
		n := m.boot()
		id := n.create()
		m.put(id, "mem", "disk")
		m.check(n.pauseIt(id, kindMemory))
		m.onGuest(func(_ sandbox.ID, r *http.Request) (int, string) {
			if r.URL.Path == "/init" {
				return http.StatusUnauthorized, "{}"
			}
			return 0, ""
		})
		if _, err := n.resumeIt(id); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("resume: %v", err)
		}
		if got := n.state(id); got != "paused" {
			t.Errorf("state: %s", got)
		}
		n.verify()
		m.onGuest(nil)
		_, err := n.resumeIt(id)
		m.check(err)
		if got := m.holds(id); got != "mem/disk" {
			t.Errorf("it holds %s", got)
		}
		n.verify()
	})
}
