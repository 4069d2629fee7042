package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// flight is one running build and those who wait for it.
type flight struct {
	cancel context.CancelFunc
	done   chan struct{}
	// image and err are set before done is closed.
	image Image
	err   error

	mu sync.Mutex
	// callers are the progress functions of those who wait; guarded by mu, as is last.
	callers map[*func(Progress)]struct{}
	last    Progress
}

// Build makes an image from the first of the request's sources that works, or returns the equal one that is in the cache
// already. progress may be nil; it is called from one goroutine at a time and must not block. When ctx ends, so does the
// build, unless others wait for it too; everything half-made is gone when Build returns. Errors: ErrInvalid for a request
// or image that is wrong, else what the last source said.
func (s *Store) Build(ctx context.Context, req Request, progress func(Progress)) (Image, error) {
	sources, err := parseSources(req.Sources)
	if err != nil {
		return Image{}, err
	}
	if req.RegistryOnly {
		for _, src := range sources {
			if src.Kind != KindRegistry {
				return Image{}, sandbox.Deniedf("image source %q is on the node itself, which is not allowed here; for a registry's image "+
					"of that name say \"docker://\" before it", src)
			}
		}
	}
	if progress == nil {
		progress = func(Progress) {}
	}
	key, err := req.key()
	if err != nil {
		return Image{}, err
	}
	f := s.join(ctx, key, &progress, func(ctx context.Context, f *flight) {
		f.image, f.err = s.fromSources(ctx, sources, req, f.report)
	})
	select {
	case <-f.done:
		return f.image, f.err
	case <-ctx.Done():
		s.leave(key, f, &progress)
		return Image{}, fmt.Errorf("build image: %w", context.Cause(ctx))
	}
}

// key tells equal requests from different ones without keeping the password.
func (r Request) key() (string, error) {
	data, err := json.Marshal(r) //nolint:gosec // only hashed, below
	if err != nil {
		return "", fmt.Errorf("build image: %w", err)
	}
	sum := sha256.Sum256(data)
	return string(sum[:]), nil
}

// join enters the flight of that key, and starts it where there is none.
func (s *Store) join(ctx context.Context, key string, progress *func(Progress), work func(context.Context, *flight)) *flight {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[key]; f != nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.callers[progress] = struct{}{}
		return f
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := &flight{cancel: cancel, done: make(chan struct{}), callers: map[*func(Progress)]struct{}{progress: {}}}
	s.flights[key] = f
	go func() {
		defer cancel()
		work(run, f)
		s.forget(key, f)
		close(f.done)
	}()
	return f
}

func (s *Store) forget(key string, f *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flights[key] == f {
		delete(s.flights, key)
	}
}

// leave takes one caller out of a flight; the last one ends it and waits until it has cleaned up.
func (s *Store) leave(key string, f *flight, progress *func(Progress)) {
	s.mu.Lock()
	f.mu.Lock()
	delete(f.callers, progress)
	last := len(f.callers) == 0
	f.mu.Unlock()
	if last && s.flights[key] == f {
		delete(s.flights, key) // a new caller starts anew instead of joining what is being cancelled
	}
	s.mu.Unlock()
	if last {
		f.cancel()
		<-f.done
	}
}

// report tells all callers, leaving out what is too small to see.
func (f *flight) report(p Progress) {
	f.mu.Lock()
	defer f.mu.Unlock()
	const visible = 0.002
	if p.Message == "" && p.Step == f.last.Step && p.Fraction-f.last.Fraction < visible && p.Fraction < 1 {
		return
	}
	f.last = p
	for progress := range f.callers {
		(*progress)(p)
	}
}
