package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const maxRecord = 1 << 20

// dirOf returns where the image with that digest is kept.
func (s *Store) dirOf(digest string) (string, error) {
	hexed, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || !isHexDigest(hexed) {
		return "", sandbox.Invalidf("image digest %.128q is not \"sha256:\" and 64 lower-case hex digits", digest)
	}
	return filepath.Join(s.imageDir(), hexed), nil
}

func isHexDigest(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == sha256.Size && s == strings.ToLower(s)
}

// Get returns the image with that digest, or ErrNotFound.
func (s *Store) Get(_ context.Context, digest string) (Image, error) {
	dir, err := s.dirOf(digest)
	if err != nil {
		return Image{}, err
	}
	img, err := readRecord(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Image{}, sandbox.NotFoundf("image %s is not in the cache", digest)
	case err != nil:
		return Image{}, fmt.Errorf("read image %s: %w", digest, err)
	case img.Digest != digest:
		return Image{}, fmt.Errorf("read image %s: its record names %s", digest, img.Digest)
	}
	return img, nil
}

// readRecord reads a kept image's record and checks that its file is there in full length.
func readRecord(dir string) (Image, error) {
	f, err := os.Open(filepath.Join(dir, recordFile)) //nolint:gosec // a file of the store's own
	if err != nil {
		return Image{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err := errors.Join(err, f.Close()); err != nil {
		return Image{}, err
	}
	var img Image
	if err := json.Unmarshal(data, &img); err != nil {
		return Image{}, err
	}
	info, err := os.Lstat(filepath.Join(dir, rootfsFile))
	if err != nil {
		return Image{}, err
	}
	if !info.Mode().IsRegular() || info.Size() != img.Bytes {
		return Image{}, fmt.Errorf("%s has %d bytes and mode %s, its record says a file of %d", rootfsFile, info.Size(),
			info.Mode(), img.Bytes)
	}
	return img, nil
}

// Path returns the EROFS file of an image, or ErrNotFound. It is read-only and stays readable through an open file when
// the image is removed.
func (s *Store) Path(digest string) (string, error) {
	if _, err := s.Get(context.Background(), digest); err != nil {
		return "", err
	}
	dir, err := s.dirOf(digest)
	return filepath.Join(dir, rootfsFile), err
}

// List returns all images, in the order of their digests. Damaged ones are left out.
func (s *Store) List(ctx context.Context) ([]Image, error) {
	entries, err := os.ReadDir(s.imageDir())
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	images := make([]Image, 0, len(entries))
	for _, e := range entries {
		if img, err := s.Get(ctx, "sha256:"+e.Name()); err == nil {
			images = append(images, img)
		}
	}
	return images, nil
}

// Remove takes an image out of the cache. One that is not there is ErrNotFound.
func (s *Store) Remove(_ context.Context, digest string) error {
	dir, err := s.dirOf(digest)
	if err != nil {
		return err
	}
	err = s.discard(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return sandbox.NotFoundf("image %s is not in the cache", digest)
	}
	if err != nil {
		return fmt.Errorf("remove image %s: %w", digest, err)
	}
	return nil
}

// discard takes a path out of its place in one step and then deletes it.
func (s *Store) discard(path string) error {
	grave, err := os.MkdirTemp(s.tempDir(), "gone-")
	if err != nil {
		return err
	}
	err = os.Rename(path, filepath.Join(grave, filepath.Base(path)))
	return errors.Join(err, os.RemoveAll(grave))
}

// Verify reads an image's file in full and returns ErrConflict when it is not what its digest says.
func (s *Store) Verify(ctx context.Context, digest string) error {
	path, err := s.Path(digest)
	if err != nil {
		return err
	}
	f, err := os.Open(path) //nolint:gosec // a file of the store's own
	if err != nil {
		return fmt.Errorf("verify image %s: %w", digest, err)
	}
	sum := sha256.New()
	_, err = io.Copy(sum, &cancelReader{ctx: ctx, r: f})
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("verify image %s: %w", digest, err)
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != digest {
		return sandbox.Conflictf("image %s is damaged: its file hashes to %s; remove it and build it again", digest, got)
	}
	return nil
}

// Recover clears away what an earlier process left half-made, mounts of an interrupted bootstrap included, and takes
// images and cached steps out of it whose names or contents are wrong. Call it before the first Build.
func (s *Store) Recover(ctx context.Context) error {
	if err := unmountBelow(s.tempDir()); err != nil {
		return fmt.Errorf("recover image store: %w", err)
	}
	left, err := os.ReadDir(s.tempDir())
	if err != nil {
		return fmt.Errorf("recover image store: %w", err)
	}
	for _, e := range left {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("recover image store: %w", context.Cause(ctx))
		}
		if err := os.RemoveAll(filepath.Join(s.tempDir(), e.Name())); err != nil {
			return fmt.Errorf("recover image store: %w", err)
		}
		s.log.InfoContext(ctx, "half-made image removed", slog.String("name", e.Name()))
	}
	if err := s.clearNewTrees(); err != nil {
		return fmt.Errorf("recover image store: %w", err)
	}
	if err := s.checkImages(ctx); err != nil {
		return err
	}
	if _, err := s.steps(ctx); err != nil {
		return fmt.Errorf("recover image store: %w", err)
	}
	return s.SweepPartial(ctx)
}

func (s *Store) checkImages(ctx context.Context) error {
	entries, err := os.ReadDir(s.imageDir())
	if err != nil {
		return fmt.Errorf("recover image store: %w", err)
	}
	for _, e := range entries {
		_, damage := s.Get(ctx, "sha256:"+e.Name())
		if damage == nil {
			continue
		}
		s.log.WarnContext(ctx, "damaged image removed", slog.String("name", e.Name()), slog.Any("err", damage))
		if err := s.discard(filepath.Join(s.imageDir(), e.Name())); err != nil {
			return fmt.Errorf("recover image store: %w", err)
		}
	}
	return nil
}

// mountsBelow returns the mount points below dir from the text of /proc/self/mountinfo, the deepest first.
func mountsBelow(mountinfo, dir string) []string {
	var points []string
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		const pointField = 4
		if len(fields) <= pointField {
			continue
		}
		if point := unescapeMount(fields[pointField]); strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	// Of two mounts at one place the later one lies on top.
	slices.Reverse(points)
	slices.SortStableFunc(points, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	return points
}

// unescapeMount turns the octal escapes of mountinfo back.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// cancelReader stops reading when its context ends.
type cancelReader struct {
	ctx context.Context //nolint:containedctx // lives for one copy
	r   io.Reader
}

func (c *cancelReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
