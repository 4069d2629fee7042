package image

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"

	"github.com/cloister-dev/cloister/internal/image/erofs"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const packBuffer = 1 << 20

// blob is what is remembered of a layer that was packed: another push need not do it again to know its name.
type blob struct {
	// DiffID is the digest of the plain archive, and PlainSize its length in bytes.
	DiffID    string `json:"diff_id"`
	PlainSize int64  `json:"plain_size"`
	// Digest and Size are those of the archive packed with gzip.
	Digest string `json:"digest,omitempty"`
	Size   int64  `json:"size,omitempty"`
}

// pushLayer is a layer on its way out: an image's whole tree, or a layer of the store. It is a v1.Layer.
type pushLayer struct {
	push *pushing
	ctx  context.Context //nolint:containedctx // v1.Layer has no other way in, and a layer lives for one push
	// from is the digest of the image or layer, whose file is open.
	from  string
	file  *os.File
	image bool

	mu sync.Mutex
	// packed is known after pack or measure; path is where the packed archive is, if it is.
	packed blob
	path   string
}

func (s *Store) blobDir() string { return filepath.Join(s.cfg.Dir, "blobs") }

func (l *pushLayer) record() string {
	return filepath.Join(l.push.store.blobDir(), strings.TrimPrefix(l.from, "sha256:"))
}

// recall reads what is remembered.
func (l *pushLayer) recall() blob {
	var b blob
	data, err := os.ReadFile(l.record())
	if err != nil || json.Unmarshal(data, &b) != nil {
		return blob{}
	}
	return b
}

func (l *pushLayer) remember() error {
	data, err := json.Marshal(l.packed)
	if err != nil {
		return err
	}
	return l.push.store.replace(l.record(), data)
}

// write writes the plain archive.
func (l *pushLayer) write(w io.Writer) error {
	if !l.image {
		_, err := io.Copy(w, &cancelReader{ctx: l.ctx, r: io.NewSectionReader(l.file, 0, 1<<62)})
		return err
	}
	t, err := erofs.Read(l.ctx, l.file, l.push.store.cfg.Limits)
	if err != nil {
		return fmt.Errorf("image %s: %w", l.from, err)
	}
	return t.WriteTar(l.ctx, w)
}

// counter hashes and counts what goes through it.
type counter struct {
	sum hash.Hash
	n   int64
}

func newCounter() *counter { return &counter{sum: sha256.New()} }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.sum.Write(p)
}

func (c *counter) digest() string { return "sha256:" + hex.EncodeToString(c.sum.Sum(nil)) }

// measure finds out the digest and size of the plain archive.
func (l *pushLayer) measure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.packed = l.recall(); l.packed.DiffID != "" {
		return nil
	}
	if !l.image {
		info, err := l.file.Stat()
		if err == nil {
			l.packed = blob{DiffID: l.from, PlainSize: info.Size()}
		}
		return err
	}
	plain := newCounter()
	if err := l.write(plain); err != nil {
		return err
	}
	l.packed = blob{DiffID: plain.digest(), PlainSize: plain.n}
	return l.remember()
}

// pack makes sure that the layer's names are known; it packs the layer unless that was done before.
func (l *pushLayer) pack() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.packed = l.recall(); l.packed.Digest != "" {
		return nil
	}
	l.push.say("packing " + l.from)
	made, err := l.packNow()
	if err != nil {
		return err
	}
	l.packed = made
	return l.remember()
}

// packNow packs the layer into a file of the push's own.
func (l *pushLayer) packNow() (made blob, err error) {
	f, err := os.CreateTemp(l.push.work, "blob-")
	if err != nil {
		return blob{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	plain, packed := newCounter(), newCounter()
	z := gzip.NewWriter(io.MultiWriter(packed, f))
	even := bufio.NewWriterSize(io.MultiWriter(plain, z), packBuffer) // so that the same bytes are packed the same way
	if err := l.write(even); err != nil {
		return blob{}, err
	}
	if err := errors.Join(even.Flush(), z.Close()); err != nil {
		return blob{}, err
	}
	l.path = f.Name()
	return blob{DiffID: plain.digest(), PlainSize: plain.n, Digest: packed.digest(), Size: packed.n}, nil
}

// DiffID implements v1.Layer.
func (l *pushLayer) DiffID() (v1.Hash, error) { return v1.NewHash(l.packed.DiffID) }

// Digest implements v1.Layer.
func (l *pushLayer) Digest() (v1.Hash, error) { return v1.NewHash(l.packed.Digest) }

// Size implements v1.Layer.
func (l *pushLayer) Size() (int64, error) { return l.packed.Size, nil }

// MediaType implements v1.Layer.
func (l *pushLayer) MediaType() (types.MediaType, error) { return types.OCILayer, nil }

// Uncompressed implements v1.Layer. Nobody asks for it.
func (l *pushLayer) Uncompressed() (io.ReadCloser, error) {
	return nil, sandbox.Unsupportedf("layer %s is only read packed", l.from)
}

// Compressed implements v1.Layer. A layer whose names were remembered is packed here, when it turns out to be needed.
func (l *pushLayer) Compressed() (io.ReadCloser, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.path == "" {
		l.push.say("packing " + l.from)
		made, err := l.packNow()
		if err != nil {
			return nil, err
		}
		if made != l.packed {
			// Another version of the program packs otherwise: the next push names it right.
			return nil, errors.Join(
				sandbox.Conflictf("layer %s was packed as %s before and is %s now; push again", l.from, l.packed.Digest, made.Digest),
				os.Remove(l.record()))
		}
	}
	f, err := os.Open(l.path)
	if err != nil {
		return nil, err
	}
	return &sentFile{File: f, sent: l.push.sent, ctx: l.ctx}, nil
}

// sentFile tells how far it was read.
type sentFile struct {
	*os.File
	sent func(int64)
	ctx  context.Context //nolint:containedctx // lives for one upload
}

// Read reads and counts. It hides the file's other ways of being read.
func (s *sentFile) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	n, err := s.File.Read(p)
	s.sent(int64(n))
	return n, err
}

// WriteTo keeps io.Copy from going past Read.
func (s *sentFile) WriteTo(w io.Writer) (int64, error) {
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{s}, make([]byte, packBuffer))
}
