package image

import (
	"context"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Compose makes the image of base with the layers on top, or finds it.
func (s *Store) Compose(_ context.Context, base string, _ []string, _ func(Progress)) (Image, error) {
	return Image{}, sandbox.Unsupportedf("compose an image on %s: not yet", base)
}
