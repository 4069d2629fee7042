package journal

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const mib = 1 << 20

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func small() sandbox.Resources {
	return sandbox.Resources{MilliCPU: 500, MemoryBytes: 512 * mib, DiskBytes: 1024 * mib}
}

func times(r sandbox.Resources, n int64) sandbox.Resources {
	return sandbox.Resources{MilliCPU: r.MilliCPU * n, MemoryBytes: r.MemoryBytes * n, DiskBytes: r.DiskBytes * n}
}

func openAt(tb testing.TB, path string, opt Options) *Journal {
	tb.Helper()
	j, err := Open(tb.Context(), path, opt)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := j.Close(); err != nil {
			tb.Error(err)
		}
	})
	return j
}

func open(tb testing.TB, capacity sandbox.Resources) *Journal {
	tb.Helper()
	return openAt(tb, filepath.Join(tb.TempDir(), "journal.db"), Options{Capacity: capacity})
}

func (j *Journal) newRecord() Record {
	return Record{
		Sandbox: sandbox.Sandbox{
			ID: sandbox.NewID(j.node), NodeID: j.node, State: sandbox.StateCreating, Generation: 1,
			Resources: small(), StartedAt: time.Now().UTC().Round(0), Metadata: map[string]string{"a": "b"},
			ImageDigest: "sha256:abc",
		},
	}
}

func (r *Record) next(s sandbox.State) Record {
	n := *r
	n.State = s
	n.Generation++
	return n
}

func change(kind string, r Record) Change {
	return Change{Type: kind, Time: time.Now().UTC().Round(0), Sandbox: r.Sandbox}
}

// verify checks that the sums are those of the records and that the kept changes have no gap.
func verify(tb testing.TB, j *Journal) {
	tb.Helper()
	recs, err := j.Records(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	got := j.Ledger()
	want := Ledger{
		Capacity: got.Capacity, Sequence: got.Sequence, Acknowledged: got.Acknowledged, Oldest: got.Oldest,
	}
	for i := range recs {
		want.count(&recs[i], 1)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		tb.Errorf("ledger differs from the records (-records +ledger):\n%s", diff)
	}
	if !got.Allocated.Resources.Fits(got.Capacity) {
		tb.Errorf("allocated %+v exceeds capacity %+v", got.Allocated.Resources, got.Capacity)
	}
	var n, lo, hi int64
	err = j.conn.QueryRowContext(context.Background(),
		"SELECT count(*), coalesce(min(sequence), 0), coalesce(max(sequence), 0) FROM changes").Scan(&n, &lo, &hi)
	if err != nil {
		tb.Fatal(err)
	}
	if n > 0 && (hi-lo+1 != n || hi != got.Sequence || lo != got.Oldest) {
		tb.Errorf("changes %d to %d are %d entries; ledger says %d to %d", lo, hi, n, got.Oldest, got.Sequence)
	}
	if n == 0 && got.Oldest != got.Sequence+1 {
		tb.Errorf("no changes, but the ledger says %d to %d", got.Oldest, got.Sequence)
	}
}

func TestLifeOfARecord(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "journal.db")
	opt := Options{Capacity: times(small(), 2)}
	j := openAt(t, path, opt)
	r := j.newRecord()
	if _, _, err := j.Admit(ctx, r); err != nil {
		t.Fatal(err)
	}
	created := change("created", r)
	r = r.next(sandbox.StateRunning)
	r.Append(Line{Time: created.Time, Level: "info", Message: "started"})
	started := change("started", r)
	r, err := j.Put(ctx, r, created, started)
	if err != nil {
		t.Fatal(err)
	}
	if r.Last.Sequence != 2 || r.Last.Type != "started" {
		t.Errorf("mark = %+v, want 2 started", r.Last)
	}
	if got := j.Ledger().Allocated; got != (Amount{small(), 1}) {
		t.Errorf("allocated = %+v", got)
	}
	verify(t, j)
	node := j.NodeID()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}

	j = openAt(t, path, opt)
	if j.NodeID() != node {
		t.Errorf("node id changed from %s to %s", node, j.NodeID())
	}
	recs, err := j.Records(ctx)
	if diff := cmp.Diff([]Record{r}, recs, cmpopts.EquateComparable(r.Network)); err != nil || diff != "" {
		t.Fatalf("records after opening again: %v\n%s", err, diff)
	}
	created.Sequence, started.Sequence = 1, 2
	changes, complete, err := j.Changes(ctx, 0, 10)
	if diff := cmp.Diff([]Change{created, started}, changes); err != nil || !complete || diff != "" {
		t.Errorf("changes: complete %v, %v\n%s", complete, err, diff)
	}
	if r, err = j.Put(ctx, r.next(sandbox.StateDeleted), change("killed", r)); err != nil {
		t.Fatal(err)
	}
	if got := j.Ledger().Allocated; got != (Amount{}) {
		t.Errorf("an ended sandbox holds %+v", got)
	}
	if err := j.Forget(ctx, r.ID, "unknown"); err != nil {
		t.Fatal(err)
	}
	verify(t, j)
}

