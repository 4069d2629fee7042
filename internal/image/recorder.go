package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/cloister-dev/cloister/internal/image/delta"
	"github.com/cloister-dev/cloister/internal/image/tree"
)

// Recorder turns the archives that one build sandbox gives after its steps into one layer a step. What the node itself
// writes into each sandbox (/run/e2b, /etc/hostname, /etc/hosts, /etc/resolv.conf, all in /proc, /sys and /dev) is left
// out, and so is the time of a directory in which nothing else is other than before. It is used by one goroutine at a time.
type Recorder struct {
	store *Store
	last  *delta.Archive
	// files are the layers so far: they hold the contents that later layers may need again.
	files []*os.File
}

// NewRecorder returns a Recorder for one sandbox, which has changed nothing so far.
func (s *Store) NewRecorder() *Recorder { return &Recorder{store: s, last: delta.Empty()} }

// Add takes the archive of all changes since the sandbox started, and keeps what differs from the archive before as a
// layer. It returns Layer{} when nothing does. The same differences give the same layer. Errors: ErrInvalid for an archive
// that is none, or that breaks the store's limits; ErrExhausted for a full disk. After an error the recorder is as before.
func (r *Recorder) Add(ctx context.Context, archive io.Reader) (layer Layer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("record a layer: %w", full(err))
		}
	}()
	work, err := os.MkdirTemp(r.store.tempDir(), "layer-")
	if err != nil {
		return Layer{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	spool, err := tree.NewSpool(work)
	if err != nil {
		return Layer{}, err
	}
	defer func() { err = errors.Join(err, spool.Close()) }()
	next, err := delta.Read(ctx, archive, r.last, r.store.cfg.Limits, spool)
	if err != nil {
		return Layer{}, err
	}
	f, err := os.OpenFile(filepath.Join(work, "layer"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400) //nolint:gosec // a file of the store's own
	if err != nil {
		return Layer{}, err
	}
	layer, err = r.write(ctx, f, next)
	if err != nil || layer == (Layer{}) {
		return Layer{}, errors.Join(err, f.Close())
	}
	r.files = append(r.files, f)
	r.last = next
	return layer, nil
}

// write writes what is new in next to f and moves it into the store.
func (r *Recorder) write(ctx context.Context, f *os.File, next *delta.Archive) (Layer, error) {
	out := newImageWriter(f)
	entries, err := next.Write(ctx, out, r.last, func(off, size int64) tree.Content {
		return tree.Extent{File: f, Off: off, Bytes: size}
	})
	if err != nil || entries == 0 {
		return Layer{}, err
	}
	if err := out.flush(); err != nil {
		return Layer{}, err
	}
	layer := Layer{Digest: out.digest(), Bytes: out.at}
	return layer, r.store.keepLayer(f, layer.Digest)
}

// Close frees what the recorder holds. The layers stay.
func (r *Recorder) Close() error {
	errs := make([]error, 0, len(r.files))
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	r.files = nil
	return errors.Join(errs...)
}
