package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// maxWindow bounds the memory that a zstd layer may ask for.
	maxWindow = 128 << 20
	// maxLayers is more than any image builder makes.
	maxLayers = 1000
)

// container is an image as a registry or an archive hands it over.
type container struct {
	config *v1.ConfigFile
	layers []layer
}

// layer is one layer's bytes, compressed or not.
type layer struct {
	size int64
	open func() (io.ReadCloser, error)
}

// unpack applies a container's layers to the tree and takes over what it says about running.
func (b *build) unpack(ctx context.Context, c *container) error {
	if err := c.check(); err != nil {
		return err
	}
	total := int64(1)
	for _, l := range c.layers {
		total += max(0, l.size)
	}
	done := int64(0)
	for i, l := range c.layers {
		b.report(Progress{
			Step: "unpack", Fraction: filledShare * float64(done) / float64(total),
			Message: fmt.Sprintf("layer %d of %d (%d KiB)", i+1, len(c.layers), l.size>>10),
		})
		counted := func(n int64) {
			b.report(Progress{Step: "unpack", Fraction: filledShare * min(1, float64(done+n)/float64(total))})
		}
		if err := b.applyLayer(ctx, l, c.config.RootFS.DiffIDs[i], counted); err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(c.layers), err)
		}
		done += max(0, l.size)
	}
	cfg := c.config.Config
	b.image.Config = RunConfig{
		Env: cfg.Env, User: cfg.User, WorkDir: cfg.WorkingDir, Entrypoint: cfg.Entrypoint, Cmd: cfg.Cmd, Labels: cfg.Labels,
	}
	return nil
}

// check refuses what cannot run here or does not hold together.
func (c *container) check() error {
	cfg := c.config
	switch {
	case cfg.OS != "" && cfg.OS != "linux":
		return sandbox.Invalidf("the image is for %s, not for linux", cfg.OS)
	case cfg.Architecture != "" && cfg.Architecture != runtime.GOARCH:
		return sandbox.Invalidf("the image is for %s; this machine is %s", cfg.Architecture, runtime.GOARCH)
	case len(c.layers) == 0 || len(c.layers) > maxLayers:
		return sandbox.Invalidf("the image has %d layers; 1 to %d are allowed", len(c.layers), maxLayers)
	case len(cfg.RootFS.DiffIDs) != len(c.layers):
		return sandbox.Invalidf("the image has %d layers, its configuration names %d", len(c.layers), len(cfg.RootFS.DiffIDs))
	}
	return nil
}

// applyLayer puts one layer onto the tree and checks that it is the one that the image's configuration names.
func (b *build) applyLayer(ctx context.Context, l layer, want v1.Hash, counted func(int64)) error {
	rc, err := l.open()
	if err != nil {
		return err
	}
	plain, closePlain, err := decompress(&countReader{ctx: ctx, r: rc, report: counted})
	if err != nil {
		return errors.Join(err, rc.Close())
	}
	sum := sha256.New()
	hashed := io.TeeReader(&capReader{r: plain, left: 2 * b.store.cfg.Limits.Bytes}, sum)
	err = b.tree.ApplyLayer(ctx, hashed, b.spool)
	if err == nil {
		_, err = io.Copy(io.Discard, hashed) // padding after the archive's end is part of the digest
	}
	closePlain()
	if err := errors.Join(err, rc.Close()); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); want.Algorithm != "sha256" || got != want.Hex {
		return sandbox.Invalidf("the layer's contents have digest sha256:%s, the image says %s", got, want)
	}
	return nil
}

// decompress looks at the first bytes to tell how a stream is compressed.
func decompress(r io.Reader) (plain io.Reader, closePlain func(), err error) {
	in := bufio.NewReaderSize(r, 256<<10)
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, nil, sandbox.Invalidf("the gzip stream is damaged: %v", err)
		}
		return z, func() { _ = z.Close() }, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, sandbox.Invalidf("the zstd stream is damaged: %v", err)
		}
		return z, z.Close, nil
	default:
		return in, func() {}, nil
	}
}

// countReader reports how far a stream was read, and stops when its context ends.
type countReader struct {
	ctx    context.Context //nolint:containedctx // lives for one stream
	r      io.Reader
	n      int64
	report func(int64)
}

func (c *countReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.report(c.n)
	return n, err
}

// capReader fails when a stream is longer than what is left.
type capReader struct {
	r    io.Reader
	left int64
}

func (c *capReader) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, sandbox.Invalidf("the layer unpacks to more than images may hold")
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}
