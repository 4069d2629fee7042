package snapshot

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The names inside the store's directory.
const (
	stateDir   = "state"
	removeMark = "removed" // in a checkpoint that is to go once nobody holds it
	newPrefix  = ".new-"
	oldPrefix  = ".old-"
	dirMode    = 0o700
	fileMode   = 0o600
	blockSize  = 512 // of st_blocks, always
)

// Store is a directory of checkpoints.
type Store struct {
	dir string
	log *slog.Logger

	mu      sync.Mutex
	entries map[string]*entry
	busy    map[string]bool // ids that are being made or removed
	removed int             // numbers the names of what is being removed
}

// entry is one checkpoint. The Store's mutex guards it.
type entry struct {
	manifest Manifest
	holds    int
	doomed   bool // nobody gets it any more; the last who holds it removes it
}

// New returns the store of a directory, which it makes where it is missing. Recover reads what is in it.
func New(dir string, log *slog.Logger) (*Store, error) {
	if !filepath.IsAbs(dir) {
		return nil, sandbox.Invalidf("checkpoint directory %.80q: want an absolute path", dir)
	}
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return nil, fmt.Errorf("make checkpoint directory: %w", err)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Store{dir: dir, log: log, entries: map[string]*entry{}, busy: map[string]bool{}}, nil
}

// Staging is a checkpoint that is being made.
type Staging struct {
	store  *Store
	id     string
	prefix string // of its directory's name; empty means newPrefix
	origin string
	bytes  int64
	done   bool
}

// Begin starts a checkpoint. Errors: ErrInvalid for an impossible id, ErrConflict for one that is there.
func (s *Store) Begin(id string) (*Staging, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	if !s.claim(id) {
		return nil, sandbox.Conflictf("checkpoint %s exists", id)
	}
	st := &Staging{store: s, id: id}
	err := os.RemoveAll(st.path()) // what an attempt that failed could not remove
	if err == nil {
		err = os.Mkdir(st.path(), dirMode)
	}
	if err == nil {
		err = os.Mkdir(st.Dir(), dirMode)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("begin checkpoint %s: %w", id, explain(err)), st.Discard())
	}
	return st, nil
}

func (st *Staging) path() string {
	return filepath.Join(st.store.dir, cmp.Or(st.prefix, newPrefix)+st.id)
}

// claim makes an id the caller's in busy; false where it is taken.
func (s *Store) claim(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[id] != nil || s.busy[id] {
		return false
	}
	s.busy[id] = true
	return true
}

// Dir returns the empty directory that takes the engine's files.
func (st *Staging) Dir() string { return filepath.Join(st.path(), stateDir) }

// LinkFrom fills the staging with the files of a checkpoint that the caller holds, at no cost.
func (st *Staging) LinkFrom(h *Held) error {
	for name := range h.Manifest.Files {
		if err := os.Link(filepath.Join(h.Dir, name), filepath.Join(st.Dir(), name)); err != nil {
			return fmt.Errorf("copy checkpoint %s to %s: %w", h.Manifest.ID, st.id, explain(err))
		}
	}
	d, err := os.Open(st.Dir())
	if err != nil {
		return fmt.Errorf("copy checkpoint %s to %s: %w", h.Manifest.ID, st.id, err)
	}
	err = errors.Join(d.Sync(), d.Close())
	if err != nil {
		return fmt.Errorf("copy checkpoint %s to %s: %w", h.Manifest.ID, st.id, explain(err))
	}
	st.origin, st.bytes = cmp.Or(h.Manifest.Origin, h.Manifest.ID), h.Manifest.Bytes
	return nil
}

// Discard gives a checkpoint up that was not committed; after Commit it does nothing.
func (st *Staging) Discard() error {
	if st.done {
		return nil
	}
	st.done = true
	err := os.RemoveAll(st.path())
	st.store.free(st.id)
	if err != nil {
		return fmt.Errorf("discard checkpoint %s: %w", st.id, err)
	}
	return nil
}

// Commit makes a checkpoint count: when it returns without error, the checkpoint is there and stays there, whatever ends.
// The files in its directory must have been flushed. M's Bytes are kept where they are above zero, else counted. After an
// error the staging is discarded.
func (s *Store) Commit(st *Staging, m Manifest) (Manifest, error) {
	m.ID, m.Format, m.Origin = st.id, manifestFormat, st.origin
	if st.bytes > 0 {
		m.Bytes = st.bytes
	}
	err := st.complete(&m)
	if err == nil {
		err = os.Rename(st.path(), s.path(st.id))
	}
	if err != nil {
		return Manifest{}, errors.Join(fmt.Errorf("commit checkpoint %s: %w", st.id, explain(err)), st.Discard())
	}
	st.done = true
	s.mu.Lock()
	s.entries[m.ID] = &entry{manifest: m}
	delete(s.busy, m.ID)
	s.mu.Unlock()
	if err := syncDir(s.dir); err != nil {
		return Manifest{}, errors.Join(fmt.Errorf("commit checkpoint %s: %w", m.ID, explain(err)), s.Remove(m.ID))
	}
	return m, nil
}

