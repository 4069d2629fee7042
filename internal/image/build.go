package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/cloister-dev/cloister/internal/image/erofs"
	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The share of a build that each part takes, for the fraction of its progress.
const (
	filledShare   = 0.85
	finalizeShare = 0.87
)

const (
	rootfsFile = "rootfs.erofs"
	recordFile = "image.json"
)

// build is one attempt to make an image from one source.
type build struct {
	store  *Store
	source Source
	req    Request
	report func(Progress)
	// work is a directory of this attempt's own.
	work  string
	spool *tree.Spool
	tree  *tree.Tree
	image Image
	// release are the files that contents are read from.
	release []io.Closer
}

func (s *Store) fromSources(ctx context.Context, sources []Source, req Request, report func(Progress)) (Image, error) {
	var failures []error
	for i, src := range sources {
		report(Progress{Step: "source", Message: "building from " + src.String()})
		img, err := s.fromSource(ctx, src, req, report)
		if err == nil {
			s.log.InfoContext(ctx, "image built", slog.String("digest", img.Digest), slog.String("source", img.Source),
				slog.Int64("bytes", img.Bytes))
			return img, nil
		}
		if ctx.Err() != nil {
			return Image{}, fmt.Errorf("build image: %w", context.Cause(ctx))
		}
		err = fmt.Errorf("%s: %w", src, err)
		failures = append(failures, err)
		if i+1 < len(sources) {
			report(Progress{Step: "source", Message: fmt.Sprintf("%v; trying %s next", err, sources[i+1])})
			s.log.WarnContext(ctx, "image source unusable", slog.String("source", src.String()), slog.Any("err", err))
		}
	}
	return Image{}, fmt.Errorf("build image: %w", full(errors.Join(failures...)))
}

func (s *Store) fromSource(ctx context.Context, src Source, req Request, report func(Progress)) (img Image, err error) {
	work, err := os.MkdirTemp(s.tempDir(), "build-")
	if err != nil {
		return Image{}, fmt.Errorf("make a build directory: %w", err)
	}
	b := &build{store: s, source: src, req: req, report: report, work: work, tree: tree.New(s.cfg.Limits)}
	defer func() { err = errors.Join(err, b.close()) }()
	if b.spool, err = tree.NewSpool(work); err != nil {
		return Image{}, err
	}
	b.image = Image{Source: src.String(), CreatedAt: time.Now().UTC()}
	if err := b.fill(ctx); err != nil {
		return Image{}, err
	}
	b.reportXattrs()
	report(Progress{Step: "finalize", Fraction: filledShare, Message: "adding the guest agent and its user"})
	if b.image.GuestDigest, err = s.finalize(b.tree, b.fitted()); err != nil {
		return Image{}, fmt.Errorf("fit out the image: %w", err)
	}
	if err := b.pack(ctx); err != nil {
		return Image{}, err
	}
	return b.publish()
}

// fitted reports whether the source is an image that was fitted out for sandboxes before Push wrote it.
func (b *build) fitted() bool { return b.image.Config.Labels[LabelRootFS] == rootFSRules }

// reportXattrs says that sandboxes will not see everything that the sources had.
func (b *build) reportXattrs() {
	if n := b.tree.DroppedXattrs(); n > 0 {
		b.report(Progress{Step: "unpack", Fraction: filledShare, Message: fmt.Sprintf(
			"left out %d extended attributes (file capabilities among them): sandboxes cannot read them", n)})
	}
}

// fill puts the source's files into the tree.
func (b *build) fill(ctx context.Context) error {
	switch b.source.Kind {
	case KindRegistry:
		return b.fromRegistry(ctx)
	case KindOCI:
		return b.fromLayout(ctx)
	case KindDockerArchive:
		return b.fromDockerArchive(ctx)
	case KindDir:
		return b.fromDir(ctx)
	case KindDebian:
		return b.fromDebian(ctx)
	default:
		return sandbox.Invalidf("unknown kind of image source %q", b.source.Kind)
	}
}

func (b *build) close() error {
	errs := make([]error, 0, len(b.release)+2)
	for _, c := range b.release {
		errs = append(errs, c.Close())
	}
	if b.spool != nil {
		errs = append(errs, b.spool.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(b.work))...)
}

func (b *build) fromDir(ctx context.Context) error {
	b.report(Progress{Step: "unpack", Message: "reading " + b.source.Ref})
	root, err := openRoot(b.source.Ref)
	if err != nil {
		return err
	}
	b.release = append(b.release, root)
	skipped, err := b.tree.AddDir(ctx, root)
	for _, dir := range skipped {
		b.report(Progress{Step: "unpack", Message: dir + " is on another file system and stays empty"})
	}
	return err
}

func openRoot(path string) (*os.Root, error) {
	root, err := os.OpenRoot(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, sandbox.NotFoundf("directory %s does not exist", path)
	case err != nil:
		return nil, fmt.Errorf("open directory: %w", err)
	}
	return root, nil
}

// pack writes the image file into the work directory and flushes it.
func (b *build) pack(ctx context.Context) error {
	b.report(Progress{Step: "pack", Fraction: finalizeShare, Message: "writing the EROFS image"})
	dir := filepath.Join(b.work, "image")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, rootfsFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444) //nolint:gosec // a file of the store's own that nobody writes again
	if err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	out := newImageWriter(f)
	b.image.Bytes, err = erofs.Write(ctx, out, b.tree.Root, func(done, total int64) {
		part := float64(done) / float64(total)
		b.report(Progress{Step: "pack", Fraction: finalizeShare + (0.99-finalizeShare)*part})
	})
	if err == nil {
		err = out.flush()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write the image: %w", full(err))
	}
	b.image.Digest = out.digest()
	return nil
}

// publish moves the finished image into the cache in one step. One that is there already is the same, and stays.
func (b *build) publish() (Image, error) {
	to, err := b.store.dirOf(b.image.Digest)
	if err != nil {
		return Image{}, err
	}
	if old, err := b.store.Get(context.Background(), b.image.Digest); err == nil {
		b.report(Progress{Step: "pack", Fraction: 1, Message: "image " + old.Digest + " was there already"})
		return old, nil
	}
	dir := filepath.Join(b.work, "image")
	record, err := json.MarshalIndent(b.image, "", "  ")
	if err != nil {
		return Image{}, fmt.Errorf("record image %s: %w", b.image.Digest, err)
	}
	if len(record) >= maxRecord {
		return Image{}, sandbox.Invalidf("the image's configuration has %d bytes; less than %d are allowed", len(record), maxRecord)
	}
	if err := writeSynced(filepath.Join(dir, recordFile), append(record, '\n')); err != nil {
		return Image{}, fmt.Errorf("record image %s: %w", b.image.Digest, full(err))
	}
	if err := moveSynced(dir, to); err != nil {
		return Image{}, fmt.Errorf("keep image %s: %w", b.image.Digest, err)
	}
	b.report(Progress{Step: "pack", Fraction: 1, Message: "image " + b.image.Digest})
	return b.image, nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) //nolint:gosec // a file of the store's own
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// moveSynced flushes the directory from, renames it to to, and flushes the rename.
func moveSynced(from, to string) error {
	if err := syncDir(from); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

func syncDir(path string) error {
	d, err := os.Open(path) //nolint:gosec // a directory of the store's own
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
