package agent

import (
	"context"

	"github.com/cloister-dev/cloister/internal/image"
)

// composer makes images of layers, and remembers which layer each step made.
type composer interface {
	Get(ctx context.Context, digest string) (image.Image, error)
	NewRecorder() *image.Recorder
	Compose(ctx context.Context, base string, layers []string, progress func(image.Progress)) (image.Image, error)
	StepLayer(key string) (layer string, ok bool)
	PutStep(key, layer string) error
	Prune(ctx context.Context, inUse []string) error
	Push(ctx context.Context, r image.PushRequest, progress func(image.Progress)) error
}