func TestPutRefuses(t *testing.T) {
	ctx := t.Context()
	j := open(t, times(small(), 2))
	r := j.newRecord()
	if _, err := j.Put(ctx, r); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("put of an unknown sandbox: %v", err)
	}
	if _, _, err := j.Admit(ctx, r); err != nil {
		t.Fatal(err)
	}
	larger, warm := r, r
	larger.Resources.MilliCPU++
	warm.Warm = true
	ended := r.next(sandbox.StateFailed)
	for name, c := range map[string]struct {
		r    Record
		kind error
	}{
		"other size": {larger, sandbox.ErrInvalid},
		"warm again": {warm, sandbox.ErrInvalid},
		"bad state":  {r.next(sandbox.StatePaused), sandbox.ErrConflict},
	} {
		if _, err := j.Put(ctx, c.r); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, want %v", name, err, c.kind)
		}
	}
	if _, err := j.Put(ctx, ended, change("failed", ended)); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Put(ctx, r); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("put of an older generation: %v", err)
	}
	verify(t, j)
}

func TestAdmitRefuses(t *testing.T) {
	ctx := t.Context()
	j := openAt(t, filepath.Join(t.TempDir(), "j.db"), Options{Capacity: times(small(), 2), MaxSandboxes: 2})
	first := j.newRecord()
	first.IdempotencyKey = "key"
	if _, earlier, err := j.Admit(ctx, first); err != nil || earlier {
		t.Fatal(earlier, err)
	}
	again := j.newRecord()
	again.IdempotencyKey = "key"
	got, earlier, err := j.Admit(ctx, again)
	if err != nil || !earlier || got.ID != first.ID {
		t.Errorf("same key: %s, earlier %v, %v; want %s", got.ID, earlier, err, first.ID)
	}
	if _, _, err := j.Admit(ctx, first.next(sandbox.StateRunning)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("admit a running one: %v", err)
	}
	same := first
	same.IdempotencyKey = ""
	if _, _, err := j.Admit(ctx, same); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("admit the same id: %v", err)
	}
	large := j.newRecord()
	large.Resources.MemoryBytes = 3 << 30
	large.Resources.MilliCPU = 600
	_, _, err = j.Admit(ctx, large)
	want := "no room for sandbox " + string(large.ID) + ": memory: 3.0 GiB asked, 512 MiB of 1.0 GiB free; " +
		"processor: 0.60 cores asked, 0.50 cores of 1.00 cores free (1 sandboxes hold room, 0 of them warm)"
	if !errors.Is(err, sandbox.ErrExhausted) || err.Error() != want {
		t.Errorf("too large:\n%v\nwant\n%s", err, want)
	}
	overflow := j.newRecord()
	overflow.Resources.MemoryBytes = 1<<63 - 1
	if _, _, err := j.Admit(ctx, overflow); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("the largest number: %v", err)
	}
	tiny := j.newRecord()
	tiny.Resources = sandbox.Resources{MilliCPU: 1, MemoryBytes: 1}
	if _, _, err := j.Admit(ctx, tiny); err != nil {
		t.Fatal(err)
	}
	tiny.ID = sandbox.NewID(j.node)
	if _, _, err := j.Admit(ctx, tiny); !errors.Is(err, sandbox.ErrExhausted) || !strings.Contains(err.Error(), "2 of at most 2") {
		t.Errorf("too many: %v", err)
	}
	verify(t, j)
}

