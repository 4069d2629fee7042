package image

import (
	"context"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// PushRequest says which image to push, and where to.
type PushRequest struct {
	// Digest of an image in the store.
	Digest string
	// Destination is a registry reference ("docker://" before it is optional), "oci:PATH" (a layout directory, or a tar of
	// one when PATH ends in ".tar") or "docker-archive:PATH".
	Destination string
	// Username and Password are for a registry; empty means the machine's own docker credentials.
	Username, Password string
	// RegistryOnly refuses destinations on the node's disk with ErrDenied.
	RegistryOnly bool
	Env          map[string]string
	User         string
	WorkDir      string
	StartCommand string
	ReadyCommand string
	Resources    sandbox.Resources
}

// Push writes an image and how to run it to a registry or a file.
func (s *Store) Push(_ context.Context, r PushRequest, _ func(Progress)) error {
	return sandbox.Unsupportedf("push %s: not yet", r.Digest)
}
