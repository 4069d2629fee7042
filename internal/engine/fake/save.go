package fake

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	saveFile    = "checkpoint.json"
	saveName    = "fake"
	saveVersion = "1"
	fileMode    = 0o600

	// contentFile is the name of Contents.Files in a layer.
	contentFile = "content"
)

// Contents is all that a guest of a Host holds.
type Contents struct {
	Memory string `json:"memory"`
	Files  string `json:"files"`
}

// saved is a checkpoint.
type saved struct {
	Engine   string            `json:"engine"`
	Version  string            `json:"version"`
	Kind     engine.SaveKind   `json:"kind"`
	Limits   sandbox.Resources `json:"limits"`
	Contents Contents          `json:"contents"`
}

// SetContents sets what a guest holds. One that does not run, or stands still, is ErrConflict.
func (h *Host) SetContents(id sandbox.ID, c Contents) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	switch {
	case g == nil:
		return notFound(id)
	case !g.running() || g.still():
		return sandbox.Conflictf("sandbox %s does nothing now", id)
	}
	g.contents = c
	return nil
}

// Contents returns what a guest holds.
func (h *Host) Contents(id sandbox.ID) (Contents, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	if g == nil {
		return Contents{}, false
	}
	return g.contents, true
}

// Still reports whether a guest stands still.
func (h *Host) Still(id sandbox.ID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	return g != nil && g.still()
}

// OnSave sets what happens at each later save before anything is written, in place of nothing: an error fails it. It may
// take its time. Nil sets nothing again.
func (h *Host) OnSave(f func(sandbox.ID, engine.SaveSpec) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onSave = f
}

func (g *guest) still() bool { return !g.stillSince.IsZero() }

// stand makes a guest stand still or go on. The Host must be locked.
func (g *guest) stand(still bool) {
	switch {
	case still && !g.still():
		g.stillSince = time.Now()
	case !still && g.still():
		g.stoodFor += time.Since(g.stillSince)
		g.stillSince = time.Time{}
	}
}

// active is how long a guest has been running and not standing still.
func (g *guest) active(now time.Time) time.Duration {
	d := now.Sub(g.started) - g.stoodFor
	if g.still() {
		d -= now.Sub(g.stillSince)
	}
	return d
}

// Save writes a guest's state. See engine.Engine.
func (e *Engine) Save(ctx context.Context, id sandbox.ID, spec engine.SaveSpec) (engine.Saved, error) {
	h := e.host
	h.mu.Lock()
	g, onSave := h.guests[id], h.onSave
	h.mu.Unlock()
	if g == nil || !g.running() {
		return engine.Saved{}, notFound(id)
	}
	if err := checkSave(spec); err != nil {
		return engine.Saved{}, fmt.Errorf("save %s: %w", id, err)
	}
	if onSave != nil {
		if err := onSave(id, spec); err != nil {
			return engine.Saved{}, fmt.Errorf("save %s: %w", id, err)
		}
	}
	if err := ctx.Err(); err != nil {
		return engine.Saved{}, fmt.Errorf("save %s: %w: %w", id, sandbox.ErrUnavailable, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.guests[id] != g || !g.running() {
		return engine.Saved{}, notFound(id)
	}
	out := engine.Saved{}
	if spec.Kind == engine.SaveMemory {
		out.MemoryBytes = int64(len(g.contents.Memory))
	}
	stood := g.still()
	g.stand(true) // so that nobody changes it
	h.mu.Unlock() // who takes a stream takes its time
	n, err := g.write(spec)
	h.mu.Lock()
	g.stand(stood && err != nil || spec.Hold && err == nil)
	if err != nil {
		return engine.Saved{}, fmt.Errorf("save %s: %w: %w", id, sandbox.ErrUnavailable, err)
	}
	out.Bytes = n
	return out, nil
}

func checkSave(spec engine.SaveSpec) error {
	switch spec.Kind {
	case engine.SaveMemory, engine.SaveFiles, engine.SaveLayer:
	default:
		return sandbox.Unsupportedf("no such kind as %.40q", spec.Kind)
	}
	if spec.Stream != nil {
		if spec.Kind != engine.SaveMemory {
			return sandbox.Unsupportedf("a stream of kind %q", spec.Kind)
		}
		return nil
	}
	entries, err := os.ReadDir(spec.Dir)
	if err != nil || len(entries) > 0 {
		return sandbox.Invalidf("directory %q: want one that exists and is empty", spec.Dir)
	}
	return nil
}

// write writes the state of a guest that stands still, and returns its size in bytes.
func (g *guest) write(spec engine.SaveSpec) (int64, error) {
	if spec.Kind == engine.SaveLayer {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		err := w.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: contentFile, Mode: fileMode, Size: int64(len(g.contents.Files)), ModTime: time.Now(),
		})
		if err != nil {
			return 0, err
		}
		if _, err := w.Write([]byte(g.contents.Files)); err != nil {
			return 0, err
		}
		if err := w.Close(); err != nil {
			return 0, err
		}
		return int64(b.Len()), os.WriteFile(filepath.Join(spec.Dir, engine.LayerFile), b.Bytes(), fileMode)
	}
	s := saved{Engine: saveName, Version: saveVersion, Kind: spec.Kind, Limits: g.spec.Limits, Contents: g.contents}
	if spec.Kind == engine.SaveFiles {
		s.Contents.Memory = ""
	}
	raw, err := json.Marshal(s)
	if err != nil {
		return 0, err
	}
	if spec.Stream != nil {
		_, err := spec.Stream.Write(raw)
		return int64(len(raw)), err
	}
	return int64(len(raw)), os.WriteFile(filepath.Join(spec.Dir, saveFile), raw, fileMode)
}

