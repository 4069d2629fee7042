package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	partialPrefix = ".partial-"
	partDir       = "part" // in a partial checkpoint: the file that is being received
	headFile      = "head.json"
	parcelFile    = "parcel"
	// partialAge is for how long the parts of a checkpoint are kept that nobody goes on getting.
	partialAge = time.Hour
	// spareBytes is what an import leaves of the disk for everything else.
	spareBytes = 64 << 20
)

// Import is a checkpoint that is being got from elsewhere. What it has stays when it breaks off, so that the next one of the
// same checkpoint goes on from there, whatever ended in between. It is for one goroutine.
type Import struct {
	store *Store
	id    string
	head  *Head // nil until Begin, or an earlier import's
	at    *part // the file that is next
	done  bool

	// Files that are whole are flushed in the background, each once.
	flushing sync.WaitGroup
	mu       sync.Mutex
	flushErr error
	flushed  map[string]bool // with those that are being flushed
}

// Position is where an import goes on.
type Position struct {
	// File is the name of the next file; empty where no head is known yet, which is the beginning.
	File string
	// Offset is how much of it is there. Frames is how many bytes that was on the way.
	Offset, Frames int64
}

// part is a file that is being received.
type part struct {
	receiver
	pos Position
}

// Import begins to get a checkpoint, or goes on. Errors: ErrInvalid for an impossible id, ErrConflict where it is there or
// somebody works on it.
func (s *Store) Import(id string) (*Import, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	if !s.claim(id) {
		return nil, sandbox.Conflictf("checkpoint %s exists", id)
	}
	im := &Import{store: s, id: id, flushed: map[string]bool{}}
	if err := im.open(); err != nil {
		s.free(id)
		return nil, fmt.Errorf("get checkpoint %s: %w", id, explain(err))
	}
	return im, nil
}

func (im *Import) path() string { return filepath.Join(im.store.dir, partialPrefix+im.id) }

