package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// partialAge is for how long the part of an image is kept that nobody goes on getting.
	partialAge = time.Hour
	// spareBytes is what an import leaves of the disk for everything else.
	spareBytes = 64 << 20
	// copyBytes is how much of an image is in memory while it is copied, flushBytes after how much of it the kernel is told
	// to begin writing it to the disk.
	copyBytes  = 1 << 20
	flushBytes = 8 << 20
	// MaxRecord is how long an image's record can be.
	MaxRecord = maxRecord
)

func (s *Store) partialDir() string { return filepath.Join(s.cfg.Dir, "partial") }

// ParseRecord reads what another store says of an image.
func ParseRecord(raw []byte) (Image, error) {
	var img Image
	if err := json.Unmarshal(raw, &img); err != nil {
		return Image{}, sandbox.Invalidf("parse an image's record: %v", err)
	}
	if hexed, ok := strings.CutPrefix(img.Digest, "sha256:"); !ok || !isHexDigest(hexed) {
		return Image{}, sandbox.Invalidf("an image's record names %.128q", img.Digest)
	}
	if img.Bytes <= 0 {
		return Image{}, sandbox.Invalidf("image %s has %d bytes: want more", img.Digest, img.Bytes)
	}
	return img, nil
}

// Open returns an image with its file, which stays readable when the image is removed.
func (s *Store) Open(ctx context.Context, digest string) (Image, *os.File, error) {
	img, err := s.Get(ctx, digest)
	if err != nil {
		return Image{}, nil, err
	}
	dir, err := s.dirOf(digest)
	if err != nil {
		return Image{}, nil, err
	}
	f, err := os.Open(filepath.Join(dir, rootfsFile)) //nolint:gosec // a file of the store's own
	if err != nil {
		return Image{}, nil, fmt.Errorf("open image %s: %w", digest, err)
	}
	return img, f, nil
}

// Import is an image that is being got from elsewhere. What it has stays when it breaks off, so that the next one of the
// same image goes on from there. It is for one goroutine.
type Import struct {
	store  *Store
	digest string
	dir    string
	file   *os.File
	sum    hash.Hash
	have   int64
	done   bool
}

// Import begins to get an image, or goes on: it reads what there is of it. Errors: ErrInvalid for an impossible digest,
// ErrConflict where somebody gets it.
func (s *Store) Import(ctx context.Context, digest string) (*Import, error) {
	if _, err := s.dirOf(digest); err != nil {
		return nil, err
	}
	hexed, _ := strings.CutPrefix(digest, "sha256:")
	s.mu.Lock()
	taken := s.importing[digest]
	s.importing[digest] = true
	s.mu.Unlock()
	if taken {
		return nil, sandbox.Conflictf("image %s is being got", digest)
	}
	im := &Import{store: s, digest: digest, dir: filepath.Join(s.partialDir(), hexed)}
	if err := im.open(ctx); err != nil {
		im.Close()
		return nil, fmt.Errorf("get image %s: %w", digest, noRoom(err))
	}
	return im, nil
}

