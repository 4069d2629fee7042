package snapshot

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open returns a recovered store of a directory.
func open(tb testing.TB, dir string) *Store {
	tb.Helper()
	s, err := New(dir, nil)
	if err != nil {
		tb.Fatal(err)
	}
	if err := s.Recover(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	return s
}

func manifest() Manifest {
	return Manifest{Kind: sandbox.CheckpointMemory, ImageDigest: "sha256:1", SandboxID: "abc", Guest: sandbox.GuestSettings{User: "user"}}
}

// add makes a checkpoint with one file.
func add(tb testing.TB, s *Store, id, content string) Manifest {
	tb.Helper()
	st, err := s.Begin(id)
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(st.Dir(), "pages.img"), []byte(content), fileMode); err != nil {
		tb.Fatal(err)
	}
	m, err := s.Commit(st, manifest())
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

// content returns what a checkpoint holds.
func content(s *Store, id string) string {
	h, err := s.Hold(id)
	if err != nil {
		return err.Error()
	}
	defer h.Release()
	raw, err := os.ReadFile(filepath.Join(h.Dir, "pages.img"))
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

func entries(tb testing.TB, dir string) []string {
	tb.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		tb.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func TestLife(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	s := open(t, dir)
	m := add(t, s, "one", "content")
	if m.ID != "one" || m.Files["pages.img"] != 7 || m.Bytes <= 0 || m.CreatedAt.IsZero() {
		t.Errorf("manifest: %+v", m)
	}
	if got := content(s, "one"); got != "content" {
		t.Errorf("it holds %q", got)
	}
	s = open(t, dir)
	got, err := s.Get("one")
	if diff := cmp.Diff(m, got); err != nil || diff != "" {
		t.Errorf("after a restart: %v\n%s", err, diff)
	}
	if err := s.Remove("one"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("one"); err != nil {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := s.Get("one"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("after its removal: %v", err)
	}
	if got := entries(t, dir); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
	add(t, s, "one", "again")
}

func TestBeginRefuses(t *testing.T) {
	s := open(t, t.TempDir())
	add(t, s, "there", "x")
	st, err := s.Begin("under-way")
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]error{
		"there": sandbox.ErrConflict, "under-way": sandbox.ErrConflict, "": sandbox.ErrInvalid, "../x": sandbox.ErrInvalid,
		".new-x": sandbox.ErrInvalid, "A": sandbox.ErrInvalid, strings.Repeat("a", 65): sandbox.ErrInvalid,
	} {
		if _, err := s.Begin(id); !errors.Is(err, want) {
			t.Errorf("begin %q: %v, want %v", id, err, want)
		}
	}
	if err := st.Discard(); err != nil {
		t.Fatal(err)
	}
	add(t, s, "under-way", "x")
	st, err = s.Begin("odd")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(st, Manifest{Kind: "odd"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("commit of an odd kind: %v", err)
	}
	add(t, s, "odd", "x")
}

func TestHeldOnesStay(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	add(t, s, "one", "content")
	h, err := s.Hold("one")
	if err != nil {
		t.Fatal(err)
	}
	h2, err := s.Hold("one")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("one"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Hold("one"); !errors.Is(err, sandbox.ErrNotFound) || len(s.List()) != 0 {
		t.Errorf("a removed one can be had: %v, %v", err, s.List())
	}
	if _, err := s.Begin("one"); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("made again while it is there: %v", err)
	}
	h.Release()
	h.Release()
	if raw, err := os.ReadFile(filepath.Join(h2.Dir, "pages.img")); err != nil || string(raw) != "content" {
		t.Errorf("while it is held: %q, %v", raw, err)
	}
	// Should the process end now, the next one deletes it.
	if got := open(t, dir).List(); len(got) != 0 {
		t.Errorf("after a restart: %v", got)
	}
	h2.Release()
	if got := entries(t, dir); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

func TestCopiesShareFiles(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	m := add(t, s, "one", "content")
	link := func(from, to string) Manifest {
		t.Helper()
		h, err := s.Hold(from)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Release()
		st, err := s.Begin(to)
		if err == nil {
			err = st.LinkFrom(h)
		}
		if err != nil {
			t.Fatal(err)
		}
		c, err := s.Commit(st, h.Manifest)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := link("one", "two"); c.ID != "two" || c.Origin != "one" || c.Bytes != m.Bytes {
		t.Errorf("copy: %+v", c)
	}
	if c := link("two", "three"); c.Origin != "one" {
		t.Errorf("copy of a copy: %+v", c)
	}
	if got := s.Bytes(); got != m.Bytes {
		t.Errorf("all occupy %d, one occupies %d", got, m.Bytes)
	}
	if err := s.Remove("one"); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	for _, id := range []string{"two", "three"} {
		if got := content(s, id); got != "content" {
			t.Errorf("%s holds %q", id, got)
		}
	}
	if got := s.Bytes(); got != m.Bytes {
		t.Errorf("the rest occupies %d", got)
	}
}

// TestRecover puts into the directory what a process can leave, and what no process leaves.
func TestRecover(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for _, id := range []string{"whole", "short", "missing", "no-manifest", "bad-manifest", "renamed", "link"} {
		add(t, s, id, "content")
	}
	if _, err := s.Begin("staged"); err != nil {
		t.Fatal(err)
	}
	path := func(name ...string) string { return filepath.Join(append([]string{dir}, name...)...) }
	for _, err := range []error{
		os.Truncate(path("short", stateDir, "pages.img"), 3),
		os.Remove(path("missing", stateDir, "pages.img")),
		os.Remove(path("no-manifest", manifestFile)),
		os.WriteFile(path("bad-manifest", manifestFile), []byte("{"), fileMode),
		os.Rename(path("renamed"), path("other-name")),
		os.Remove(path("link", stateDir, "pages.img")),
		os.Symlink("/etc/passwd", path("link", stateDir, "pages.img")),
		os.Mkdir(path(oldPrefix+"half.1"), dirMode),
		os.WriteFile(path("lost+found"), nil, fileMode),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, dir)
	if got := s.List(); len(got) != 1 || got[0].ID != "whole" {
		t.Errorf("found: %+v", got)
	}
	if got := strings.Join(entries(t, dir), " "); got != "lost+found whole" {
		t.Errorf("left: %s", got)
	}
}

func TestNewerFormatIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	add(t, s, "one", "content")
	path := filepath.Join(dir, "one", manifestFile)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(raw), `"format":1`, `"format":2`, 1)), fileMode); err != nil {
		t.Fatal(err)
	}
	if got := open(t, dir).List(); len(got) != 0 {
		t.Errorf("found: %v", got)
	}
	if got := entries(t, dir); !slices.Equal(got, []string{"one"}) {
		t.Errorf("left: %v", got)
	}
}

func TestManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	var wg sync.WaitGroup
	for c := range 8 {
		rng := rand.New(rand.NewPCG(1, uint64(c)))
		wg.Go(func() {
			for range 60 {
				id := fmt.Sprint("id-", rng.IntN(4))
				switch rng.IntN(3) {
				case 0:
					st, err := s.Begin(id)
					if err != nil {
						continue
					}
					if err := os.WriteFile(filepath.Join(st.Dir(), "pages.img"), []byte(id), fileMode); err != nil {
						t.Error(err)
					}
					if _, err := s.Commit(st, manifest()); err != nil {
						t.Error(err)
					}
				case 1:
					if got := content(s, id); got != id && !strings.Contains(got, "is not on this node") {
						t.Errorf("%s holds %q", id, got)
					}
				case 2:
					if err := s.Remove(id); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	var want []string
	for _, m := range s.List() {
		want = append(want, m.ID)
	}
	if got := entries(t, dir); !slices.Equal(got, want) {
		t.Errorf("in the directory: %v, known: %v", got, want)
	}
}

func TestReflinks(t *testing.T) {
	dir := t.TempDir()
	Reflinks(dir) // the answer is the machine's
	if got := entries(t, dir); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
	if Reflinks(filepath.Join(dir, "missing")) {
		t.Error("a missing directory has reflinks")
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"format":1,"id":"a","kind":"memory","files":{"pages.img":1},"bytes":1,"created_at":"2026-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"format":1,"id":"a","kind":"files","files":{"../x":1}}`))
	f.Add([]byte(`{"format":1,"id":"../a","kind":"files"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parseManifest(raw)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) && !errors.Is(err, sandbox.ErrUnsupported) {
				t.Errorf("error without a kind: %v", err)
			}
			return
		}
		if CheckID(m.ID) != nil || m.Bytes < 0 {
			t.Errorf("manifest: %+v", m)
		}
		for name, size := range m.Files {
			if strings.ContainsRune(name, '/') || name == "." || name == ".." || size < 0 {
				t.Errorf("file %q of %d bytes", name, size)
			}
		}
	})
}