// open makes the partial checkpoint, or reads what there is of it.
func (im *Import) open() error {
	for _, dir := range []string{im.path(), filepath.Join(im.path(), stateDir), filepath.Join(im.path(), partDir)} {
		if err := os.Mkdir(dir, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	raw, err := os.ReadFile(filepath.Join(im.path(), headFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	head, err := ParseHead(raw)
	if err != nil || head.Manifest.ID != im.id {
		return im.Reset() // torn
	}
	im.head = head
	return nil
}

// Begin says what the checkpoint consists of. ErrConflict means that what is there already is of something else: Reset
// forgets it. ErrUnavailable means that the disk has no room.
func (im *Import) Begin(head *Head) error {
	if head.Manifest.ID != im.id {
		return sandbox.Invalidf("asked for checkpoint %s and got %s", im.id, head.Manifest.ID)
	}
	if im.head != nil {
		if !maps.Equal(im.head.Manifest.Files, head.Manifest.Files) || !im.head.Manifest.CreatedAt.Equal(head.Manifest.CreatedAt) {
			return sandbox.Conflictf("checkpoint %s is another than the one that was got in part", im.id)
		}
		im.head = head
		return nil
	}
	if err := im.room(head); err != nil {
		return err
	}
	raw, err := json.Marshal(head)
	if err == nil {
		err = os.WriteFile(filepath.Join(im.path(), headFile), raw, fileMode)
	}
	if err != nil {
		return fmt.Errorf("get checkpoint %s: %w", im.id, explain(err))
	}
	im.head = head
	return nil
}

// room refuses what the disk cannot hold, before it is full.
func (im *Import) room(head *Head) error {
	var st unix.Statfs_t
	if err := unix.Statfs(im.path(), &st); err != nil {
		return fmt.Errorf("get checkpoint %s: %w", im.id, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < head.Manifest.Bytes+spareBytes { //nolint:gosec // far below 2^63
		return fmt.Errorf("%w: the disk has %d MiB left: checkpoint %s needs %d MiB, and %d MiB are to stay free: %w", sandbox.ErrUnavailable,
			free>>20, im.id, head.Manifest.Bytes>>20, spareBytes>>20, unix.ENOSPC)
	}
	return nil
}

// Head returns what the checkpoint consists of; nil before that is known.
func (im *Import) Head() *Head { return im.head }

// Next returns where the import goes on; more is false when every file is there.
func (im *Import) Next(ctx context.Context) (pos Position, more bool, err error) {
	if im.head == nil {
		return Position{}, true, nil
	}
	if im.at != nil {
		return im.at.pos, true, nil
	}
	for _, name := range im.head.Manifest.Names() {
		if im.has(name) {
			continue
		}
		if im.at, err = im.openPart(ctx, name); err != nil {
			return Position{}, false, fmt.Errorf("get %s of checkpoint %s: %w", name, im.id, explain(err))
		}
		return im.at.pos, true, nil
	}
	return Position{}, false, nil
}

// has reports whether a file is whole.
func (im *Import) has(name string) bool {
	im.mu.Lock()
	flushed := im.flushed[name]
	im.mu.Unlock()
	if flushed {
		return true
	}
	info, err := os.Lstat(filepath.Join(im.path(), stateDir, name))
	return err == nil && info.Mode().IsRegular() && info.Size() == im.head.Manifest.Files[name]
}

// openPart opens a file that is not whole, and reads what there is of it. What is behind the last whole chunk is forgotten.
func (im *Import) openPart(ctx context.Context, name string) (*part, error) {
	f, err := os.OpenFile(filepath.Join(im.path(), partDir, name), os.O_RDWR|os.O_CREATE, fileMode) //nolint:gosec // a plain name
	if err != nil {
		return nil, err
	}
	p := &part{receiver: receiver{f: f, size: im.head.Manifest.Files[name], sum: newSum()}, pos: Position{File: name}}
	info, err := f.Stat()
	if err == nil {
		p.pos.Offset = min(info.Size(), p.size)
		p.pos.Offset -= p.pos.Offset % chunkBytes
		err = f.Truncate(p.pos.Offset)
	}
	if err == nil {
		err = frames(ctx, f, p.pos.Offset, func(_ int64, frame []byte) error {
			_, _ = p.sum.Write(frame) // never fails
			p.pos.Frames += int64(len(frame))
			return nil
		})
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	p.next, p.begun = p.pos.Offset, p.pos.Offset
	return p, nil
}

// Receive reads the rest of the file that Next has named from what Held.Send writes, and returns how many bytes that moved.
// After ErrConflict, which is damage on the way or here, the file is got from its beginning.
func (im *Import) Receive(ctx context.Context, r io.Reader) (moved int64, err error) {
	p := im.at
	if p == nil {
		return 0, sandbox.Conflictf("checkpoint %s: no file is waited for", im.id)
	}
	im.at = nil
	err = p.receive(ctx, r)
	if err == nil {
		im.flush(p)
		return p.moved, im.failed()
	}
	if errors.Is(err, sandbox.ErrConflict) {
		err = errors.Join(err, p.f.Truncate(0))
	}
	return p.moved, fmt.Errorf("get %s of checkpoint %s: %w", p.pos.File, im.id, explain(errors.Join(err, p.f.Close())))
}

// flush puts a whole file onto the disk and in its place, while the next is got.
func (im *Import) flush(p *part) {
	name := p.pos.File
	im.mu.Lock()
	im.flushed[name] = true
	im.mu.Unlock()
	im.flushing.Go(func() {
		err := errors.Join(p.f.Sync(), p.f.Close())
		if err == nil {
			err = os.Rename(filepath.Join(im.path(), partDir, name), filepath.Join(im.path(), stateDir, name))
		}
		if err != nil {
			im.mu.Lock()
			defer im.mu.Unlock()
			im.flushErr = errors.Join(im.flushErr, fmt.Errorf("get %s of checkpoint %s: %w", name, im.id, explain(err)))
		}
	})
}

func (im *Import) failed() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.flushErr
}

// Commit makes the checkpoint count, with what came along, once every file is there. Change may alter its manifest. After
// an error nothing of it is left.
func (im *Import) Commit(change func(*Manifest)) (Manifest, error) {
	im.flushing.Wait()
	st := &Staging{store: im.store, id: im.id, prefix: partialPrefix}
	err := im.failed()
	if err == nil {
		err = im.tidy()
	}
	im.done = true
	if err != nil {
		return Manifest{}, errors.Join(fmt.Errorf("commit checkpoint %s: %w", im.id, explain(err)), st.Discard())
	}
	m := im.head.Manifest
	m.Bytes = 0 // nothing is shared any more
	if change != nil {
		change(&m)
	}
	return im.store.Commit(st, m)
}

// tidy leaves in the directory what a checkpoint has.
func (im *Import) tidy() error {
	files, _, err := measure(filepath.Join(im.path(), stateDir))
	if err != nil {
		return err
	}
	if !maps.Equal(files, im.head.Manifest.Files) {
		return sandbox.Conflictf("got the files %v: want %v", files, im.head.Manifest.Files)
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(im.path(), partDir)), os.Remove(filepath.Join(im.path(), headFile))); err != nil {
		return err
	}
	if len(im.head.Parcel) > 0 {
		if err := writeFlushed(filepath.Join(im.path(), parcelFile), im.head.Parcel); err != nil {
			return err
		}
	}
	return syncDir(filepath.Join(im.path(), stateDir))
}

// Reset forgets everything that was got.
func (im *Import) Reset() error {
	im.leave()
	im.head, im.flushed, im.flushErr = nil, map[string]bool{}, nil
	if err := os.RemoveAll(im.path()); err != nil {
		return fmt.Errorf("forget a part of checkpoint %s: %w", im.id, err)
	}
	return im.open()
}

// leave ends the work on a file.
func (im *Import) leave() {
	im.flushing.Wait()
	if im.at != nil {
		_ = im.at.f.Close() // its bytes are checked before they are used again
		im.at = nil
	}
}

// Close gives the import up and keeps what it has got for the next; after Commit it does nothing.
func (im *Import) Close() {
	if im.done {
		return
	}
	im.done = true
	im.leave()
	im.store.free(im.id)
}

// Discard gives the import up and deletes what it has got; after Commit it does nothing.
func (im *Import) Discard() error {
	if im.done {
		return nil
	}
	im.done = true
	im.leave()
	return (&Staging{store: im.store, id: im.id, prefix: partialPrefix}).Discard()
}

// Sweep deletes the parts of checkpoints that nobody has gone on getting for an hour.
func (s *Store) Sweep(ctx context.Context) error {
	list, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("sweep checkpoints: %w", err)
	}
	for _, e := range list {
		id, partial := strings.CutPrefix(e.Name(), partialPrefix)
		if !partial || time.Since(touched(filepath.Join(s.dir, e.Name()))) < partialAge || !s.claim(id) {
			continue
		}
		s.log.InfoContext(ctx, "part of a checkpoint deleted", slog.String("checkpoint_id", id))
		err := os.RemoveAll(filepath.Join(s.dir, e.Name()))
		s.free(id)
		if err != nil {
			return fmt.Errorf("sweep checkpoints: %w", err)
		}
	}
	return nil
}

// touched returns when anything of a directory was last written.
func touched(dir string) (last time.Time) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // what is gone is not new
		}
		if info, err := e.Info(); err == nil && info.ModTime().After(last) {
			last = info.ModTime()
		}
		return nil
	})
	return last
}
