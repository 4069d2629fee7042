package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// sparse makes a checkpoint with holes, zeros and data in several files.
func sparse(tb testing.TB, s *Store, id string) Manifest {
	tb.Helper()
	st, err := s.Begin(id)
	if err != nil {
		tb.Fatal(err)
	}
	noise := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(noise)
	write := func(name string, size int64, at ...int64) {
		f, err := os.Create(filepath.Join(st.Dir(), name))
		if err != nil {
			tb.Fatal(err)
		}
		err = f.Truncate(size)
		for _, off := range at {
			_, werr := f.WriteAt(noise[:min(int64(len(noise)), size-off)], off)
			err = errors.Join(err, werr)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			tb.Fatal(err)
		}
	}
	write("a-empty", 0)
	write("b-odd", 10_001, 0)
	write("c-holes", 1<<30, 5<<20, 100<<20+4096, 1<<30-5)
	write("d-pages", 7<<20+123, 0, 4<<20+100)
	write("e-hole", 1<<20+1)
	m, err := s.Commit(st, manifest())
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

// export writes a checkpoint as a peer that is asked for it from a position on.
func export(tb testing.TB, s *Store, id string, pos Position) []byte {
	tb.Helper()
	h, err := s.Hold(id)
	if err != nil {
		tb.Fatal(err)
	}
	defer h.Release()
	var out bytes.Buffer
	for _, name := range h.Manifest.Names() {
		from := int64(0)
		switch {
		case name < pos.File:
			continue
		case name == pos.File:
			from = pos.Offset
		}
		if err := h.Send(tb.Context(), &out, name, from); err != nil {
			tb.Fatal(err)
		}
	}
	return out.Bytes()
}

// receive reads what export wrote, to its end or as far as it goes.
func receive(im *Import, head *Head, r io.Reader) error {
	if err := im.Begin(head); err != nil {
		return err
	}
	for {
		_, more, err := im.Next(context.Background())
		if err != nil || !more {
			return err
		}
		if _, err := im.Receive(context.Background(), r); err != nil {
			return err
		}
	}
}

func startImport(tb testing.TB, s *Store, id string) *Import {
	tb.Helper()
	im, err := s.Import(id)
	if err != nil {
		tb.Fatal(err)
	}
	return im
}

// same compares a checkpoint in two stores, with what it occupies.
func same(t *testing.T, x, y *Store, id string) {
	t.Helper()
	a, err := x.Hold(id)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Release()
	b, err := y.Hold(id)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Release()
	for _, name := range a.Manifest.Names() {
		sums := [2]Position{}
		for i, dir := range []string{a.Dir, b.Dir} {
			f, err := os.Open(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			err = frames(t.Context(), f, a.Manifest.Files[name], func(off int64, frame []byte) error {
				for _, c := range frame[frameBytes:] {
					sums[i].Frames = sums[i].Frames*31 + int64(c)
				}
				sums[i].Offset += off
				return nil
			})
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
		}
		if sums[0] != sums[1] {
			t.Errorf("%s differs", name)
		}
	}
	if a.Manifest.Bytes < b.Manifest.Bytes {
		t.Errorf("the copy occupies %d bytes, the original %d", b.Manifest.Bytes, a.Manifest.Bytes)
	}
	if diff := cmp.Diff(a.Manifest.Files, b.Manifest.Files); diff != "" {
		t.Errorf("files (-original +copy):\n%s", diff)
	}
}

func TestImport(t *testing.T) {
	from, dir := open(t, t.TempDir()), t.TempDir()
	to := open(t, dir)
	m := sparse(t, from, "one")
	im := startImport(t, to, "one")
	if _, err := to.Begin("one"); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("made while it is got: %v", err)
	}
	all := export(t, from, "one", Position{})
	if n := len(all); n > 18<<20 {
		t.Errorf("%d bytes are sent for %d on the disk", n, m.Bytes)
	}
	if err := receive(im, &Head{Manifest: m, Parcel: []byte("more")}, bytes.NewReader(all)); err != nil {
		t.Fatal(err)
	}
	got, err := im.Commit(func(m *Manifest) { m.Replica = true })
	if err != nil {
		t.Fatal(err)
	}
	if !got.Replica || got.SandboxID != m.SandboxID {
		t.Errorf("manifest: %+v", got)
	}
	im.Close()
	same(t, from, to, "one")
	if _, err := to.Import("one"); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("got twice: %v", err)
	}
	to = open(t, dir)
	same(t, from, to, "one")
	if raw, err := to.Parcel("one"); err != nil || string(raw) != "more" {
		t.Errorf("came along: %q, %v", raw, err)
	}
	if _, err := from.Parcel("one"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("came along with the original: %v", err)
	}
	if diff := cmp.Diff([]string{"one"}, entries(t, dir)); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

// TestImportGoesOn breaks transfers off anywhere, with a restart of the receiver each time, until one comes to its end.
func TestImportGoesOn(t *testing.T) {
	from, dir := open(t, t.TempDir()), t.TempDir()
	m := sparse(t, from, "one")
	rng := rand.New(rand.NewPCG(1, 2))
	sent, breaks := 0, 0
	for {
		to := open(t, dir)
		im := startImport(t, to, "one")
		pos, _, err := im.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		rest := export(t, from, "one", pos)
		whole := export(t, from, "one", Position{File: pos.File})
		if pos.Frames != int64(len(whole)-len(rest)) && pos.File != "" {
			t.Fatalf("at %+v, and %d bytes of frames are before", pos, len(whole)-len(rest))
		}
		n := min(len(rest), rng.IntN(4<<20))
		sent += n
		err = receive(im, &Head{Manifest: m}, bytes.NewReader(rest[:n]))
		if err == nil {
			if _, err := im.Commit(nil); err != nil {
				t.Fatal(err)
			}
			same(t, from, to, "one")
			break
		}
		if !errors.Is(err, sandbox.ErrUnavailable) {
			t.Fatal(err)
		}
		breaks++
		im.Close()
	}
	if most := len(export(t, from, "one", Position{})) + breaks*(chunkBytes+blockBytes); breaks < 3 || sent > most {
		t.Errorf("%d bytes sent in %d parts: want at most %d", sent, breaks, most)
	}
}

func TestImportOfSomethingElse(t *testing.T) {
	from, dir := open(t, t.TempDir()), t.TempDir()
	m := sparse(t, from, "one")
	to := open(t, dir)
	im := startImport(t, to, "one")
	all := export(t, from, "one", Position{})
	if err := receive(im, &Head{Manifest: m}, bytes.NewReader(all[:9<<20])); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	other := m
	other.CreatedAt = other.CreatedAt.Add(1)
	if err := im.Begin(&Head{Manifest: other}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("went on with another: %v", err)
	}
	if err := im.Reset(); err != nil {
		t.Fatal(err)
	}
	if pos, more, err := im.Next(t.Context()); pos != (Position{}) || !more || err != nil {
		t.Errorf("after a reset: %+v, %v, %v", pos, more, err)
	}
	other.ID = "two"
	if err := im.Begin(&Head{Manifest: other}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("got another id: %v", err)
	}
	if err := im.Discard(); err != nil {
		t.Fatal(err)
	}
	if left := entries(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestImportOfDamage changes bytes on the way, and on the disk between two parts.
func TestImportOfDamage(t *testing.T) {
	from, to := open(t, t.TempDir()), open(t, t.TempDir())
	m := sparse(t, from, "one")
	all := export(t, from, "one", Position{})
	bad := bytes.Clone(all)
	bad[4<<20] ^= 1
	im := startImport(t, to, "one")
	if err := receive(im, &Head{Manifest: m}, bytes.NewReader(bad)); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("damaged on the way: %v", err)
	}
	pos, _, err := im.Next(t.Context())
	if err != nil || pos.Offset != 0 || pos.File != "c-holes" {
		t.Fatalf("goes on at %+v: %v", pos, err)
	}
	rest := export(t, from, "one", pos)
	if err := receive(im, im.Head(), bytes.NewReader(rest[:6<<20])); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Fatal(err)
	}
	part := filepath.Join(im.path(), partDir, "c-holes")
	f, err := os.OpenFile(part, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte{1, 2, 3}, 6<<20)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if pos, _, err = im.Next(t.Context()); err != nil || pos.Offset == 0 {
		t.Fatalf("goes on at %+v: %v", pos, err)
	}
	if err := receive(im, im.Head(), bytes.NewReader(export(t, from, "one", pos))); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("damaged on the disk: %v", err)
	}
	if pos, _, err = im.Next(t.Context()); err != nil || pos.Offset != 0 {
		t.Fatalf("goes on at %+v: %v", pos, err)
	}
	if err := receive(im, im.Head(), bytes.NewReader(export(t, from, "one", pos))); err != nil {
		t.Fatal(err)
	}
	if _, err := im.Commit(nil); err != nil {
		t.Fatal(err)
	}
	same(t, from, to, "one")
}

