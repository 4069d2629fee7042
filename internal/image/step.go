package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxSteps is how many steps are remembered.
	maxSteps = 10_000
	// maxStepRecord is more than a step's record has, in bytes.
	maxStepRecord = 4 << 10
)

// stepRecord is what is remembered of a step. When its file was last changed is when the step was last used.
type stepRecord struct {
	Layer string `json:"layer"`
}

func (s *Store) stepDir() string { return filepath.Join(s.cfg.Dir, "steps") }

func (s *Store) stepPath(key string) (string, error) {
	if !isHexDigest(key) {
		return "", sandbox.Invalidf("step key %.128q is not 64 lower-case hex digits", key)
	}
	return filepath.Join(s.stepDir(), key), nil
}

// StepLayer returns the digest of the layer that a step's key was cached with, "" where the step changed nothing. ok is
// false for a key that is not cached, or whose layer is gone. It counts as a use of the step.
func (s *Store) StepLayer(key string) (layer string, ok bool) {
	path, err := s.stepPath(key)
	if err != nil {
		return "", false
	}
	rec, err := readStep(path)
	if err != nil || rec.Layer != "" && !s.hasLayer(rec.Layer) {
		return "", false
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // at worst the step is freed too early
	return rec.Layer, true
}

func readStep(path string) (stepRecord, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return stepRecord{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxStepRecord {
		return stepRecord{}, fmt.Errorf("%s has %d bytes and mode %s", path, info.Size(), info.Mode())
	}
	data, err := os.ReadFile(path) //nolint:gosec // a file of the store's own
	if err != nil {
		return stepRecord{}, err
	}
	var rec stepRecord
	return rec, json.Unmarshal(data, &rec)
}

// PutStep remembers the layer that the step with that key makes, "" for a step that changes nothing. The key is 64 hex
// digits of the caller's making; a layer that is not in the store is ErrNotFound.
func (s *Store) PutStep(key, layer string) error {
	path, err := s.stepPath(key)
	if err != nil {
		return err
	}
	if layer != "" && !s.hasLayer(layer) {
		return sandbox.NotFoundf("cache step %s: layer %s is not in the store", key, layer)
	}
	data, err := json.Marshal(stepRecord{Layer: layer})
	if err != nil {
		return fmt.Errorf("cache step %s: %w", key, err)
	}
	if err := s.replace(path, data); err != nil {
		return fmt.Errorf("cache step %s: %w", key, err)
	}
	s.claim(layer)
	return nil
}

// replace writes a small file in one step.
func (s *Store) replace(path string, data []byte) error {
	work, err := os.MkdirTemp(s.tempDir(), "record-")
	if err != nil {
		return full(err)
	}
	from := filepath.Join(work, "record")
	err = writeSynced(from, data)
	if err == nil {
		err = os.Rename(from, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	return full(errors.Join(err, os.RemoveAll(work)))
}

// claim says that something refers to the layers now, so that they need no grace any more. A Prune that runs may not have
// seen it: then they keep the grace.
func (s *Store) claim(layers ...string) {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	if s.prunes > 0 {
		return
	}
	for _, layer := range layers {
		delete(s.fresh, layer)
	}
}

// cachedStep is a step and what keeping it costs.
type cachedStep struct {
	key, layer string
	used       time.Time
}

// Prune frees layers that no image and no cached step refers to, and steps beyond the cache's bounds (10,000 steps, and
// Config.CacheBytes of layers that no image has too), oldest use first. What inUse names, layers or images, stays: it is
// for builds that run. A layer that was made within the last hour and that nothing has referred to yet stays as well.
func (s *Store) Prune(ctx context.Context, inUse []string) error {
	s.countPrunes(1)
	defer s.countPrunes(-1)
	if err := s.prune(ctx, inUse); err != nil {
		return fmt.Errorf("prune image store: %w", err)
	}
	return nil
}

func (s *Store) countPrunes(n int) {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	s.prunes += n
}

func (s *Store) prune(ctx context.Context, inUse []string) error {
	images, err := s.List(ctx)
	if err != nil {
		return err
	}
	needed := map[string]bool{}
	for _, digest := range inUse {
		needed[digest] = true
	}
	for _, img := range images {
		needed[img.Digest] = true
		for _, layer := range img.Layers {
			needed[layer] = true
		}
	}
	steps, err := s.steps(ctx)
	if err != nil {
		return err
	}
	keep, drop := chooseSteps(steps, s.cfg.CacheBytes, func(layer string) int64 {
		if layer == "" || needed[layer] {
			return 0
		}
		return s.layerBytes(layer)
	})
	for _, step := range drop {
		if err := s.removeFile(filepath.Join(s.stepDir(), step.key)); err != nil {
			return err
		}
	}
	for _, step := range keep {
		needed[step.layer] = true
	}
	if len(drop) > 0 {
		s.log.InfoContext(ctx, "cached build steps freed", slog.Int("steps", len(drop)))
	}
	return errors.Join(s.freeLayers(ctx, needed), s.freeNotes(ctx))
}

// steps lists the cached steps. Those that cannot be read, and those whose layers are gone, are removed.
func (s *Store) steps(ctx context.Context) ([]cachedStep, error) {
	entries, err := os.ReadDir(s.stepDir())
	if err != nil {
		return nil, err
	}
	all := make([]cachedStep, 0, len(entries))
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		path := filepath.Join(s.stepDir(), e.Name())
		rec, err := readStep(path)
		info, infoErr := e.Info()
		if err != nil || infoErr != nil || !isHexDigest(e.Name()) || rec.Layer != "" && !s.hasLayer(rec.Layer) {
			if err := s.removeFile(path); err != nil {
				return nil, err
			}
			continue
		}
		all = append(all, cachedStep{key: e.Name(), layer: rec.Layer, used: info.ModTime()})
	}
	return all, nil
}

// removeFile deletes what is at the path; it is no error where there is nothing.
func (s *Store) removeFile(path string) error {
	err := os.RemoveAll(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// chooseSteps says which steps stay: those used last, as long as they are few enough and their layers small enough
// together. cost is what a layer takes, in bytes.
func chooseSteps(steps []cachedStep, bound int64, cost func(layer string) int64) (keep, drop []cachedStep) {
	slices.SortFunc(steps, func(a, b cachedStep) int {
		return cmp.Or(b.used.Compare(a.used), strings.Compare(a.key, b.key))
	})
	counted := map[string]bool{}
	total := int64(0)
	for _, step := range steps {
		add := int64(0)
		if !counted[step.layer] {
			add = cost(step.layer)
		}
		if total += add; len(keep) >= maxSteps || total > bound && add > 0 {
			drop = append(drop, step)
			continue
		}
		counted[step.layer] = true
		keep = append(keep, step)
	}
	return keep, drop
}

func (s *Store) layerBytes(layer string) int64 {
	path, err := s.layerPath(layer)
	if err != nil {
		return 0
	}
	info, err := os.Lstat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// freeLayers deletes the layers that are not needed.
func (s *Store) freeLayers(ctx context.Context, needed map[string]bool) error {
	entries, err := os.ReadDir(s.layerDir())
	if err != nil {
		return err
	}
	freed := 0
	for _, e := range entries {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		digest := "sha256:" + e.Name()
		if needed[digest] {
			continue
		}
		gone, err := s.freeLayer(digest, filepath.Join(s.layerDir(), e.Name()))
		if err != nil {
			return err
		}
		if gone {
			freed++
		}
	}
	if freed > 0 {
		s.log.InfoContext(ctx, "layers freed", slog.Int("layers", freed))
	}
	return nil
}

// freeLayer deletes a layer, unless it is so new that nothing can refer to it yet.
func (s *Store) freeLayer(digest, path string) (bool, error) {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	if made, ok := s.fresh[digest]; ok && time.Since(made) < freshFor {
		return false, nil
	}
	delete(s.fresh, digest)
	return true, s.removeFile(path)
}
