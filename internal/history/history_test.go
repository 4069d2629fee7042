package history

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open returns a history in dir; it is closed by the test's end.
func open(tb testing.TB, cfg Config) *History {
	tb.Helper()
	if cfg.Path == "" {
		cfg.Path = filepath.Join(tb.TempDir(), "history.db")
	}
	cfg.Logger = slog.New(slog.NewTextHandler(tb.Output(), nil))
	h, err := Open(context.Background(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := h.Close(); err != nil {
			tb.Error(err)
		}
	})
	return h
}

// start runs h and returns what stops it again, which is also done by the test's end.
func start(tb testing.TB, h *History) (stop func()) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	tb.Cleanup(stop)
	return stop
}

func at(sec int64) time.Time {
	return time.Now().UTC().Truncate(time.Hour).Add(time.Duration(sec) * time.Second)
}

func ids(events []Event) (out []int64) {
	for _, e := range events {
		out = append(out, e.ID)
	}
	return out
}

func TestQuery(t *testing.T) {
	h := open(t, Config{})
	start(t, h)
	in := []Event{
		{Time: at(1), Type: "sandbox.created", NodeID: "node01", Sequence: 1, SandboxID: "a", Message: "made", Fields: map[string]string{"k": "v"}},
		{Time: at(2), Type: "sandbox.created", NodeID: "node02", Sequence: 1, SandboxID: "b"},
		{Time: at(3), Type: "sandbox.deleted", NodeID: "node01", Sequence: 2, SandboxID: "a"},
		{Time: at(4), Type: "key.created"},
	}
	if err := h.Append(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		q    Query
		want []int64
	}{
		"all":                 {Query{}, []int64{1, 2, 3, 4}},
		"newest":              {Query{Limit: 2}, []int64{3, 4}},
		"after":               {Query{After: 1, Limit: 2}, []int64{2, 3}},
		"sandbox":             {Query{Sandbox: "a"}, []int64{1, 3}},
		"node":                {Query{Node: "node02"}, []int64{2}},
		"type":                {Query{Type: "sandbox.created"}, []int64{1, 2}},
		"since":               {Query{Since: at(3)}, []int64{3, 4}},
		"since, limited":      {Query{Since: at(2), Limit: 1}, []int64{2}},
		"sandbox, type":       {Query{Sandbox: "a", Type: "sandbox.deleted"}, []int64{3}},
		"nothing":             {Query{Sandbox: "zz"}, nil},
		"quoting is no SQL":   {Query{Sandbox: "a' OR '1'='1"}, nil},
		"more than the limit": {Query{Limit: 1 << 30}, []int64{1, 2, 3, 4}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := h.Query(t.Context(), tt.q)
			if err != nil || !cmp.Equal(ids(got), tt.want) {
				t.Errorf("Query = %v, %v; want %v", ids(got), err, tt.want)
			}
		})
	}
	got, err := h.Query(t.Context(), Query{Sandbox: "a", Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	want := in[0]
	want.ID = 1
	if diff := cmp.Diff(want, got[0]); diff != "" {
		t.Error(diff)
	}
}

func TestNumberedEventsAreKeptOnce(t *testing.T) {
	h := open(t, Config{})
	start(t, h)
	for range 3 {
		if err := h.Append(t.Context(), []Event{{Type: "x", NodeID: "node01", Sequence: 7}, {Type: "y", NodeID: "node01"}}); err != nil {
			t.Fatal(err)
		}
	}
	x, err := h.Query(t.Context(), Query{Type: "x"})
	y, err2 := h.Query(t.Context(), Query{Type: "y"})
	if err := errors.Join(err, err2); err != nil || len(x) != 1 || len(y) != 3 {
		t.Errorf("%d numbered and %d other events, want 1 and 3 (%v)", len(x), len(y), err)
	}
}

func TestReopenKeepsEventsAndIDs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "history.db")
	for range 2 {
		h := open(t, Config{Path: path})
		stop := start(t, h)
		if err := h.Append(t.Context(), []Event{{Type: "x"}}); err != nil {
			t.Fatal(err)
		}
		stop()
	}
	got, err := open(t, Config{Path: path}).Query(t.Context(), Query{})
	if err != nil || !cmp.Equal(ids(got), []int64{1, 2}) {
		t.Errorf("after two runs: %v, %v", ids(got), err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the file: %v, %v", info.Mode(), err)
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	h := open(t, Config{Path: path})
	if _, err := h.write.ExecContext(t.Context(), "PRAGMA user_version = 99"); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), Config{Path: path, Logger: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("Open: %v, want ErrUnsupported", err)
	}
}