// TestNeverOver lets many goroutines admit, run and end sandboxes, and checks the sum after each admission.
func TestNeverOver(t *testing.T) {
	ctx := t.Context()
	const room = 7
	path := filepath.Join(t.TempDir(), "journal.db")
	opt := Options{Capacity: times(small(), room)}
	j := openAt(t, path, opt)
	var wg sync.WaitGroup
	for seed := range uint64(12) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 1))
			var mine []Record
			for range 40 {
				r := j.newRecord()
				r.Warm = rng.IntN(3) == 0
				r.Resources.MemoryBytes = 256*mib + rng.Int64N(512*mib)
				_, _, err := j.Admit(ctx, r)
				if err == nil {
					mine = append(mine, r)
				} else if !errors.Is(err, sandbox.ErrExhausted) {
					t.Error(err)
				}
				if l := j.Ledger(); !l.Allocated.Resources.Fits(l.Capacity) {
					t.Errorf("allocated %+v of %+v", l.Allocated, l.Capacity)
				}
				if len(mine) == 0 || rng.IntN(2) == 0 {
					continue
				}
				i := rng.IntN(len(mine))
				next := mine[i].next(sandbox.StateDeleted)
				if rng.IntN(3) == 0 && mine[i].State == sandbox.StateCreating {
					next = mine[i].next(sandbox.StateRunning)
					next.Warm = false
				}
				if mine[i], err = j.Put(ctx, next, change("x", next)); err != nil {
					t.Error(err)
				}
				if next.State.Ended() {
					mine = append(mine[:i], mine[i+1:]...)
				}
			}
		})
	}
	wg.Wait()
	verify(t, j)
	before := j.Ledger()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j = openAt(t, path, opt)
	if diff := cmp.Diff(before, j.Ledger()); diff != "" {
		t.Errorf("the ledger changed by opening again:\n%s", diff)
	}
}

