package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// garbage is an image that no template needs. Agent.mu guards it.
type garbage struct {
	retryAt time.Time
	tries   int
	busy    bool
}

// RemoveTemplate forgets that a template has an image. The image is deleted as soon as no other template, sandbox or
// checkpoint needs it.
func (a *Agent) RemoveTemplate(ctx context.Context, req *agentv1.RemoveTemplateRequest) (*agentv1.RemoveTemplateResponse, error) {
	template, digest := sandbox.TemplateID(req.GetTemplateId()), req.GetImageDigest()
	if !digestForm.MatchString(digest) {
		return nil, toWireError(sandbox.Invalidf("image digest %.80q: want sha256: and 64 hex digits", digest))
	}
	removed, err := a.journal.ReleaseImage(ctx, template, digest)
	if err != nil {
		return nil, toWireError(fmt.Errorf("remove template %.80q: %w", req.GetTemplateId(), err))
	}
	a.outdate(func(k poolKey, p *pool) bool { return k.digest == digest && (p.template == template || removed) })
	if !removed {
		return &agentv1.RemoveTemplateResponse{}, nil
	}
	a.mu.Lock()
	if a.garbage[digest] == nil {
		a.garbage[digest] = &garbage{}
	}
	a.mu.Unlock()
	if !a.imageUsed(digest) {
		a.freeImage(ctx, digest)
	}
	a.poke()
	return &agentv1.RemoveTemplateResponse{}, nil
}

// templateBuilt notes that a template has a new image: its earlier ones are asked for no more, or not before long.
func (a *Agent) templateBuilt(template sandbox.TemplateID, digest string) {
	a.mu.Lock()
	delete(a.garbage, digest)
	a.mu.Unlock()
	a.outdate(func(k poolKey, p *pool) bool { return p.template == template && k.digest != digest })
}

// imageUsed reports whether a sandbox, a checkpoint or a build needs an image.
func (a *Agent) imageUsed(digest string) bool {
	if a.builds.needs(digest) {
		return true
	}
	for _, m := range a.saves.List() {
		if m.ImageDigest == digest {
			return true
		}
	}
	for _, in := range a.instances() {
		if r := in.record(); r.ImageDigest == digest && !r.State.Ended() {
			return true
		}
	}
	return false
}

// freeImage deletes an image that nothing needs. What fails is tried again by the reconcile loop.
func (a *Agent) freeImage(ctx context.Context, digest string) {
	a.mu.Lock()
	g := a.garbage[digest]
	mine := g != nil && !g.busy
	if mine {
		g.busy = true
	}
	a.mu.Unlock()
	if !mine {
		return
	}
	err := a.images.Remove(ctx, digest)
	if err == nil || isNotFound(err) {
		err = a.journal.RemoveImage(ctx, digest)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		delete(a.garbage, digest)
		a.log.InfoContext(ctx, "image deleted", slog.String("image", digest))
		return
	}
	g.busy = false
	g.retryAt = now().Add(backoff(g.tries))
	g.tries++
	a.log.WarnContext(ctx, "image not deleted, trying again", slog.String("image", digest), slog.Time("at", g.retryAt), slog.Any("err", err))
}

// observeGarbage returns the images that no template needs.
func (a *Agent) observeGarbage() []GarbageState {
	a.mu.RLock()
	out := make([]GarbageState, 0, len(a.garbage))
	for digest, g := range a.garbage {
		out = append(out, GarbageState{Digest: digest, Used: g.busy, RetryAt: g.retryAt})
	}
	a.mu.RUnlock()
	for i := range out {
		out[i].Used = out[i].Used || a.imageUsed(out[i].Digest)
	}
	return out
}
