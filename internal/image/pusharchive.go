package image

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const layoutMark = `{"imageLayoutVersion":"1.0.0"}`

// member is a file of a layout or archive.
type member struct {
	name  string
	size  int64
	write func(io.Writer) error
}

func document(name string, data []byte) member {
	return member{name: name, size: int64(len(data)), write: func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	}}
}

// layoutMembers are the files of the image's layout. The index comes last: without it there is no image.
func (p *pushing) layoutMembers(img v1.Image) ([]member, error) {
	manifest, err := img.RawManifest()
	if err != nil {
		return nil, err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return nil, err
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, err
	}
	index, err := json.Marshal(v1.IndexManifest{
		SchemaVersion: 2, MediaType: types.OCIImageIndex,
		Manifests: []v1.Descriptor{{
			MediaType: types.OCIManifestSchema1, Size: int64(len(manifest)), Digest: digest,
			Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH},
		}},
	})
	if err != nil {
		return nil, err
	}
	all := []member{document("oci-layout", []byte(layoutMark))}
	for _, l := range p.layers {
		name := "blobs/sha256/" + strings.TrimPrefix(l.packed.Digest, "sha256:")
		all = append(all, member{name: name, size: l.packed.Size, write: l.writePacked})
	}
	for _, data := range [][]byte{config, manifest} {
		all = append(all, document("blobs/sha256/"+strings.TrimPrefix(digestOf(data), "sha256:"), data))
	}
	return append(all, document("index.json", index)), nil
}

// layout writes a layout directory, or what one lacks.
func (p *pushing) layout(img v1.Image) error {
	all, err := p.layoutMembers(img)
	if err != nil {
		return err
	}
	if err := checkLayoutDir(p.to.Ref); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(p.to.Ref, "blobs", "sha256"), 0o755); err != nil { //nolint:gosec // for others to read
		return err
	}
	for _, m := range all {
		at := filepath.Join(p.to.Ref, filepath.FromSlash(m.name))
		if info, err := os.Lstat(at); strings.HasPrefix(m.name, "blobs/") && err == nil && info.Size() == m.size {
			continue
		}
		err := replaceFile(at, func(f *os.File) error { return writeWhole(f, m) })
		if err != nil {
			return fmt.Errorf("write %s: %w", at, err)
		}
	}
	return nil
}

// checkLayoutDir refuses a directory that is something else.
func checkLayoutDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(dir, "oci-layout")); err != nil {
		return sandbox.Conflictf("%s has files, but is no OCI layout; give an empty or new directory", dir)
	}
	return nil
}

// writeWhole writes a member and checks that it has the size that was said.
func writeWhole(w io.Writer, m member) error {
	out := &countWriter{Writer: w}
	if err := m.write(out); err != nil {
		return err
	}
	if out.n != m.size {
		return fmt.Errorf("%s has %d bytes, not %d", m.name, out.n, m.size)
	}
	return nil
}

// replaceFile writes a file beside its place and moves it there when it is whole.
func replaceFile(path string, write func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".cloister-push-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// layoutTar writes a tar of a layout.
func (p *pushing) layoutTar(img v1.Image) error {
	all, err := p.layoutMembers(img)
	if err != nil {
		return err
	}
	return replaceFile(p.to.Ref, func(f *os.File) error { return writeMembers(f, all) })
}

func writeMembers(w io.Writer, all []member) error {
	tw := tar.NewWriter(w)
	for _, m := range all {
		hdr := &tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: m.name, Mode: 0o644, Size: m.size}
		if err := tw.WriteHeader(hdr); err != nil {
			return err
		}
		if err := writeWhole(tw, m); err != nil {
			return err
		}
	}
	return tw.Close()
}

// dockerArchive writes what docker load reads, with plain layers.
func (p *pushing) dockerArchive() error {
	config := v1.ConfigFile{RootFS: v1.RootFS{Type: "layers"}}
	p.describe(&config)
	entry := dockerManifest{}
	all := make([]member, 0, len(p.layers)+2)
	for _, l := range p.layers {
		if err := l.measure(); err != nil {
			return err
		}
		p.total += l.packed.PlainSize
		id, err := l.DiffID()
		if err != nil {
			return err
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, id)
		entry.Layers = append(entry.Layers, id.Hex+"/layer.tar")
		name := id.Hex + "/layer.tar"
		if slices.ContainsFunc(all, func(m member) bool { return m.name == name }) {
			continue
		}
		all = append(all, member{name: name, size: l.packed.PlainSize, write: l.writePlain})
	}
	data, err := json.Marshal(config)
	if err != nil {
		return err
	}
	entry.Config = strings.TrimPrefix(digestOf(data), "sha256:") + ".json"
	list, err := json.Marshal([]dockerManifest{entry})
	if err != nil {
		return err
	}
	all = append(all, document(entry.Config, data), document("manifest.json", list))
	return replaceFile(p.to.Ref, func(f *os.File) error { return writeMembers(f, all) })
}

// writePlain writes the plain archive.
func (l *pushLayer) writePlain(w io.Writer) error {
	return l.write(&countWriter{Writer: w, see: l.push.sent})
}

// writePacked writes the packed archive.
func (l *pushLayer) writePacked(w io.Writer) error {
	r, err := l.Compressed()
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, r.Close())
}

// countWriter counts what goes through it.
type countWriter struct {
	io.Writer
	n   int64
	see func(int64)
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.n += int64(n)
	if c.see != nil {
		c.see(int64(n))
	}
	return n, err
}