func TestRetention(t *testing.T) {
	h := open(t, Config{MaxAge: time.Hour, MaxEvents: 10})
	now := time.Now()
	var in []Event
	for i := range 20 {
		in = append(in, Event{Time: now.Add(time.Duration(i-20) * time.Second), Type: "new"})
	}
	in[19].Time = now.Add(-2 * time.Hour) // old, though it came last
	if err := h.insert(t.Context(), []*batch{{events: in}}, 0); err != nil {
		t.Fatal(err)
	}
	n, err := h.prune(t.Context(), now)
	if err != nil {
		t.Fatal(err)
	}
	got, err := h.Query(t.Context(), Query{})
	if err != nil || n != 10 || len(got) != 10 || got[0].ID != 10 || got[9].ID != 19 {
		t.Errorf("prune removed %d and left %v (%v), want 10 to 19 left", n, ids(got), err)
	}
}

func TestAppendRefusals(t *testing.T) {
	h := open(t, Config{})
	if err := h.Append(t.Context(), []Event{{}}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("no type: %v, want ErrInvalid", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Append(ctx, []Event{{Type: "x"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody writes and ctx has ended: %v, want the context's error", err)
	}
	for h.room.TryAcquire(1) {
		continue // as if all of that waited
	}
	if err := h.Append(ctx, []Event{{Type: "x"}}); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("no room: %v, want ErrExhausted", err)
	}
	h.Note(Event{Type: "x"})
	if h.dropped.Load() != 1 {
		t.Errorf("%d events counted as dropped, want 1", h.dropped.Load())
	}
}

func TestDroppedEventsAreTold(t *testing.T) {
	h := open(t, Config{})
	start(t, h)
	h.dropped.Store(3)
	if err := h.Append(t.Context(), []Event{{Type: "x"}}); err != nil {
		t.Fatal(err)
	}
	got, err := h.Query(t.Context(), Query{Type: droppedType})
	if err != nil || len(got) != 1 || got[0].Message != "3 events were dropped" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestRunWritesWhatWaits(t *testing.T) {
	h := open(t, Config{})
	for range 5000 {
		h.Note(Event{Type: "x"})
	}
	start(t, h)()
	got, err := h.Query(t.Context(), Query{Limit: maxLimit})
	if err != nil || len(got) != 5000 {
		t.Errorf("%d events are stored (%v), want 5000", len(got), err)
	}
	if err := h.Append(t.Context(), []Event{{Type: "x"}}); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("Append after Run: %v, want ErrUnavailable", err)
	}
}

func TestConcurrentAppends(t *testing.T) {
	h := open(t, Config{})
	start(t, h)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 50 {
				e := Event{Type: "x", NodeID: sandbox.NodeID(fmt.Sprintf("node%02d", w)), Sequence: int64(i + 1)}
				if err := h.Append(t.Context(), []Event{e}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, err := h.Query(t.Context(), Query{Limit: maxLimit})
	if err != nil || len(got) != 800 {
		t.Errorf("%d events, %v; want 800", len(got), err)
	}
}

func FuzzBounded(f *testing.F) {
	f.Add("type", "message", "key", "value")
	f.Add("t", "\xff\xfe"+strings.Repeat("é", maxMessage), "\x80", strings.Repeat("x", 2*maxField))
	f.Fuzz(func(t *testing.T, typ, message, key, value string) {
		e, err := bounded(Event{Type: typ, Message: message, Fields: map[string]string{key: value}})
		if err != nil {
			return
		}
		if len(e.Message) > maxMessage || !utf8.ValidString(e.Message) {
			t.Errorf("message of %d bytes, valid %v", len(e.Message), utf8.ValidString(e.Message))
		}
		for k, v := range e.Fields {
			if len(k) > maxType || len(v) > maxField || !utf8.ValidString(k+v) {
				t.Errorf("field %q of %d bytes", k, len(v))
			}
		}
		if len(message) <= maxMessage && utf8.ValidString(message) && e.Message != message {
			t.Errorf("a message within bounds became %q", e.Message)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	h := open(b, Config{})
	start(b, h)
	e := Event{Type: "sandbox.created", NodeID: "node01", SandboxID: "inode01abc", Message: "created", Fields: map[string]string{"template": "base"}}
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			if err := h.Append(context.Background(), []Event{e}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := h.Append(context.Background(), []Event{e}); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

func BenchmarkQueryNewest(b *testing.B) {
	h := open(b, Config{})
	events := make([]Event, 20_000)
	for i := range events {
		events[i] = Event{Time: time.Now(), Type: "x", SandboxID: sandbox.ID(fmt.Sprint("s", i%500))}
	}
	if err := h.insert(context.Background(), []*batch{{events: events}}, 0); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if got, err := h.Query(context.Background(), Query{Sandbox: "s7"}); err != nil || len(got) != 40 {
			b.Fatal(len(got), err)
		}
	}
}