func TestSend(t *testing.T) {
	s := open(t, t.TempDir())
	sparse(t, s, "one")
	h, err := s.Hold("one")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Release()
	for name, c := range map[string]struct {
		file string
		from int64
		want error
	}{
		"unknown":  {"../manifest.json", 0, sandbox.ErrNotFound},
		"negative": {"d-pages", -chunkBytes, sandbox.ErrInvalid},
		"odd":      {"d-pages", 4096, sandbox.ErrInvalid},
		"behind":   {"d-pages", 8 << 20, sandbox.ErrInvalid},
	} {
		if err := h.Send(t.Context(), io.Discard, c.file, c.from); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrNoProgress)
	if err := h.Send(ctx, io.Discard, "d-pages", 0); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("nobody waits: %v", err)
	}
}

func TestSweep(t *testing.T) {
	from, dir := open(t, t.TempDir()), t.TempDir()
	m := sparse(t, from, "one")
	to := open(t, dir)
	im := startImport(t, to, "one")
	if err := receive(im, &Head{Manifest: m}, strings.NewReader("")); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Fatal(err)
	}
	im.Close()
	to = open(t, dir)
	if left := entries(t, dir); len(left) != 1 {
		t.Errorf("after a restart: %v", left)
	}
	long := time.Now().Add(-2 * partialAge)
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, _ error) error { return os.Chtimes(path, long, long) })
	if err != nil {
		t.Fatal(err)
	}
	if err := to.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := entries(t, dir); len(left) > 0 {
		t.Errorf("after a while: %v", left)
	}
}

