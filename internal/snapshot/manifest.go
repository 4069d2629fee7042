package snapshot

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	manifestFile   = "manifest.json"
	manifestFormat = 1
	// maxManifest bounds a manifest: its environment may have 1 MiB.
	maxManifest = 4 << 20
	maxIDBytes  = 64
)

// Manifest says what a checkpoint is.
type Manifest struct {
	// Format is the manifest's own; Commit sets it.
	Format int                    `json:"format"`
	ID     string                 `json:"id"`
	Kind   sandbox.CheckpointKind `json:"kind"`
	// ImageDigest is the image that the sandbox ran from; the checkpoint is of no use without it.
	ImageDigest string            `json:"image_digest"`
	Resources   sandbox.Resources `json:"resources"`
	// Bytes is what it occupies on the disk, less what it shares with files that are not checkpoints; MemoryBytes is the
	// part of it that is memory.
	Bytes       int64 `json:"bytes"`
	MemoryBytes int64 `json:"memory_bytes,omitempty"`
	// SandboxID is what was saved; empty for a build's.
	SandboxID sandbox.ID `json:"sandbox_id,omitempty"`
	// Secure means that the agent inside demands the access token of SandboxID.
	Secure bool                  `json:"secure,omitempty"`
	Guest  sandbox.GuestSettings `json:"guest,omitzero"`
	// Pause means that the sandbox is paused in it, or was to be: it belongs to that sandbox's record.
	Pause bool `json:"pause,omitempty"`
	// Replica means that it is kept for the case that the node is lost that the sandbox is paused on.
	Replica   bool      `json:"replica,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	// Origin is the checkpoint whose files these are, where they are shared with it; Commit sets it.
	Origin string `json:"origin,omitempty"`
	// Files has the size in bytes of each file of the engine; Commit sets it.
	Files map[string]int64 `json:"files"`
}

// CheckID refuses, as ErrInvalid, what cannot name a checkpoint: anything but 1 to 64 characters of a-z, 0-9 and '-'.
func CheckID(id string) error {
	plain := func(c rune) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' }
	if id == "" || len(id) > maxIDBytes || strings.ContainsFunc(id, func(c rune) bool { return !plain(c) }) {
		return sandbox.Invalidf("checkpoint id %.80q: want 1 to %d characters of a-z, 0-9 and '-'", id, maxIDBytes)
	}
	return nil
}

// parseManifest reads a manifest and checks it by itself.
func parseManifest(raw []byte) (Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return Manifest{}, sandbox.Invalidf("parse %s: %v", manifestFile, err)
	}
	if m.Format != manifestFormat {
		return Manifest{}, sandbox.Unsupportedf("%s has format %d: this version reads format %d", manifestFile, m.Format, manifestFormat)
	}
	if err := m.check(); err != nil {
		return Manifest{}, err
	}
	for name, size := range m.Files {
		if size < 0 || name != filepath.Base(name) || name == "." || name == ".." || name == "/" {
			return Manifest{}, sandbox.Invalidf("%s: file %.80q of %d bytes: want a plain name and a size", manifestFile, name, size)
		}
	}
	return m, nil
}

// check refuses what no checkpoint can be.
func (m *Manifest) check() error {
	if err := CheckID(m.ID); err != nil {
		return err
	}
	switch {
	case m.Kind != sandbox.CheckpointMemory && m.Kind != sandbox.CheckpointFiles:
		return sandbox.Invalidf("checkpoint %s: kind %.40q: want %q or %q", m.ID, m.Kind, sandbox.CheckpointMemory, sandbox.CheckpointFiles)
	case m.Bytes < 0:
		return sandbox.Invalidf("checkpoint %s: %d bytes: want 0 or more", m.ID, m.Bytes)
	}
	return nil
}
