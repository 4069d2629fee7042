package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	manifestFile     = "checkpoint.json"
	manifestFormat   = 1
	maxManifest      = 16 << 10
	engineName       = "gvisor"
	blockSize        = 512 // of st_blocks, always
	maxCheckpointSum = 1 << 46
)

// manifest says what a checkpoint is. It is written last: without it a directory is no checkpoint.
type manifest struct {
	Format   int               `json:"format"`
	Engine   string            `json:"engine"`
	Version  string            `json:"version"` // of gVisor, whose files only the same version reads
	Arch     string            `json:"arch"`
	Kind     engine.SaveKind   `json:"kind"`
	Limits   sandbox.Resources `json:"limits"`
	Hostname string            `json:"hostname"`
	// DiskBytes is what the guest had written to its root.
	DiskBytes int64 `json:"disk_bytes"`
	// Files are the others.
	Files map[string]savedFile `json:"files"`
}

// savedFile is what a file of a checkpoint must be.
type savedFile struct {
	Bytes int64 `json:"bytes"`
	// CRC32C is the checksum of the content, except of the guest's pages. These are most of a checkpoint, and damage to them
	// is the guest's alone; all else would reach the sentry's decoder, which panics.
	CRC32C uint32 `json:"crc32c"`
}

// kindFiles returns what gVisor writes for a kind.
func kindFiles(kind engine.SaveKind) []string {
	pages := []string{checkpointfiles.PagesMetadataFileName, checkpointfiles.PagesFileName}
	switch kind {
	case engine.SaveMemory:
		return append([]string{checkpointfiles.StateFileName}, pages...)
	case engine.SaveFiles, engine.SaveLayer:
		return append([]string{checkpointfiles.FSCheckpointManifestFileName, checkpointfiles.FSCheckpointMultiTarFileName}, pages...)
	}
	return nil
}

// sum returns the checksum of what a file of a checkpoint holds; 0 for the guest's pages.
func sum(f *os.File, name string) (uint32, error) {
	if name == checkpointfiles.PagesFileName {
		return 0, nil
	}
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	_, err := io.Copy(h, io.NewSectionReader(f, 0, maxCheckpointSum))
	return h.Sum32(), err
}

// verify reads a checkpoint's files, and compares them with its manifest. Errors: ErrInvalid for what is damaged.
func (m manifest) verify(dir string) error {
	for name, want := range m.Files {
		f, err := os.Open(filepath.Join(dir, name)) //nolint:gosec // kindFiles knows the name
		if err != nil {
			return fmt.Errorf("open checkpoint: %w", err)
		}
		got, err := sum(f, name)
		_ = f.Close() // opened for reading
		switch {
		case err != nil:
			return fmt.Errorf("read checkpoint %s: %w", dir, err)
		case got != want.CRC32C:
			return sandbox.Invalidf("checkpoint %s: %s is damaged: its CRC-32C is %08x, and was %08x when it was saved",
				dir, name, got, want.CRC32C)
		}
	}
	return nil
}

// writeManifest completes a checkpoint.
func writeManifest(dir string, m manifest) error {
	raw, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode %s: %w", manifestFile, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, manifestFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, fileMode) //nolint:gosec // the caller's directory
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// readManifest reads and checks what a directory holds. Errors: ErrInvalid for what is no whole checkpoint, ErrUnsupported
// for one that only another engine, version or architecture can read.
func readManifest(dir string) (manifest, error) {
	f, err := os.Open(filepath.Join(dir, manifestFile)) //nolint:gosec // the caller's directory
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return manifest{}, sandbox.Invalidf("checkpoint %s: it has no %s: it was never completed, or is no checkpoint", dir, manifestFile)
	}
	if err != nil {
		return manifest{}, fmt.Errorf("open checkpoint: %w", err)
	}
	defer func() { _ = f.Close() }() // opened for reading
	raw, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return manifest{}, fmt.Errorf("read checkpoint %s: %w", dir, err)
	}
	m, err := parseManifest(raw, moduleVersion())
	if err != nil {
		return manifest{}, fmt.Errorf("checkpoint %s: %w", dir, err)
	}
	for name, want := range m.Files {
		st, err := os.Lstat(filepath.Join(dir, name))
		switch {
		case errors.Is(err, os.ErrNotExist):
			return manifest{}, sandbox.Invalidf("checkpoint %s: %s is missing", dir, name)
		case err != nil:
			return manifest{}, fmt.Errorf("checkpoint %s: %w", dir, err)
		case !st.Mode().IsRegular() || st.Size() != want.Bytes:
			return manifest{}, sandbox.Invalidf("checkpoint %s: %s has %d bytes, and had %d when it was saved", dir, name, st.Size(), want.Bytes)
		}
	}
	return m, nil
}

// parseManifest checks a manifest by itself, for a gVisor of the given version.
func parseManifest(raw []byte, version string) (manifest, error) {
	var m manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return manifest{}, sandbox.Invalidf("parse %s: %v", manifestFile, err)
	}
	switch {
	case m.Engine != engineName:
		return manifest{}, sandbox.Unsupportedf("it was saved by engine %.40q: this one is %q", m.Engine, engineName)
	case m.Format != manifestFormat:
		return manifest{}, sandbox.Unsupportedf("it has format %d: this version reads format %d", m.Format, manifestFormat)
	case m.Arch != runtime.GOARCH:
		return manifest{}, sandbox.Unsupportedf("it was saved on %.40q: this machine is %q", m.Arch, runtime.GOARCH)
	case m.Version != version:
		return manifest{}, sandbox.Unsupportedf("it was saved by gVisor %.80s, which alone can read it: this version has gVisor %s",
			m.Version, version)
	case m.Kind != engine.SaveMemory && m.Kind != engine.SaveFiles:
		return manifest{}, sandbox.Invalidf("it is of kind %.40q: want %q or %q", m.Kind, engine.SaveMemory, engine.SaveFiles)
	}
	names := kindFiles(m.Kind)
	if len(m.Files) != len(names) {
		return manifest{}, sandbox.Invalidf("its %s names %d files: want %d", manifestFile, len(m.Files), len(names))
	}
	for _, name := range names {
		if f, ok := m.Files[name]; !ok || f.Bytes < 0 || f.Bytes > maxCheckpointSum {
			return manifest{}, sandbox.Invalidf("its %s says that %s has %d bytes", manifestFile, name, f.Bytes)
		}
	}
	return m, nil
}
