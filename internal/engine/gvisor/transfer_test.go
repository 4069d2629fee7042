package gvisor

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// TestRestoredElsewhere starts a guest from a checkpoint that another engine saved and that came by extents, as between two
// machines.
func TestRestoredElsewhere(t *testing.T) {
	here, there := newPlace(t), newPlace(t)
	e, other := here.open(t), there.open(t)
	s, w := here.servingIn(t, e, 0)
	w.ask(t, fmt.Sprintf("write /tmp/a %d", 16<<20))
	want := w.ask(t, "sum /tmp/a")
	from, to := openStore(t, here.saves), openStore(t, there.saves)
	st, err := from.Begin("one")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Save(testContext(t), s.ID, engine.SaveSpec{Dir: st.Dir(), Kind: engine.SaveMemory}); err != nil {
		t.Fatal(err)
	}
	m, err := from.Commit(st, snapshot.Manifest{Kind: sandbox.CheckpointMemory, ImageDigest: "sha256:1"})
	if err != nil {
		t.Fatal(err)
	}
	held := carry(t, from, to, m)
	defer held.Release()
	s.RootFS = there.spec(t, "serve").RootFS
	_, w = there.again(t, other, s, held.Dir, 1)
	if got := w.ask(t, "sum /tmp/a"); got != want {
		t.Errorf("its file has hash %s, had %s", got, want)
	}
}

func openStore(t *testing.T, dir string) *snapshot.Store {
	t.Helper()
	s, err := snapshot.New(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// carry copies a checkpoint to another store, as it goes over a network.
func carry(t *testing.T, from, to *snapshot.Store, m snapshot.Manifest) *snapshot.Held {
	t.Helper()
	h, err := from.Hold(m.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Release()
	im, err := to.Import(m.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if err := im.Begin(&snapshot.Head{Manifest: m}); err != nil {
		t.Fatal(err)
	}
	for {
		pos, more, err := im.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			break
		}
		var sent bytes.Buffer
		if err := h.Send(t.Context(), &sent, pos.File, pos.Offset); err != nil {
			t.Fatal(err)
		}
		if _, err := im.Receive(t.Context(), &sent); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := im.Commit(nil); err != nil {
		t.Fatal(err)
	}
	got, err := to.Hold(m.ID)
	if err != nil {
		t.Fatal(err)
	}
	return got
}
