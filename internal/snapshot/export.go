package snapshot

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxParcel bounds what comes along with a checkpoint.
	maxParcel = 4 << 20
	// MaxHead is how long an encoded Head can be.
	MaxHead = maxManifest + 2*maxParcel
)

// Head is what is sent of a checkpoint before its files.
type Head struct {
	Manifest Manifest `json:"manifest"`
	// Parcel is what the sandbox needs besides the files; the store keeps it and knows nothing of it.
	Parcel []byte `json:"parcel,omitempty"`
}

// ParseHead reads what another node says of a checkpoint. Errors: ErrInvalid, ErrUnsupported.
func ParseHead(raw []byte) (*Head, error) {
	var parts struct {
		Manifest json.RawMessage `json:"manifest"`
		Parcel   []byte          `json:"parcel"`
	}
	if err := json.Unmarshal(raw, &parts); err != nil {
		return nil, sandbox.Invalidf("parse the head of a checkpoint: %v", err)
	}
	if n := len(parts.Parcel); n > maxParcel {
		return nil, sandbox.Invalidf("%d bytes come along with a checkpoint: want at most %d", n, maxParcel)
	}
	m, err := parseManifest(parts.Manifest)
	if err != nil {
		return nil, err
	}
	if n := len(m.Files); n > maxFiles {
		return nil, sandbox.Invalidf("checkpoint %s has %d files: want at most %d", m.ID, n, maxFiles)
	}
	return &Head{Manifest: m, Parcel: parts.Parcel}, nil
}

// maxFiles is many times what an engine writes.
const maxFiles = 1024

// Names returns the names of the engine's files in the order in which they travel.
func (m *Manifest) Names() []string { return slices.Sorted(maps.Keys(m.Files)) }

// Send writes the frames of one of the checkpoint's files, which Import.Receive reads, from an offset on that Import.Next
// named. What is before it is read all the same, for the checksum. Errors: ErrNotFound, ErrInvalid for an offset that
// cannot be.
func (h *Held) Send(ctx context.Context, w io.Writer, name string, from int64) error {
	size, ok := h.Manifest.Files[name]
	if !ok {
		return sandbox.NotFoundf("checkpoint %s has no file %.80q", h.Manifest.ID, name)
	}
	if from < 0 || from > size || from%chunkBytes != 0 {
		return sandbox.Invalidf("file %s of checkpoint %s from %d on: want a multiple of %d up to %d", name, h.Manifest.ID, from, chunkBytes, size)
	}
	f, err := os.Open(filepath.Join(h.Dir, name)) //nolint:gosec // a name of the manifest
	if err != nil {
		return fmt.Errorf("send checkpoint %s: %w", h.Manifest.ID, err)
	}
	defer func() { _ = f.Close() }() // only read
	if err := sendFile(ctx, w, f, size, from); err != nil {
		return fmt.Errorf("send %s of checkpoint %s: %w", name, h.Manifest.ID, err)
	}
	return nil
}

// Parcel returns what came along with a checkpoint. ErrNotFound where nothing did, or the checkpoint is not there.
func (s *Store) Parcel(id string) ([]byte, error) {
	h, err := s.Hold(id)
	if err != nil {
		return nil, err
	}
	defer h.Release()
	raw, err := os.ReadFile(filepath.Join(s.path(id), parcelFile))
	if os.IsNotExist(err) {
		return nil, sandbox.NotFoundf("nothing came along with checkpoint %s", id)
	}
	if err != nil {
		return nil, fmt.Errorf("read what came along with checkpoint %s: %w", id, err)
	}
	return raw, nil
}
