package enginetest

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// save saves a guest into a new directory.
func save(t *testing.T, e engine.Engine, id sandbox.ID, spec engine.SaveSpec) string {
	t.Helper()
	spec.Dir = t.TempDir()
	saved, err := e.Save(within(t), id, spec)
	if err != nil {
		t.Fatalf("save: %v", err)
	}
	if saved.Bytes <= 0 || saved.SharedBytes < 0 || saved.MemoryBytes < 0 || saved.MemoryBytes > saved.Bytes+saved.SharedBytes {
		t.Errorf("save: got %+v, want some bytes and nothing negative", saved)
	}
	return spec.Dir
}

func wantHeld(t *testing.T, m Machine, spec engine.Spec, memory, file string) {
	t.Helper()
	if gotMemory, gotFile := m.Get(t, spec); gotMemory != memory || gotFile != file {
		t.Errorf("guest %s holds %q and %q, want %q and %q", spec.ID, gotMemory, gotFile, memory, file)
	}
}

// again starts a guest from a checkpoint of one like spec.
func again(t *testing.T, m Machine, e engine.Engine, spec engine.Spec, dir string) engine.Spec {
	t.Helper()
	s := m.Again(t, spec, dir)
	start(t, e, s)
	return s
}

func testSaveMemory(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Holding(t)
	start(t, e, spec)
	m.Put(t, spec, "memory one", "file one")
	dir := save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory})
	wantHeld(t, m, spec, "memory one", "file one")
	m.Put(t, spec, "memory two", "file two") // later than the checkpoint
	first, second := again(t, m, e, spec, dir), again(t, m, e, spec, dir)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	wantHeld(t, m, first, "memory one", "file one")
	m.Put(t, first, "memory three", "file three")
	wantHeld(t, m, second, "memory one", "file one")
	wantHeld(t, m, first, "memory three", "file three")
	wantHeld(t, m, spec, "memory two", "file two")
	for _, s := range []engine.Spec{first, second, spec} {
		stop(t, e, s.ID)
	}
	wantNothing(t, m, e)
}

func testSaveGenerations(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Holding(t)
	start(t, e, spec)
	for i := range 4 {
		text := strings.Repeat("x", i+1)
		m.Put(t, spec, text, text)
		dir := save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true})
		stop(t, e, spec.ID)
		spec = again(t, m, e, spec, dir)
		wantHeld(t, m, spec, text, text)
	}
	after := m.Open(t) // a guest that started from a checkpoint is found like any other
	wantList(t, after, map[sandbox.ID]bool{spec.ID: true})
	save(t, after, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory})
	stop(t, after, spec.ID)
	wantNothing(t, m, after)
}

func testSaveFiles(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Holding(t)
	start(t, e, spec)
	m.Put(t, spec, "memory", "file")
	dir := save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveFiles})
	m.Put(t, spec, "other", "other")
	first := again(t, m, e, spec, dir)
	wantHeld(t, m, first, "", "file")
	second := again(t, m, e, first, save(t, e, first.ID, engine.SaveSpec{Kind: engine.SaveMemory}))
	wantHeld(t, m, second, "", "file")
	third := again(t, m, e, second, save(t, e, second.ID, engine.SaveSpec{Kind: engine.SaveFiles}))
	wantHeld(t, m, third, "", "file")
	none := m.Again(t, spec, dir)
	none.Args = nil
	if err := e.Start(within(t), none); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("files without a program: got %v, want ErrInvalid", err)
	}
	for _, s := range []engine.Spec{first, second, third, spec} {
		stop(t, e, s.ID)
	}
	wantNothing(t, m, e)
}

func testSaveLayer(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Holding(t)
	start(t, e, spec)
	m.Put(t, spec, "memory", "the file's text")
	dir := save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveLayer})
	if !layerHas(t, filepath.Join(dir, engine.LayerFile), "the file's text") {
		t.Error("no file of the layer has the text")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the layer alone", entries, err)
	}
	if err := e.Start(within(t), m.Again(t, spec, dir)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("start from a layer: got %v, want ErrInvalid", err)
	}
	wantHeld(t, m, spec, "memory", "the file's text")
	stop(t, e, spec.ID)
	wantNothing(t, m, e)
}

