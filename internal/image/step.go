package image

import (
	"context"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// StepLayer returns the digest of the layer that a step's key was cached with, "" where the step changed nothing. ok is
// false for a key that is not cached, or whose layer is gone.
func (s *Store) StepLayer(string) (layer string, ok bool) { return "", false }

// PutStep remembers the layer that the step with that key makes.
func (s *Store) PutStep(key, _ string) error { return sandbox.Unsupportedf("cache step %s: not yet", key) }

// Prune frees layers that no image and no cached step refers to, and steps beyond the cache's bounds, oldest use first.
// What inUse names, layers or images, stays.
func (s *Store) Prune(context.Context, []string) error { return sandbox.Unsupportedf("prune: not yet") }
