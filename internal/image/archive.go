package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxDocument bounds manifests, indexes and configurations.
	maxDocument = 8 << 20
	// maxMembers bounds the index of an archive.
	maxMembers = 100_000
)

// members are the files of a layout or archive by their slash-separated names.
type members interface {
	open(name string) (io.ReadCloser, int64, error)
}

// openMembers opens a directory, or a tar file that may be compressed.
func (b *build) openMembers(ctx context.Context) (members, error) {
	info, err := os.Stat(b.source.Ref)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, sandbox.NotFoundf("%s does not exist", b.source.Ref)
	case err != nil:
		return nil, fmt.Errorf("open image archive: %w", err)
	case info.IsDir():
		root, err := openRoot(b.source.Ref)
		if err != nil {
			return nil, err
		}
		b.release = append(b.release, root)
		return dirMembers{root}, nil
	case !info.Mode().IsRegular():
		return nil, sandbox.Invalidf("%s is neither a file nor a directory", b.source.Ref)
	}
	f, err := b.openTar(ctx)
	if err != nil {
		return nil, err
	}
	b.release = append(b.release, f)
	return indexTar(ctx, f)
}

// openTar opens a tar file, which is unpacked first where it is compressed: its members are read in any order.
func (b *build) openTar(ctx context.Context) (*os.File, error) {
	f, err := os.Open(b.source.Ref)
	if err != nil {
		return nil, fmt.Errorf("open image archive: %w", err)
	}
	magic := make([]byte, 4)
	_, err = io.ReadFull(f, magic)
	if _, seekErr := f.Seek(0, io.SeekStart); seekErr != nil || err != nil {
		return nil, errors.Join(sandbox.Invalidf("%s is not an archive: %v", b.source.Ref, err), seekErr, f.Close())
	}
	if string(magic[:2]) != "\x1f\x8b" && string(magic) != "\x28\xb5\x2f\xfd" {
		return f, nil
	}
	b.report(Progress{Step: "unpack", Message: "decompressing " + b.source.Ref})
	plain, closePlain, err := decompress(&cancelReader{ctx: ctx, r: f})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	out, err := os.Create(filepath.Join(b.work, "archive.tar"))
	if err == nil {
		_, err = io.Copy(out, &capReader{r: plain, left: 2 * b.store.cfg.Limits.Bytes})
	}
	closePlain()
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("decompress image archive: %w", err)
	}
	return out, nil
}

// dirMembers are the files of a directory.
type dirMembers struct{ root *os.Root }

