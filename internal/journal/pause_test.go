package journal

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// run admits a sandbox and takes it to running.
func run(t *testing.T, j *Journal) Record {
	t.Helper()
	r := j.newRecord()
	if _, _, err := j.Admit(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return put(t, j, r.next(sandbox.StateRunning))
}

func put(t *testing.T, j *Journal, r Record) Record {
	t.Helper()
	r, err := j.Put(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	verify(t, j)
	return r
}

func TestPausedOnesHoldTheirCheckpoint(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "journal.db")
	opt := Options{Capacity: times(small(), 2), MaxSandboxes: 2}
	j := openAt(t, path, opt)
	r := run(t, j)
	run(t, j)
	r = r.next(sandbox.StatePausing)
	r.Checkpoint = "pause-1"
	r = put(t, j, r)
	r = r.next(sandbox.StatePaused)
	r.PausedBytes = 100 * mib
	r = put(t, j, r)
	want := small()
	want.DiskBytes += 100 * mib
	if l := j.Ledger(); l.Allocated != (Amount{want, 1}) || l.Paused != 1 {
		t.Errorf("ledger with a paused sandbox: %+v", l)
	}
	if _, err := j.Put(ctx, r.next(sandbox.StateResuming)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("resumed without admission: %v", err)
	}
	// The other one's room is not there twice.
	third := j.newRecord()
	third.Resources.DiskBytes -= 100 * mib
	if _, _, err := j.Admit(ctx, third); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Readmit(ctx, r.next(sandbox.StateResuming)); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("resumed without room: %v", err)
	}
	verify(t, j)
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	opt.Capacity = times(small(), 4)
	opt.MaxSandboxes = 3
	j = openAt(t, path, opt)
	if l := j.Ledger(); l.Paused != 1 || l.Allocated.Sandboxes != 2 {
		t.Errorf("ledger after a restart: %+v", l)
	}
	r, err := j.Readmit(ctx, r.next(sandbox.StateResuming))
	if err != nil || r.State != sandbox.StateResuming {
		t.Fatalf("resume: %v, %v", r.State, err)
	}
	verify(t, j)
	if _, err := j.Readmit(ctx, r); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("resumed twice: %v", err)
	}
	r = r.next(sandbox.StateRunning)
	r.PausedBytes = 0
	put(t, j, r)
	if l := j.Ledger(); l.Paused != 0 || l.Allocated.Sandboxes != 3 {
		t.Errorf("ledger at the end: %+v", l)
	}
}

// A paused sandbox that ends takes no more of the machine than it did, whoever has the rest meanwhile.
func TestPausedOnesEndWhereNothingIsFree(t *testing.T) {
	for _, end := range []sandbox.State{sandbox.StatePaused, sandbox.StateMigrating} {
		j := openAt(t, filepath.Join(t.TempDir(), "journal.db"), Options{Capacity: small(), MaxSandboxes: 1})
		r := run(t, j)
		r = put(t, j, r.next(sandbox.StatePausing))
		r = put(t, j, r.next(sandbox.StatePaused))
		if end != r.State {
			r = put(t, j, r.next(end))
		}
		run(t, j)
		r = put(t, j, r.next(sandbox.StateStopping))
		if l := j.Ledger(); !l.Allocated.Resources.Fits(l.Capacity) || l.Allocated.Sandboxes != 1 {
			t.Errorf("%s, then stopping: %+v allocated of %+v", end, l.Allocated, l.Capacity)
		}
		put(t, j, r.next(sandbox.StateStopping))
		put(t, j, r.next(sandbox.StateDeleted))
		if l := j.Ledger(); l.Allocated.Resources != small() || l.Paused != 0 {
			t.Errorf("%s, then deleted: %+v", end, l)
		}
	}
}

func TestRewind(t *testing.T) {
	ctx := t.Context()
	j := open(t, times(small(), 1))
	r := run(t, j)
	if _, err := j.Rewind(ctx, r); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("of a running one: %v", err)
	}
	r = put(t, j, r.next(sandbox.StatePausing))
	r.Checkpoint = "other"
	r, err := j.Rewind(ctx, r)
	if err != nil || r.State != sandbox.StateResuming || !r.Rewinding || r.Checkpoint != "other" {
		t.Fatalf("rewind: %+v, %v", r, err)
	}
	verify(t, j)
	put(t, j, r.next(sandbox.StateRunning))
}

func TestReleaseImage(t *testing.T) {
	ctx := t.Context()
	j := open(t, small())
	release := func(template sandbox.TemplateID, want bool) {
		t.Helper()
		if got, err := j.ReleaseImage(ctx, template, "sha256:1"); err != nil || got != want {
			t.Errorf("release by %s: %v, %v; want %v", template, got, err, want)
		}
	}
	for _, template := range []sandbox.TemplateID{"a", "b", "a"} {
		if err := j.PutImage(ctx, Image{Digest: "sha256:1", TemplateID: template}); err != nil {
			t.Fatal(err)
		}
	}
	release("a", false)
	release("unknown", false)
	release("b", true)
	if ims, err := j.Images(ctx); err != nil || len(ims) != 1 || !ims[0].Removed {
		t.Errorf("images: %+v, %v", ims, err)
	}
	if err := j.PutImage(ctx, Image{Digest: "sha256:1", TemplateID: "c"}); err != nil {
		t.Fatal(err)
	}
	if ims, err := j.Images(ctx); err != nil || len(ims) != 1 || ims[0].Removed {
		t.Errorf("images after another build: %+v, %v", ims, err)
	}
}

// TestReleaseOfAnEarlierVersionsImage checks that what was noted before templates were counted is not taken for free.
func TestReleaseOfAnEarlierVersionsImage(t *testing.T) {
	ctx := context.Background()
	j := open(t, small())
	if _, err := j.conn.ExecContext(ctx, `INSERT INTO images VALUES ('sha256:1', '{"digest":"sha256:1","template_id":"a"}')`); err != nil {
		t.Fatal(err)
	}
	if got, err := j.ReleaseImage(ctx, "b", "sha256:1"); err != nil || got {
		t.Errorf("release by another template: %v, %v", got, err)
	}
	if got, err := j.ReleaseImage(ctx, "a", "sha256:1"); err != nil || !got {
		t.Errorf("release by the template: %v, %v", got, err)
	}
}
