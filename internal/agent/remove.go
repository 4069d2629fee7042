package agent

import (
	"context"
	"fmt"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// RemoveTemplate forgets a template, and deletes its image unless another template has the same. Sandboxes that run from
// the image go on: they hold the file.
func (a *Agent) RemoveTemplate(ctx context.Context, req *agentv1.RemoveTemplateRequest) (*agentv1.RemoveTemplateResponse, error) {
	digest := req.GetImageDigest()
	if !digestForm.MatchString(digest) {
		return nil, toWireError(sandbox.Invalidf("image digest %.80q: want sha256: and 64 hex digits", digest))
	}
	if a.unmap(sandbox.TemplateID(req.GetTemplateId()), digest) {
		return &agentv1.RemoveTemplateResponse{}, nil
	}
	err := a.images.Remove(ctx, digest)
	if err == nil || isNotFound(err) {
		err = a.journal.RemoveImage(ctx, digest)
	}
	if err != nil {
		return nil, toWireError(fmt.Errorf("remove template %.80q: %w", req.GetTemplateId(), err))
	}
	a.poke()
	return &agentv1.RemoveTemplateResponse{}, nil
}

// unmap forgets that a template has an image, and reports whether another template has the same one. The pools of an
// image that nobody has are stale.
func (a *Agent) unmap(template sandbox.TemplateID, digest string) (shared bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for t, d := range a.templates {
		shared = shared || t != template && d == digest
	}
	if a.templates[template] == digest || !shared {
		a.templates[template] = "" // differs from every pool's
	}
	return shared
}

// templateBuilt notes which image a template has from now on.
func (a *Agent) templateBuilt(template sandbox.TemplateID, digest string) {
	a.mu.Lock()
	a.templates[template] = digest
	a.mu.Unlock()
	a.poke()
}