func readSaved(spec engine.Spec) ([]byte, error) {
	if spec.Stream == nil {
		return os.ReadFile(filepath.Join(spec.Checkpoint, saveFile))
	}
	raw, err := io.ReadAll(spec.Stream)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", sandbox.ErrUnavailable, err)
	}
	return raw, nil
}

// contentsOf reads what a guest holds at its start.
func contentsOf(spec engine.Spec) (Contents, error) {
	if spec.Checkpoint == "" && spec.Stream == nil {
		return Contents{}, nil
	}
	raw, err := readSaved(spec)
	if errors.Is(err, os.ErrNotExist) {
		return Contents{}, sandbox.Invalidf("checkpoint %s: it has no %s", spec.Checkpoint, saveFile)
	}
	if err != nil {
		return Contents{}, fmt.Errorf("read checkpoint: %w", err)
	}
	var s saved
	if err := json.Unmarshal(raw, &s); err != nil {
		return Contents{}, sandbox.Invalidf("checkpoint %s: %v", spec.Checkpoint, err)
	}
	switch {
	case s.Engine != saveName || s.Version != saveVersion:
		return Contents{}, sandbox.Unsupportedf("checkpoint %s: it was saved by %s %s, and this is %s %s",
			spec.Checkpoint, s.Engine, s.Version, saveName, saveVersion)
	case s.Kind == engine.SaveMemory && s.Limits != spec.Limits:
		return Contents{}, sandbox.Invalidf("checkpoint %s: it was made with limits %+v: got %+v", spec.Checkpoint, s.Limits, spec.Limits)
	case s.Kind == engine.SaveFiles && len(spec.Args) == 0:
		return Contents{}, sandbox.Invalidf("checkpoint %s holds files alone: want a program to run", spec.Checkpoint)
	case s.Kind != engine.SaveMemory && spec.Stream != nil:
		return Contents{}, sandbox.Invalidf("a stream of kind %.40q", s.Kind)
	case s.Kind != engine.SaveMemory && s.Kind != engine.SaveFiles:
		return Contents{}, sandbox.Invalidf("checkpoint %s: it is of kind %.40q", spec.Checkpoint, s.Kind)
	}
	return s.Contents, nil
}

// Thaw lets a guest go on. See engine.Engine.
func (e *Engine) Thaw(ctx context.Context, id sandbox.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	h := e.host
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[id]
	if g == nil || !g.running() {
		return notFound(id)
	}
	g.stand(false)
	return nil
}
