package fake

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/engine/enginetest"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func spec(args ...string) engine.Spec {
	return engine.Spec{
		ID: sandbox.NewID("testno"), RootFS: "/root.erofs", ScratchDir: "/scratch", Args: args,
		Limits: sandbox.Resources{MilliCPU: 1000, MemoryBytes: 512 << 20, DiskBytes: 1 << 30},
	}
}

func TestEngine(t *testing.T) {
	enginetest.Run(t, func(*testing.T) enginetest.Machine {
		h := NewHost()
		h.OnStart(func(s engine.Spec) (*engine.Exit, error) {
			if len(s.Args) == 0 { // it goes on from a checkpoint
				return nil, nil
			}
			switch s.Args[0] {
			case "/exit":
				code, err := strconv.Atoi(s.Args[1])
				return &engine.Exit{Code: code, Reason: "exited"}, err
			case "/broken":
				return nil, sandbox.Invalidf("no such program")
			}
			return nil, nil
		})
		return enginetest.Machine{
			Open:    func(*testing.T) engine.Engine { return New(h) },
			Resting: func(*testing.T) engine.Spec { return spec("/rest") },
			Exiting: func(_ *testing.T, code int) engine.Spec { return spec("/exit", strconv.Itoa(code)) },
			Broken:  func(*testing.T) engine.Spec { return spec("/broken") },
			Left:    func(*testing.T) []string { return nil },
			Holding: func(*testing.T) engine.Spec { return spec("/hold") },
			Again: func(_ *testing.T, s engine.Spec, checkpoint string) engine.Spec {
				s.ID, s.Checkpoint = sandbox.NewID("testno"), checkpoint
				return s
			},
			Put: func(t *testing.T, s engine.Spec, memory, file string) {
				t.Helper()
				if err := h.SetContents(s.ID, Contents{Memory: memory, Files: file}); err != nil {
					t.Error(err)
				}
			},
			Get: func(_ *testing.T, s engine.Spec) (string, string) {
				c, _ := h.Contents(s.ID)
				return c.Memory, c.Files
			},
			Age: func(t *testing.T, checkpoint string) {
				t.Helper()
				replaceIn(t, filepath.Join(checkpoint, saveFile), `"version":"1"`, `"version":"0"`)
			},
		}
	})
}

func replaceIn(t *testing.T, path, from, to string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(raw), from, to, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSaveHooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		h := NewHost()
		e, s := New(h), spec("/rest")
		if err := e.Start(ctx, s); err != nil {
			t.Fatal(err)
		}
		failed := errors.New("no space")
		h.OnSave(func(sandbox.ID, engine.SaveSpec) error { return failed })
		if _, err := e.Save(ctx, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: t.TempDir(), Hold: true}); !errors.Is(err, failed) {
			t.Errorf("got %v, want what the hook says", err)
		}
		if h.Still(s.ID) {
			t.Error("the guest stands still after a save that failed")
		}
		h.OnSave(nil)
		if _, err := e.Save(ctx, s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: t.TempDir(), Hold: true}); err != nil {
			t.Fatal(err)
		}
		before, err := e.Stats(ctx, s.ID)
		if err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Hour) // of a clock that does not wait
		after, err := e.Stats(ctx, s.ID)
		if err != nil || after.CPUTime != before.CPUTime || !h.Still(s.ID) {
			t.Errorf("got %v after %v, %v, want no processor time", after.CPUTime, before.CPUTime, err)
		}
		if err := h.SetContents(s.ID, Contents{}); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("got %v, want ErrConflict", err)
		}
	})
}

func TestHooks(t *testing.T) {
	ctx := t.Context()
	h := NewHost()
	e := New(h)
	for _, tt := range []struct {
		name string
		end  func(sandbox.ID) error
		want engine.Exit
	}{
		{"out of memory", h.OOM, engine.Exit{Code: -1, OOM: true, Reason: "out of memory: the limit is 512 MiB"}},
		{"crash", h.Crash, engine.Exit{Code: -1, Reason: "the sentry was killed by signal 9 (killed)"}},
		{"own end", func(id sandbox.ID) error { return h.End(id, engine.Exit{Code: 4}) }, engine.Exit{Code: 4}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := spec("/rest")
			if err := tt.end(s.ID); !errors.Is(err, sandbox.ErrNotFound) {
				t.Fatalf("end of an unknown guest: got %v, want ErrNotFound", err)
			}
			if err := e.Start(ctx, s); err != nil {
				t.Fatal(err)
			}
			if err := tt.end(s.ID); err != nil {
				t.Fatal(err)
			}
			got, err := e.Wait(ctx, s.ID)
			got.At = time.Time{}
			if err != nil || got != tt.want {
				t.Fatalf("got %+v, %v, want %+v", got, err, tt.want)
			}
		})
	}
}

func TestUsage(t *testing.T) {
	ctx := t.Context()
	h := NewHost()
	e, s := New(h), spec("/rest")
	if err := h.SetUsage(s.ID, engine.Stats{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Fatalf("got %v, want ErrNotFound", err)
	}
	if err := e.Start(ctx, s); err != nil {
		t.Fatal(err)
	}
	if err := h.SetUsage(s.ID, engine.Stats{MemoryBytes: 7}); err != nil {
		t.Fatal(err)
	}
	if got, err := e.Stats(ctx, s.ID); err != nil || got.MemoryBytes != 7 || got.Time.IsZero() {
		t.Fatalf("got %+v, %v", got, err)
	}
	if got, ok := h.Spec(s.ID); !ok || got.ID != s.ID {
		t.Fatalf("got %+v, %v", got, ok)
	}
}

func TestLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHost()
		h.SetLatency(time.Second)
		e, s := New(h), spec("/rest")
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if err := e.Start(ctx, s); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v, want that the deadline passed", err)
		}
		begin := time.Now()
		if err := e.Start(t.Context(), s); err != nil || time.Since(begin) != time.Second {
			t.Fatalf("got %v after %v, want success after 1s", err, time.Since(begin))
		}
	})
}
