package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// exported returns an image of a store with its bytes.
func exported(t *testing.T, s *Store, digest string) (Image, []byte) {
	t.Helper()
	img, f, err := s.Open(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return img, raw
}

func startImport(t *testing.T, s *Store, digest string) *Import {
	t.Helper()
	im, err := s.Import(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// get gets an image in one go.
func get(t *testing.T, s *Store, img *Image, raw []byte) (Image, error) {
	t.Helper()
	im := startImport(t, s, img.Digest)
	defer im.Close()
	if _, err := im.Receive(t.Context(), img, bytes.NewReader(raw[im.Have():])); err != nil {
		return Image{}, err
	}
	return im.Commit(img)
}

func TestImportOfImage(t *testing.T) {
	from := newStore(t, nil)
	made := composed(t, from)
	img, raw := exported(t, from, made.Digest)
	to := newStore(t, nil)
	im := startImport(t, to, img.Digest)
	if _, err := to.Import(t.Context(), img.Digest); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("got twice at once: %v", err)
	}
	cut := len(raw) / 2
	if _, err := im.Receive(t.Context(), &img, bytes.NewReader(raw[:cut])); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("broke off: %v", err)
	}
	im.Close()
	if err := to.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	im = startImport(t, to, img.Digest)
	if im.Have() != int64(cut) {
		t.Errorf("goes on at %d: want %d", im.Have(), cut)
	}
	moved, err := im.Receive(t.Context(), &img, bytes.NewReader(raw[cut:]))
	if err != nil || moved != int64(len(raw)-cut) {
		t.Fatalf("moved %d: %v", moved, err)
	}
	got, err := im.Commit(&img)
	want := img
	want.Fetched = true
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if err := to.Verify(t.Context(), img.Digest); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(describe(t, from, img.Digest), describe(t, to, img.Digest)); diff != "" {
		t.Errorf("contents (-original +copy):\n%s", diff)
	}
	assertNoPartial(t, to)
}

func assertNoPartial(t *testing.T, s *Store) {
	t.Helper()
	if left, err := os.ReadDir(s.partialDir()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if len(s.importing) > 0 {
		t.Errorf("still being got: %v", s.importing)
	}
}

func TestImportOfWrongImage(t *testing.T) {
	from := newStore(t, nil)
	img, raw := exported(t, from, base(t, from).Digest)
	to := newStore(t, nil)
	bad := bytes.Clone(raw)
	bad[len(bad)/3] ^= 1
	if _, err := get(t, to, &img, bad); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("damaged: %v", err)
	}
	assertNoPartial(t, to)
	im := startImport(t, to, img.Digest)
	other := img
	other.Digest = "sha256:" + hex64()
	if _, err := im.Receive(t.Context(), &other, bytes.NewReader(raw)); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("another: %v", err)
	}
	large := img
	large.Bytes = 1 << 60
	if _, err := im.Receive(t.Context(), &large, bytes.NewReader(raw)); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("too large: %v", err)
	}
	if err := im.Discard(); err != nil {
		t.Fatal(err)
	}
	assertNoPartial(t, to)
	if _, err := to.Import(t.Context(), "sha256:../x"); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("impossible: %v", err)
	}
}

func TestSweepPartial(t *testing.T) {
	from := newStore(t, nil)
	img, raw := exported(t, from, base(t, from).Digest)
	to := newStore(t, nil)
	im := startImport(t, to, img.Digest)
	if _, err := im.Receive(t.Context(), &img, bytes.NewReader(raw[:100])); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Fatal(err)
	}
	long := time.Now().Add(-2 * partialAge)
	if err := os.Chtimes(filepath.Join(im.dir, rootfsFile), long, long); err != nil {
		t.Fatal(err)
	}
	if err := to.SweepPartial(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(im.dir); err != nil {
		t.Errorf("swept while it is got: %v", err)
	}
	im.Close()
	if err := to.SweepPartial(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertNoPartial(t, to)
}

func FuzzParseRecord(f *testing.F) {
	raw, err := json.Marshal(Image{Digest: "sha256:" + hex64(), Bytes: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"digest":"sha256:../../x","bytes":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if img, err := ParseRecord(raw); err == nil && (len(img.Digest) != 71 || img.Bytes <= 0) {
			t.Errorf("accepted %+v", img)
		}
	})
}