// complete writes the manifest and flushes what the engine did not.
func (st *Staging) complete(m *Manifest) error {
	if m.CreatedAt.IsZero() {
		m.CreatedAt = time.Now().UTC().Round(0)
	}
	var bytes int64
	var err error
	if m.Files, bytes, err = measure(st.Dir()); err != nil {
		return err
	}
	if m.Bytes <= 0 {
		m.Bytes = bytes
	}
	if err := m.check(); err != nil {
		return err
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode %s: %w", manifestFile, err)
	}
	if err := writeFlushed(filepath.Join(st.path(), manifestFile), raw); err != nil {
		return err
	}
	return syncDir(st.path())
}

// measure returns the size of each file of a directory, and what they occupy on the disk together.
func measure(dir string) (files map[string]int64, bytes int64, err error) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, 0, err
	}
	files = make(map[string]int64, len(list))
	for _, e := range list {
		info, err := e.Info()
		if err != nil {
			return nil, 0, err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || !info.Mode().IsRegular() {
			return nil, 0, sandbox.Invalidf("%s is no regular file", filepath.Join(dir, e.Name()))
		}
		files[e.Name()] = info.Size()
		bytes += st.Blocks * blockSize
	}
	return files, bytes, nil
}

// Get returns the manifest of a checkpoint; share it, and never write to its maps. ErrNotFound where there is none.
func (s *Store) Get(id string) (Manifest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil || e.doomed {
		return Manifest{}, notFound(id)
	}
	return e.manifest, nil
}

// List returns all manifests, ordered by id.
func (s *Store) List() []Manifest {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Manifest, 0, len(s.entries))
	for _, e := range s.entries {
		if !e.doomed {
			out = append(out, e.manifest)
		}
	}
	slices.SortFunc(out, func(x, y Manifest) int { return cmp.Compare(x.ID, y.ID) })
	return out
}

// Bytes returns what all checkpoints occupy on the disk; files that several share count once.
func (s *Store) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	counted := map[string]bool{}
	sum := int64(0)
	for _, e := range s.entries {
		origin := cmp.Or(e.manifest.Origin, e.manifest.ID)
		if !counted[origin] {
			counted[origin] = true
			sum += e.manifest.Bytes
		}
	}
	return sum
}

// Held is a checkpoint that stays until it is released.
type Held struct {
	Manifest Manifest
	// Dir has the engine's files.
	Dir     string
	release func()
}

// Nothing returns what stands for no checkpoint: its Dir is empty.
func Nothing() *Held { return &Held{release: func() {}} }

// Release gives the checkpoint back; only the first call counts.
func (h *Held) Release() { h.release() }

// Hold returns a checkpoint and keeps it where it is until it is released. ErrNotFound where there is none.
func (s *Store) Hold(id string) (*Held, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil || e.doomed {
		return nil, notFound(id)
	}
	e.holds++
	return &Held{
		Manifest: e.manifest, Dir: filepath.Join(s.path(id), stateDir), release: sync.OnceFunc(func() { s.release(id, e) }),
	}, nil
}

func (s *Store) release(id string, e *entry) {
	s.mu.Lock()
	e.holds--
	last := e.doomed && e.holds == 0
	if last {
		delete(s.entries, id)
		s.busy[id] = true
	}
	s.mu.Unlock()
	if !last {
		return
	}
	if err := s.takeOut(id); err != nil {
		s.log.Warn("checkpoint not deleted", slog.String("checkpoint_id", id), slog.Any("err", err))
	}
}

// Remove deletes a checkpoint: it is out of its place when Remove returns, or as soon as nobody holds it. In that case
// nobody gets it any more, and the next Recover deletes it at the latest. Removing what is not there is no error.
func (s *Store) Remove(id string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	s.mu.Lock()
	e := s.entries[id]
	if e == nil || e.doomed {
		s.mu.Unlock()
		return nil
	}
	held := e.holds > 0
	e.doomed = true
	if !held {
		delete(s.entries, id)
		s.busy[id] = true
	}
	s.mu.Unlock()
	if !held {
		return s.takeOut(id)
	}
	err := writeFlushed(filepath.Join(s.path(id), removeMark), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the last who held it was faster
	}
	if err == nil {
		err = syncDir(s.path(id))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mark checkpoint %s as removed: %w", id, err)
	}
	return nil
}