// layerHas reports whether a file of an archive holds text alone.
func layerHas(t *testing.T, file, text string) bool {
	t.Helper()
	f, err := os.Open(file) //nolint:gosec // the test's own
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // opened for reading
	for tr := tar.NewReader(f); ; {
		_, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(io.LimitReader(tr, int64(len(text))+1)); err == nil && string(got) == text {
			return true
		}
	}
}

func testHold(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Holding(t)
	start(t, e, spec)
	m.Put(t, spec, "memory", "file")
	for _, kind := range []engine.SaveKind{engine.SaveMemory, engine.SaveFiles, engine.SaveLayer} {
		save(t, e, spec.ID, engine.SaveSpec{Kind: kind, Hold: true})
		wantList(t, e, map[sandbox.ID]bool{spec.ID: true})
		if _, err := e.Stats(within(t), spec.ID); err != nil {
			t.Errorf("stats: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := e.Wait(ctx, spec.ID); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait for a guest that stands still: got %v, want that the deadline passed", err)
		}
		cancel()
		after := m.Open(t)
		for range 2 { // the second has nothing to do
			if err := after.Thaw(within(t), spec.ID); err != nil {
				t.Errorf("thaw: %v", err)
			}
		}
		wantHeld(t, m, spec, "memory", "file")
	}
	save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true})
	save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory})
	wantHeld(t, m, spec, "memory", "file")
	save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory, Hold: true})
	stop(t, e, spec.ID)
	wantNothing(t, m, e)
}

func testSaveRefuses(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Resting(t)
	if _, err := e.Save(within(t), spec.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: t.TempDir()}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("save of an unknown guest: got %v, want ErrNotFound", err)
	}
	if err := e.Thaw(within(t), spec.ID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("thaw of an unknown guest: got %v, want ErrNotFound", err)
	}
	start(t, e, spec)
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "there"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		spec engine.SaveSpec
		want error
	}{
		{"kind", engine.SaveSpec{Kind: "else", Dir: t.TempDir()}, sandbox.ErrUnsupported},
		{"no directory", engine.SaveSpec{Kind: engine.SaveMemory, Dir: filepath.Join(full, "none")}, sandbox.ErrInvalid},
		{"full directory", engine.SaveSpec{Kind: engine.SaveMemory, Dir: full}, sandbox.ErrInvalid},
	} {
		if _, err := e.Save(within(t), spec.ID, tt.spec); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
	stop(t, e, spec.ID)
	ended := m.Exiting(t, 0)
	start(t, e, ended)
	wait(t, e, ended.ID)
	if _, err := e.Save(within(t), ended.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: t.TempDir()}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("save of a guest that has ended: got %v, want ErrNotFound", err)
	}
	stop(t, e, ended.ID)
	wantNothing(t, m, e)
}

func testCheckpointRefused(t *testing.T, m Machine) {
	t.Helper()
	e, spec := m.Open(t), m.Resting(t)
	start(t, e, spec)
	refused := func(what, dir string, want error) {
		t.Helper()
		s := m.Resting(t)
		s.Checkpoint = dir
		if err := e.Start(within(t), s); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
	}
	for _, kind := range []engine.SaveKind{engine.SaveMemory, engine.SaveFiles} {
		refused("empty directory", t.TempDir(), sandbox.ErrInvalid)
		dir := save(t, e, spec.ID, engine.SaveSpec{Kind: kind})
		damage(t, dir, func(what string) { refused(string(kind)+" "+what, dir, sandbox.ErrInvalid) })
		m.Age(t, dir)
		refused("another version's", dir, sandbox.ErrUnsupported)
	}
	dir := save(t, e, spec.ID, engine.SaveSpec{Kind: engine.SaveMemory})
	other := m.Resting(t)
	other.Checkpoint, other.Limits.MemoryBytes = dir, other.Limits.MemoryBytes*2
	if err := e.Start(within(t), other); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("other limits: got %v, want ErrInvalid", err)
	}
	stop(t, e, spec.ID)
	wantNothing(t, m, e)
}

// damage calls f for each file of a checkpoint, with the file missing and with it cut off.
func damage(t *testing.T, dir string, f func(what string)) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		raw, err := os.ReadFile(path) //nolint:gosec // the test's own
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		f(entry.Name() + " missing")
		for _, n := range []int{len(raw) / 2, len(raw)} { // the second makes it whole again
			if err := os.WriteFile(path, raw[:n], 0o600); err != nil { //nolint:gosec // as above
				t.Fatal(err)
			}
			if n < len(raw) {
				f(entry.Name() + " cut off")
			}
		}
	}
}
