package enginetest

import (
	"errors"
	"io"
	"testing"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// streamTo saves a guest into a stream that another one is started from, and returns what became of both.
func streamTo(t *testing.T, e engine.Engine, id sandbox.ID, save engine.SaveSpec, to engine.Spec) (saveErr, startErr error) {
	t.Helper()
	r, w := io.Pipe()
	save.Kind, save.Stream, to.Stream = engine.SaveMemory, w, r
	ctx, saved := within(t), make(chan error, 1)
	go func() {
		_, err := e.Save(ctx, id, save)
		_ = w.CloseWithError(err) // nil is the end
		saved <- err
	}()
	startErr = e.Start(ctx, to)
	_ = r.Close() // who still writes sees that nobody reads
	return <-saved, startErr
}

func testStream(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Holding(t)
	start(t, e, spec)
	for i, hold := range []bool{true, false, true} {
		text := string(rune('a' + i))
		m.Put(t, spec, text, text)
		to := m.Again(t, spec, "")
		to.Hold = hold
		if saveErr, startErr := streamTo(t, e, spec.ID, engine.SaveSpec{Hold: true}, to); saveErr != nil || startErr != nil {
			t.Fatalf("got %v and %v", saveErr, startErr)
		}
		after := m.Open(t)
		wantList(t, after, map[sandbox.ID]bool{spec.ID: true, to.ID: true})
		if err := errors.Join(after.Thaw(within(t), to.ID), after.Thaw(within(t), spec.ID)); err != nil {
			t.Errorf("thaw: %v", err)
		}
		wantHeld(t, m, to, text, text)
		wantHeld(t, m, spec, text, text)
		stop(t, e, spec.ID)
		e, spec = after, to
	}
	stop(t, e, spec.ID)
	wantNothing(t, m, e)
}

// breaking gives the first bytes of a stream, and then fails.
type breaking struct {
	r    io.Reader
	left int
}

var errBroken = errors.New("broken by the test")

func (b *breaking) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, errBroken
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

func testStreamBreaksOff(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Holding(t)
	start(t, e, spec)
	m.Put(t, spec, "memory", "file")
	for _, bytes := range []int{0, 3, 20, 1 << 20} {
		to := m.Again(t, spec, "")
		r, w := io.Pipe()
		to.Stream, to.Hold = &breaking{r, bytes}, true
		ctx, saved := within(t), make(chan error, 1)
		go func() {
			_, err := e.Save(ctx, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory, Stream: w, Hold: true})
			_ = w.CloseWithError(err)
			saved <- err
		}()
		if err := e.Start(within(t), to); err == nil && bytes < 1<<10 {
			t.Errorf("a stream that ends after %d bytes: the guest started", bytes)
		} else if err == nil {
			stop(t, e, to.ID) // all was there
		}
		_ = r.Close() // ends the save where it goes on
		if err := <-saved; err == nil {
			if err := e.Thaw(within(t), spec.ID); err != nil {
				t.Error(err)
			}
		}
		wantList(t, e, map[sandbox.ID]bool{spec.ID: true})
		wantHeld(t, m, spec, "memory", "file")
	}
	stop(t, e, spec.ID)
	wantNothing(t, m, e)
}
