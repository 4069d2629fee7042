package fake

import (
	"context"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Save writes a guest's state. See engine.Engine.
func (f *Engine) Save(context.Context, sandbox.ID, engine.SaveSpec) (engine.Saved, error) {
	return engine.Saved{}, sandbox.Unsupportedf("fake: saving a guest is not supported by this version")
}

// Thaw lets a guest go on. See engine.Engine.
func (f *Engine) Thaw(context.Context, sandbox.ID) error {
	return sandbox.Unsupportedf("fake: saving a guest is not supported by this version")
}