func (im *Import) open(ctx context.Context) error {
	if err := os.MkdirAll(im.dir, 0o700); err != nil {
		return err
	}
	var err error
	im.file, err = os.OpenFile(filepath.Join(im.dir, rootfsFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	im.sum = sha256.New()
	im.have, err = io.Copy(im.sum, &cancelReader{ctx: ctx, r: im.file})
	return err
}

// Have returns how many bytes of the image's file are there.
func (im *Import) Have() int64 { return im.have }

// Receive reads the rest of the image's file, of which the record says how long it is, and returns how many bytes that
// moved. ErrUnavailable means that the stream broke off, or that the disk is full.
func (im *Import) Receive(ctx context.Context, record *Image, r io.Reader) (moved int64, err error) {
	if err := im.room(record); err != nil {
		return 0, err
	}
	buf := make([]byte, copyBytes)
	for flushed := im.have; im.have < record.Bytes; {
		if ctx.Err() != nil {
			return moved, fmt.Errorf("get image %s: %w", im.digest, context.Cause(ctx))
		}
		n, err := io.ReadFull(r, buf[:min(copyBytes, record.Bytes-im.have)])
		_, _ = im.sum.Write(buf[:n]) // never fails
		if _, werr := im.file.WriteAt(buf[:n], im.have); werr != nil {
			return moved, fmt.Errorf("get image %s: %w", im.digest, noRoom(werr))
		}
		im.have += int64(n)
		moved += int64(n)
		if err != nil {
			return moved, fmt.Errorf("get image %s: %w: the stream broke off: %w", im.digest, sandbox.ErrUnavailable, err)
		}
		if im.have-flushed >= flushBytes {
			// What it is worth is speed alone: the flush at the end has less to do.
			_ = unix.SyncFileRange(int(im.file.Fd()), flushed, im.have-flushed, unix.SYNC_FILE_RANGE_WRITE)
			flushed = im.have
		}
	}
	return moved, nil
}

// room refuses what cannot be the image, and what the disk cannot hold.
func (im *Import) room(record *Image) error {
	if record.Digest != im.digest {
		return sandbox.Invalidf("asked for image %s and got %s", im.digest, record.Digest)
	}
	if had := im.have; had > record.Bytes {
		im.have = 0
		im.sum.Reset()
		if err := im.file.Truncate(0); err != nil {
			return fmt.Errorf("get image %s: %w", im.digest, err)
		}
		return sandbox.Conflictf("image %s has %d bytes, and %d were there: they are forgotten", im.digest, record.Bytes, had)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(im.dir, &st); err != nil {
		return fmt.Errorf("get image %s: %w", im.digest, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < record.Bytes-im.have+spareBytes { //nolint:gosec // far below 2^63
		return fmt.Errorf("%w: the disk has %d MiB left: image %s needs %d MiB, and %d MiB are to stay free: %w", sandbox.ErrUnavailable,
			free>>20, im.digest, (record.Bytes-im.have)>>20, spareBytes>>20, unix.ENOSPC)
	}
	return nil
}

// Commit moves the image into the cache in one step, once it is what its digest says. ErrConflict means that it is not:
// nothing of it is left then, as after any error.
func (im *Import) Commit(record *Image) (Image, error) {
	img, err := im.commit(record)
	if derr := im.Discard(); err == nil {
		err = derr
	}
	if err != nil {
		return Image{}, fmt.Errorf("keep image %s: %w", im.digest, noRoom(err))
	}
	return img, nil
}

func (im *Import) commit(record *Image) (Image, error) {
	if got := "sha256:" + hex.EncodeToString(im.sum.Sum(nil)); got != im.digest {
		return Image{}, sandbox.Conflictf("what was got has digest %s", got)
	}
	to, err := im.store.dirOf(im.digest)
	if err != nil {
		return Image{}, err
	}
	img := *record
	img.Fetched = true
	raw, err := json.MarshalIndent(img, "", "  ")
	if err != nil {
		return Image{}, err
	}
	if len(raw) >= maxRecord {
		return Image{}, sandbox.Invalidf("its record has %d bytes: less than %d are allowed", len(raw), maxRecord)
	}
	if err := errors.Join(im.file.Sync(), im.file.Chmod(0o444)); err != nil {
		return Image{}, err
	}
	if err := writeSynced(filepath.Join(im.dir, recordFile), append(raw, '\n')); err != nil {
		return Image{}, err
	}
	if err := moveSynced(im.dir, to); err != nil {
		if old, gerr := im.store.Get(context.Background(), im.digest); gerr == nil {
			return old, nil // it was built meanwhile
		}
		return Image{}, err
	}
	return img, nil
}

// Close gives the import up and keeps what it has for the next; after Commit it does nothing.
func (im *Import) Close() {
	if im.done {
		return
	}
	im.done = true
	if im.file != nil {
		_ = im.file.Close() // its bytes are read before they are used again
	}
	im.store.mu.Lock()
	defer im.store.mu.Unlock()
	delete(im.store.importing, im.digest)
}

// Discard gives the import up and deletes what it has; after Commit it does nothing.
func (im *Import) Discard() error {
	if im.done {
		return nil
	}
	err := os.RemoveAll(im.dir)
	im.Close()
	if err != nil {
		return fmt.Errorf("forget a part of image %s: %w", im.digest, err)
	}
	return nil
}

// SweepPartial deletes the parts of images that nobody has gone on getting for an hour.
func (s *Store) SweepPartial(ctx context.Context) error {
	list, err := os.ReadDir(s.partialDir())
	if err != nil {
		return fmt.Errorf("sweep images: %w", err)
	}
	for _, e := range list {
		info, err := os.Stat(filepath.Join(s.partialDir(), e.Name(), rootfsFile))
		if err == nil && time.Since(info.ModTime()) < partialAge {
			continue
		}
		s.mu.Lock()
		busy := s.importing["sha256:"+e.Name()]
		s.mu.Unlock()
		if busy {
			continue
		}
		s.log.InfoContext(ctx, "part of an image deleted", slog.String("name", e.Name()))
		if err := s.discard(filepath.Join(s.partialDir(), e.Name())); err != nil {
			return fmt.Errorf("sweep images: %w", err)
		}
	}
	return nil
}

// noRoom gives a full disk its kind: for who waits for an image, another node may have room.
func noRoom(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: the disk is full: %w", sandbox.ErrUnavailable, err)
	}
	return err
}
