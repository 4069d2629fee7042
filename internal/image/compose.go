package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/image/erofs"
	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// composeRules is part of what composed images are remembered by; it changes when the same parts give another image.
const composeRules = "1"

// note is a small thing that can be found out again: the image that parts make, or the blob that an image makes.
type note struct {
	Image string `json:"image"`
}

func (s *Store) composedDir() string { return filepath.Join(s.cfg.Dir, "composed") }

// Compose makes the image of base with the layers on top, lowest first, or finds it: of the same parts there is one
// image. Without layers it is base itself. Whatever the layers do, the image has base's guest agent, host name, hosts and
// resolver files, and the directories that a sandbox needs; nothing else is added. report may be nil; Compose is
// otherwise as Build. Errors: ErrNotFound for a base or layer that is not in the store, ErrInvalid for layers that do not
// fit or break the limits, ErrExhausted for a full disk.
func (s *Store) Compose(ctx context.Context, base string, layers []string, report func(Progress)) (Image, error) {
	under, err := s.Get(ctx, base)
	if err != nil || len(layers) == 0 {
		return under, err
	}
	key := hashText(append([]string{"compose", composeRules, base}, layers...)...)
	if img, ok := s.composed(ctx, key); ok {
		s.claim(layers...)
		return img, nil
	}
	if report == nil {
		report = func(Progress) {}
	}
	f := s.join(ctx, "compose "+key, &report, func(ctx context.Context, f *flight) {
		f.image, f.err = s.compose(ctx, under, layers, f.report)
		if f.err == nil {
			f.err = s.noteImage(filepath.Join(s.composedDir(), key), f.image.Digest)
		}
		if f.err == nil {
			s.claim(layers...)
		}
	})
	select {
	case <-f.done:
		if f.err != nil {
			return Image{}, fmt.Errorf("compose image on %s: %w", base, f.err)
		}
		return f.image, nil
	case <-ctx.Done():
		s.leave("compose "+key, f, &report)
		return Image{}, fmt.Errorf("compose image on %s: %w", base, context.Cause(ctx))
	}
}

// composed finds the image of parts that were put together before.
func (s *Store) composed(ctx context.Context, key string) (Image, bool) {
	digest, err := readNote(filepath.Join(s.composedDir(), key))
	if err != nil {
		return Image{}, false
	}
	img, err := s.Get(ctx, digest)
	return img, err == nil
}

func readNote(path string) (string, error) {
	data, err := os.ReadFile(path) //nolint:gosec // a file of the store's own
	if err != nil {
		return "", err
	}
	var n note
	return n.Image, json.Unmarshal(data, &n)
}

func (s *Store) noteImage(path, digest string) error {
	data, err := json.Marshal(note{Image: digest})
	if err != nil {
		return err
	}
	return s.replace(path, data)
}

func (s *Store) compose(ctx context.Context, base Image, layers []string, report func(Progress)) (img Image, err error) {
	if len(layers) > maxLayers {
		return Image{}, sandbox.Invalidf("%d layers; at most %d are allowed", len(layers), maxLayers)
	}
	work, err := os.MkdirTemp(s.tempDir(), "compose-")
	if err != nil {
		return Image{}, full(err)
	}
	b := &build{store: s, report: report, work: work, image: Image{
		Source: base.Source, Resolved: base.Resolved, GuestDigest: base.GuestDigest, CreatedAt: time.Now().UTC(),
		Config: base.Config, Base: base.Digest, Layers: slices.Clone(layers),
	}}
	defer func() { err = errors.Join(err, b.close()) }()
	report(Progress{Step: "unpack", Message: fmt.Sprintf("%d layers on top of %s", len(layers), base.Digest)})
	if b.tree, err = b.openImage(ctx, base.Digest); err != nil {
		return Image{}, err
	}
	given := givenTo(b.tree)
	for i, layer := range layers {
		if err := b.stack(ctx, layer); err != nil {
			return Image{}, fmt.Errorf("layer %s: %w", layer, err)
		}
		report(Progress{Step: "unpack", Fraction: filledShare * float64(i+1) / float64(len(layers))})
	}
	b.reportXattrs()
	if err := given.restore(b.tree); err != nil {
		return Image{}, fmt.Errorf("fit out the image: %w", err)
	}
	if err := b.pack(ctx); err != nil {
		return Image{}, err
	}
	if img, err = b.publish(); err == nil {
		s.log.InfoContext(ctx, "image composed", slog.String("digest", img.Digest), slog.String("base", base.Digest),
			slog.Int("layers", len(layers)), slog.Int64("bytes", img.Bytes))
	}
	return img, err
}

// openImage reads an image of the store as a tree, whose contents stay in the image's file until the build is closed.
func (b *build) openImage(ctx context.Context, digest string) (*tree.Tree, error) {
	path, err := b.store.Path(digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path) //nolint:gosec // a file of the store's own
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", digest, err)
	}
	b.release = append(b.release, f)
	t, err := erofs.Read(ctx, f, b.store.cfg.Limits)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", digest, err)
	}
	return t, nil
}

// stack puts a layer of the store on top of the tree.
func (b *build) stack(ctx context.Context, layer string) error {
	f, err := b.store.openLayer(layer)
	if err != nil {
		return err
	}
	b.release = append(b.release, f)
	return b.tree.ApplyFile(ctx, f)
}

// given is what each image has from the node, whatever its layers do.
type given map[string]*tree.Node

func givenTo(t *tree.Tree) given {
	g := given{}
	for _, name := range []string{GuestPath, "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"} {
		if n := t.LookupLink(name); n != nil && n.Type() == unix.S_IFREG {
			g[name] = n
		}
	}
	return g
}

// restore puts back what layers took away or replaced.
func (g given) restore(t *tree.Tree) error {
	f := finalizer{Tree: t, now: t.Newest()}
	if err := f.directories(); err != nil {
		return err
	}
	for name, n := range g {
		if t.LookupLink(name) == n {
			continue
		}
		if err := t.Place(name, n); err != nil {
			return err
		}
	}
	return nil
}

// freeNotes deletes what is remembered of images and layers that are gone.
func (s *Store) freeNotes(ctx context.Context) error {
	blobs, err := os.ReadDir(s.blobDir())
	if err != nil {
		return err
	}
	for _, e := range blobs {
		if _, err := s.Get(ctx, "sha256:"+e.Name()); err == nil || s.hasLayer("sha256:"+e.Name()) {
			continue
		}
		if err := s.removeFile(filepath.Join(s.blobDir(), e.Name())); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(s.composedDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.composedDir(), e.Name())
		if _, ok := s.composed(ctx, e.Name()); ok {
			continue
		}
		if err := s.removeFile(path); err != nil {
			return err
		}
	}
	return nil
}