func (d dirMembers) open(name string) (io.ReadCloser, int64, error) {
	f, err := d.root.Open(filepath.FromSlash(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, sandbox.NotFoundf("%.256q is missing", name)
	}
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = sandbox.Invalidf("%.256q is not a file", name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// tarMembers are the files of a tar file, found where its index says.
type tarMembers struct {
	file  io.ReaderAt
	parts map[string]tarPart
}

// tarPart is where a member's bytes are, or the name of the member that it links to.
type tarPart struct {
	off, size int64
	link      string
}

func (t *tarMembers) open(name string) (io.ReadCloser, int64, error) {
	const maxHops = 8
	at := path.Clean(name)
	for range maxHops {
		part, ok := t.parts[at]
		if !ok {
			return nil, 0, sandbox.NotFoundf("%.256q is missing", name)
		}
		if part.link == "" {
			return io.NopCloser(io.NewSectionReader(t.file, part.off, part.size)), part.size, nil
		}
		at = part.link
	}
	return nil, 0, sandbox.Invalidf("%.256q is a link that leads nowhere", name)
}

// offsetReader knows how far it was read.
type offsetReader struct {
	io.ReadSeeker
	ctx context.Context //nolint:containedctx // lives for one scan
	at  int64
}

func (o *offsetReader) Read(p []byte) (int, error) {
	if o.ctx.Err() != nil {
		return 0, context.Cause(o.ctx)
	}
	n, err := o.ReadSeeker.Read(p)
	o.at += int64(n)
	return n, err
}

func (o *offsetReader) Seek(off int64, whence int) (int64, error) {
	at, err := o.ReadSeeker.Seek(off, whence)
	if err == nil {
		o.at = at
	}
	return at, err
}

// indexTar finds the members of a tar file.
func indexTar(ctx context.Context, f interface {
	io.ReadSeeker
	io.ReaderAt
},
) (*tarMembers, error) {
	t := &tarMembers{file: f, parts: map[string]tarPart{}}
	in := &offsetReader{ReadSeeker: f, ctx: ctx}
	if _, err := in.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read image archive: %w", err)
	}
	for tr := tar.NewReader(in); ; {
		hdr, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return t, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			return nil, sandbox.Invalidf("the archive is not a whole tar file: %v", err)
		case len(t.parts) >= maxMembers:
			return nil, sandbox.Invalidf("the archive has more than %d members", maxMembers)
		}
		at := path.Clean(hdr.Name)
		switch hdr.Typeflag {
		case tar.TypeReg:
			t.parts[at] = tarPart{off: in.at, size: hdr.Size}
		case tar.TypeSymlink:
			t.parts[at] = tarPart{link: path.Join(path.Dir(at), hdr.Linkname)} //nolint:gosec // a key of this map, no path of the machine
		case tar.TypeLink:
			t.parts[at] = tarPart{link: path.Clean(hdr.Linkname)}
		}
	}
}

// readDocument reads a small JSON member and decodes it.
func readDocument(m members, name string, to any) error {
	data, err := readSmall(m, name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, to); err != nil {
		return sandbox.Invalidf("%.256q is not what it should be: %v", name, err)
	}
	return nil
}

func readSmall(m members, name string) ([]byte, error) {
	r, size, err := m.open(name)
	if err != nil {
		return nil, err
	}
	if size > maxDocument {
		return nil, errors.Join(sandbox.Invalidf("%.256q has %d bytes; at most %d are allowed", name, size, maxDocument), r.Close())
	}
	data, err := io.ReadAll(io.LimitReader(r, maxDocument))
	return data, errors.Join(err, r.Close())
}

// dockerManifest is an entry of a docker archive's manifest.json.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (b *build) fromDockerArchive(ctx context.Context) error {
	m, err := b.openMembers(ctx)
	if err != nil {
		return err
	}
	c, err := readDockerArchive(m)
	if err != nil {
		return fmt.Errorf("docker archive: %w", err)
	}
	return b.unpack(ctx, c)
}

func readDockerArchive(m members) (*container, error) {
	var images []dockerManifest
	if err := readDocument(m, "manifest.json", &images); err != nil {
		return nil, err
	}
	if len(images) != 1 {
		var tags []string
		for _, img := range images {
			tags = append(tags, img.RepoTags...)
		}
		return nil, sandbox.Invalidf("the archive holds %d images (%.512s); save one alone", len(images), strings.Join(tags, ", "))
	}
	c := &container{config: &v1.ConfigFile{}}
	if err := readDocument(m, images[0].Config, c.config); err != nil {
		return nil, err
	}
	return c, c.addLayers(m, images[0].Layers)
}

// addLayers opens each layer once, so that what is missing is said before anything is unpacked.
func (c *container) addLayers(m members, names []string) error {
	if len(names) > maxLayers {
		return sandbox.Invalidf("the image has %d layers; at most %d are allowed", len(names), maxLayers)
	}
	for _, name := range names {
		r, size, err := m.open(name)
		if err != nil {
			return err
		}
		if err := r.Close(); err != nil {
			return err
		}
		c.layers = append(c.layers, layer{size: size, open: func() (io.ReadCloser, error) {
			r, _, err := m.open(name)
			return r, err
		}})
	}
	return nil
}
