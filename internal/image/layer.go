package image

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// freshFor is how long a new layer stays in the store without anything that refers to it.
const freshFor = time.Hour

// Layer is what one build step changed, as an OCI layer (an uncompressed tar archive) in the store.
type Layer struct {
	// Digest of the archive, "sha256:" and 64 hex digits; empty where nothing changed.
	Digest string
	// Bytes is the archive's length; on disk, runs of zeros take no room.
	Bytes int64
}

func (s *Store) layerDir() string { return filepath.Join(s.cfg.Dir, "layers") }

// layerPath returns where the layer with that digest is kept.
func (s *Store) layerPath(digest string) (string, error) {
	hexed, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || !isHexDigest(hexed) {
		return "", sandbox.Invalidf("layer digest %.128q is not \"sha256:\" and 64 lower-case hex digits", digest)
	}
	return filepath.Join(s.layerDir(), hexed), nil
}

// openLayer opens a layer's archive, or returns ErrNotFound.
func (s *Store) openLayer(digest string) (*os.File, error) {
	path, err := s.layerPath(digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path) //nolint:gosec // a file of the store's own
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sandbox.NotFoundf("layer %s is not in the cache; build the template again", digest)
	}
	if err != nil {
		return nil, fmt.Errorf("open layer %s: %w", digest, err)
	}
	return f, nil
}

// hasLayer reports whether a layer is in the store.
func (s *Store) hasLayer(digest string) bool {
	path, err := s.layerPath(digest)
	if err != nil {
		return false
	}
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular()
}

// keepLayer moves a layer's flushed file into the store. Prune leaves it there for an hour, within which a step or
// an image has to refer to it.
func (s *Store) keepLayer(f *os.File, digest string) error {
	to, err := s.layerPath(digest)
	if err != nil {
		return err
	}
	s.keeping.Lock()
	defer s.keeping.Unlock()
	s.fresh[digest] = time.Now()
	if s.hasLayer(digest) {
		return nil
	}
	if err := os.Rename(f.Name(), to); err != nil {
		return err
	}
	return syncDir(s.layerDir())
}

// full gives a full disk its kind. The error below says which file could not be written.
func full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return sandbox.Exhaustedf("the disk is full: %v; free some room and try again", err)
	}
	return err
}

// hashText makes one digest of several texts, as hex digits.
func hashText(parts ...string) string {
	sum := sha256.New()
	for _, part := range parts {
		_, _ = fmt.Fprintf(sum, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(sum.Sum(nil))
}