// TestImportOnFullDisk runs out of room before and in the middle of a transfer.
func TestImportOnFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the tests' own switch
			t.Fatal("this test needs root")
		}
		t.Skip("needs root to mount a small file system")
	}
	disk := t.TempDir()
	if err := unix.Mount("none", disk, "tmpfs", 0, "size=72m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	from, to := open(t, t.TempDir()), open(t, disk)
	m := sparse(t, from, "one")
	im := startImport(t, to, "one")
	if err := im.Begin(&Head{Manifest: m}); !errors.Is(err, sandbox.ErrUnavailable) || !strings.Contains(err.Error(), "needs 1") {
		t.Errorf("too large: %v", err)
	}
	small := m
	small.Bytes = 1
	if err := unix.Mount("none", disk, "tmpfs", unix.MS_REMOUNT, "size=70m"); err != nil {
		t.Fatal(err)
	}
	if err := im.Begin(&Head{Manifest: small}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(disk, "ballast"), make([]byte, 60<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	err := receive(im, &Head{Manifest: small}, bytes.NewReader(export(t, from, "one", Position{})))
	if !errors.Is(err, sandbox.ErrUnavailable) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("no room in the middle: %v", err)
	}
	if err := im.Discard(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"ballast"}, entries(t, disk)); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

// FuzzReceive reads frames that nobody has checked. Whatever they are, a file that counts has its size and its checksum.
func FuzzReceive(f *testing.F) {
	s := open(f, f.TempDir())
	add(f, s, "one", strings.Repeat("abc", 5000))
	f.Add(export(f, s, "one", Position{}), int64(15000))
	f.Add([]byte{}, int64(1))
	f.Add(bytes.Repeat([]byte{0xff}, 100), int64(1<<40))
	file, err := os.Create(filepath.Join(f.TempDir(), "part"))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = file.Close() })
	f.Fuzz(func(t *testing.T, raw []byte, size int64) {
		size = max(0, size%(1<<40))
		if err := file.Truncate(0); err != nil {
			t.Fatal(err)
		}
		v := receiver{f: file, size: size, sum: newSum()}
		err := v.receive(context.Background(), bytes.NewReader(raw))
		info, serr := file.Stat()
		if serr != nil || info.Size() > size || err == nil && info.Size() != size {
			t.Errorf("a file of %d bytes has %d: %v, %v", size, info.Size(), err, serr)
		}
	})
}

func FuzzParseHead(f *testing.F) {
	m := manifest()
	m.ID, m.Format, m.Files = "two", manifestFormat, map[string]int64{"a": 1}
	raw, err := json.Marshal(Head{Manifest: m, Parcel: []byte("x")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"manifest":{"format":1,"id":"x","kind":"memory","files":{"../x":1}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, err := ParseHead(raw)
		if err != nil {
			return
		}
		for _, name := range h.Manifest.Names() {
			if filepath.Join("/x", name) != "/x/"+name {
				t.Errorf("accepted file %q", name)
			}
		}
	})
}