// takeOut moves a checkpoint out of its place, and deletes it there.
//
// Preconditions: the id is the caller's in busy, and is free afterwards.
func (s *Store) takeOut(id string) error {
	s.mu.Lock()
	s.removed++
	old := filepath.Join(s.dir, oldPrefix+id+"."+strconv.Itoa(s.removed))
	s.mu.Unlock()
	err := os.Rename(s.path(id), old)
	s.free(id)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove checkpoint %s: %w", id, err)
	}
	if err := errors.Join(syncDir(s.dir), os.RemoveAll(old)); err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", id, err)
	}
	return nil
}

// Recover reads what an earlier process left: whole checkpoints count, what was being got is kept as Sweep says, the rest
// is deleted. It must be called once, before
// anything else.
func (s *Store) Recover(ctx context.Context) error {
	list, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("read checkpoints: %w", err)
	}
	for _, e := range list {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("read checkpoints: %w", err)
		}
		if err := s.recoverOne(ctx, e.Name()); err != nil {
			return err
		}
	}
	return s.Sweep(ctx)
}

func (s *Store) recoverOne(ctx context.Context, name string) error {
	path := filepath.Join(s.dir, name)
	m, err := s.read(name)
	if err == nil {
		s.mu.Lock()
		s.entries[name] = &entry{manifest: m}
		s.mu.Unlock()
		return nil
	}
	ours := CheckID(name) == nil
	switch {
	case !ours && !strings.HasPrefix(name, newPrefix) && !strings.HasPrefix(name, oldPrefix):
		return nil // somebody else's, or a part that Sweep sees to
	case !ours || errors.Is(err, errRemoved):
	case errors.Is(err, sandbox.ErrInvalid) || errors.Is(err, fs.ErrNotExist):
		s.log.WarnContext(ctx, "damaged checkpoint deleted", slog.String("checkpoint_id", name), slog.Any("err", err))
	default:
		s.log.ErrorContext(ctx, "checkpoint cannot be read and is left alone", slog.String("checkpoint_id", name), slog.Any("err", err))
		return nil
	}
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("delete remains %s: %w", path, err)
	}
	return nil
}

var errRemoved = errors.New("it was removed")

// read returns the manifest of a directory, if it is a whole checkpoint.
func (s *Store) read(name string) (Manifest, error) {
	if err := CheckID(name); err != nil {
		return Manifest{}, err
	}
	path := s.path(name)
	if _, err := os.Lstat(filepath.Join(path, removeMark)); err == nil {
		return Manifest{}, errRemoved
	}
	info, err := os.Stat(filepath.Join(path, manifestFile))
	if err != nil {
		return Manifest{}, err
	}
	if info.Size() > maxManifest {
		return Manifest{}, sandbox.Invalidf("%s has %d bytes: want at most %d", manifestFile, info.Size(), maxManifest)
	}
	raw, err := os.ReadFile(filepath.Join(path, manifestFile)) //nolint:gosec // below our own directory
	if err != nil {
		return Manifest{}, err
	}
	m, err := parseManifest(raw)
	if err != nil {
		return Manifest{}, err
	}
	if m.ID != name {
		return Manifest{}, sandbox.Invalidf("%s names checkpoint %s", manifestFile, m.ID)
	}
	for file, size := range m.Files {
		st, err := os.Lstat(filepath.Join(path, stateDir, file))
		switch {
		case err != nil:
			return Manifest{}, err
		case !st.Mode().IsRegular() || st.Size() != size:
			return Manifest{}, sandbox.Invalidf("%s has %d bytes, and had %d when it was saved", file, st.Size(), size)
		}
	}
	return m, nil
}

func (s *Store) path(id string) string { return filepath.Join(s.dir, id) }

func (s *Store) free(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, id)
}

func notFound(id string) error { return sandbox.NotFoundf("checkpoint %.80q is not on this node", id) }

// explain gives a full disk its kind.
func explain(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: the disk is full: %w", sandbox.ErrUnavailable, err)
	}
	return err
}

// writeFlushed writes a new file, on the disk when it returns.
func writeFlushed(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fileMode) //nolint:gosec // below our own directory
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path) //nolint:gosec // our own directory
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
