package agent

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
)

const (
	// baseFresh is for how long an image that was fetched for a build serves the next one from the same place.
	baseFresh = 24 * time.Hour
	maxBases  = 16
)

// fetched is a base image of an earlier build. It is held, so that it stays.
type fetched struct {
	digest string
	source string
	at     time.Time
}

// hold keeps an image or layer from being freed until drop was called as often.
func (b *builds) hold(digest string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held[digest]++
}

func (b *builds) drop(digest string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.held[digest]--; b.held[digest] <= 0 {
		delete(b.held, digest)
	}
}

// needs reports whether a build needs an image.
func (b *builds) needs(digest string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.held[digest] > 0
}

// inUse returns all that is held.
func (b *builds) inUse() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]string, 0, len(b.held))
	for digest := range b.held {
		out = append(out, digest)
	}
	return out
}

// base returns the image that the sources gave lately.
func (b *builds) base(key string) (fetched, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f, ok := b.bases[key]
	return f, ok && time.Since(f.at) < baseFresh
}

// setBase remembers which image the sources gave, and forgets the oldest others.
func (b *builds) setBase(key string, f fetched) {
	b.mu.Lock()
	defer b.mu.Unlock()
	drop := func(key string) {
		if old, ok := b.bases[key]; ok {
			delete(b.bases, key)
			if b.held[old.digest]--; b.held[old.digest] <= 0 {
				delete(b.held, old.digest)
			}
		}
	}
	b.held[f.digest]++
	drop(key)
	for len(b.bases) >= maxBases {
		oldest := ""
		for k, o := range b.bases {
			if oldest == "" || o.at.Before(b.bases[oldest].at) {
				oldest = k
			}
		}
		drop(oldest)
	}
	b.bases[key] = f
}

// baseKey names a request's image where that is the same for a while; "" where the source is a file that may change at any
// time. Who has other credentials may see other images.
func baseKey(r *image.Request) string {
	for _, text := range r.Sources {
		s, err := image.ParseSource(text)
		if err != nil || s.Kind != image.KindRegistry && s.Kind != image.KindDebian {
			return ""
		}
	}
	sum := sha256.Sum256([]byte(strings.Join(append(slices.Clone(r.Sources), r.Username, r.Password), "\x00")))
	return hex.EncodeToString(sum[:])
}

// fetchBase returns the image that the sources of a build with steps give. One that was fetched lately is used again.
func (a *Agent) fetchBase(ctx context.Context, bd *build, o *buildOrder) (image.Image, error) {
	key := baseKey(&o.image)
	if f, ok := a.builds.base(key); ok && key != "" && !o.force {
		if im, err := a.images.Get(ctx, f.digest); err == nil {
			bd.note(stepBase, fmt.Sprintf("CACHED base image %s, fetched at %s", f.source, f.at.UTC().Format(time.RFC3339)))
			return im, nil
		}
	}
	im, err := a.images.Build(ctx, o.image, bd.report)
	if err == nil && key != "" {
		a.builds.setBase(key, fetched{digest: im.Digest, source: cmp.Or(im.Source, o.image.Sources[0]), at: time.Now()})
	}
	return im, err
}

// keep holds an image that a build needs, until the order is released. Unless a template has it, it goes afterwards; should
// the process end before, the next one sees to that.
func (a *Agent) keep(ctx context.Context, o *buildOrder, im *image.Image) error {
	a.builds.hold(im.Digest)
	o.held = append(o.held, im.Digest)
	if im.Digest == o.base {
		return nil // it is somebody's
	}
	known, err := a.journal.Images(ctx)
	if err != nil || slices.ContainsFunc(known, func(k journal.Image) bool { return k.Digest == im.Digest }) {
		return err
	}
	if err := a.journal.PutImage(ctx, journal.Image{Digest: im.Digest, Bytes: im.Bytes, Source: im.Source, BuiltAt: now()}); err != nil {
		return err
	}
	removed, err := a.journal.ReleaseImage(ctx, "", im.Digest)
	if err != nil || !removed {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.garbage[im.Digest] == nil {
		a.garbage[im.Digest] = &garbage{}
	}
	return nil
}

// letGo releases all that a build has held, and frees layers that nothing needs any more.
func (a *Agent) letGo(ctx context.Context, o *buildOrder) {
	for _, digest := range o.held {
		a.builds.drop(digest)
	}
	o.held = nil
	if err := a.images.Prune(ctx, a.builds.inUse()); err != nil && ctx.Err() == nil {
		a.log.WarnContext(ctx, "layers of builds not freed", slog.Any("err", err))
	}
	a.poke()
}