func TestOutbox(t *testing.T) {
	ctx := t.Context()
	path := filepath.Join(t.TempDir(), "journal.db")
	opt := Options{Capacity: small(), MaxChanges: 5}
	j := openAt(t, path, opt)
	r := j.newRecord()
	if _, _, err := j.Admit(ctx, r); err != nil {
		t.Fatal(err)
	}
	put := func(n int) {
		t.Helper()
		for range n {
			r.Generation++
			if _, err := j.Put(ctx, r, change("timeout_set", r)); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect := func(after int64, want string) {
		t.Helper()
		cs, complete, err := j.Changes(ctx, after, 3)
		if err != nil {
			t.Fatal(err)
		}
		parts := []string{strconv.FormatBool(complete)}
		for _, c := range cs {
			parts = append(parts, strconv.FormatInt(c.Sequence, 10))
		}
		got := strings.Join(parts, " ")
		if got != want {
			t.Errorf("changes after %d: %s, want %s", after, got, want)
		}
		verify(t, j)
	}
	ack := func(n int64) {
		t.Helper()
		if err := j.Acknowledge(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	put(4)
	expect(0, "true 1 2 3")
	expect(3, "true 4")
	expect(4, "true")
	expect(5, "false") // never given out
	ack(2)
	expect(2, "true 3 4")
	expect(1, "false")
	ack(1) // late: no effect
	put(6) // 5 to 10; 6 to 10 are kept
	expect(2, "false")
	expect(5, "true 6 7 8")
	ack(10)
	expect(10, "true")
	ack(50) // the server has seen more than we know of
	put(1)
	expect(50, "true 51")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j = openAt(t, path, opt)
	expect(50, "true 51")
	ack(51)
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j = openAt(t, path, opt)
	put(1)
	expect(51, "true 52")
}

func TestImages(t *testing.T) {
	ctx := t.Context()
	j := open(t, small())
	im := Image{Digest: "sha256:1", TemplateID: "t", Bytes: 5, BuiltAt: time.Now().UTC().Round(0)}
	for range 2 {
		if err := j.PutImage(ctx, im); err != nil {
			t.Fatal(err)
		}
	}
	im.Templates = []sandbox.TemplateID{"t"}
	got, err := j.Images(ctx)
	if diff := cmp.Diff([]Image{im}, got); err != nil || diff != "" {
		t.Errorf("images: %v\n%s", err, diff)
	}
	for range 2 {
		if err := j.RemoveImage(ctx, im.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := j.Images(ctx); err != nil || len(got) != 0 {
		t.Errorf("images: %v, %v", got, err)
	}
}

func TestOneProcessAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	openAt(t, path, Options{})
	if _, err := Open(t.Context(), path, Options{}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("second open: %v, want a conflict", err)
	}
}

func TestNewerSchema(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	j := openAt(t, path, Options{})
	if _, err := j.conn.ExecContext(t.Context(), "PRAGMA user_version = 99"); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), path, Options{}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("open of a newer file: %v", err)
	}
}

func TestClosed(t *testing.T) {
	j := open(t, small())
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := j.Admit(t.Context(), j.newRecord()); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("admit: %v", err)
	}
	if _, err := j.Records(t.Context()); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("records: %v", err)
	}
}

func TestLinesAreBounded(t *testing.T) {
	var r Record
	for i := range 3 * maxLines {
		r.Append(Line{Message: strconv.Itoa(i)})
	}
	if len(r.Lines) != maxLines || r.Lines[maxLines-1].Message != strconv.Itoa(3*maxLines-1) {
		t.Errorf("%d lines, last %q", len(r.Lines), r.Lines[len(r.Lines)-1].Message)
	}
}

func BenchmarkClaim(b *testing.B) {
	j := open(b, times(small(), 1e6))
	ctx := b.Context()
	recs := make([]Record, b.N)
	for i := range recs {
		recs[i] = j.newRecord()
		recs[i].Warm = true
		if _, _, err := j.Admit(ctx, recs[i]); err != nil {
			b.Fatal(err)
		}
	}
	for i := 0; b.Loop(); i++ {
		r := recs[i%len(recs)]
		if i >= len(recs) {
			b.StopTimer()
			r = j.newRecord()
			r.Warm = true
			if _, _, err := j.Admit(ctx, r); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		r.Warm = false
		if _, err := j.Put(ctx, r); err != nil {
			b.Fatal(err)
		}
		created := change("created", r)
		r = r.next(sandbox.StateRunning)
		if _, err := j.Put(ctx, r, created, change("started", r)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAdmitAndRun(b *testing.B) {
	for _, writers := range []int{1, 16, 64} {
		b.Run(fmt.Sprint("writers=", writers), func(b *testing.B) {
			j := open(b, times(small(), 1e7))
			b.SetParallelism(writers/2 + 1)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					r := j.newRecord()
					if _, _, err := j.Admit(b.Context(), r); err != nil {
						b.Error(err)
						return
					}
					r = r.next(sandbox.StateRunning)
					if _, err := j.Put(b.Context(), r, change("started", r)); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// TestReserve has the journal own room on the disk, also after it was closed and opened again.
func TestReserve(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j.db")
	for range 2 {
		j := openAt(t, path, Options{Capacity: small()})
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{path, path + "-wal"} {
			info, err := os.Stat(name)
			if err != nil {
				t.Fatal(err)
			}
			if info.Size() < reserveBytes {
				t.Errorf("%s has %d bytes, want %d or more", name, info.Size(), reserveBytes)
			}
		}
	}
}
