package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestStore(t *testing.T) {
	s := newStore(t, nil)
	dir := t.TempDir()
	img, err := s.Build(t.Context(), Request{Sources: []string{"dir:" + dir}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Build(t.Context(), Request{Sources: []string{"dir:" + dir}}, nil)
	if err != nil || again.Digest != img.Digest || !again.CreatedAt.Equal(img.CreatedAt) {
		t.Errorf("building again: %+v, %v; want %+v", again, err, img)
	}
	got, err := s.Get(t.Context(), img.Digest)
	if diff := cmp.Diff(img, got); err != nil || diff != "" {
		t.Errorf("Get: %v\n%s", err, diff)
	}
	if all, err := s.List(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("List: %v, %v", all, err)
	}
	for _, bad := range []string{"", "sha256:", "sha256:../../x", "sha256:" + strings.ToUpper(hex64()), "md5:" + hex64(), hex64()} {
		if _, err := s.Get(t.Context(), bad); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("Get(%q): %v", bad, err)
		}
	}
	file, err := s.Path(img.Digest)
	if err != nil {
		t.Fatal(err)
	}
	flipByte(t, file)
	if err := s.Verify(t.Context(), img.Digest); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("Verify of a damaged file: %v", err)
	}
	if err := s.Remove(t.Context(), img.Digest); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), img.Digest); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Remove again: %v", err)
	}
	if _, err := s.Path(img.Digest); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Path of what is gone: %v", err)
	}
	assertNoLeftovers(t, s)
}

func flipByte(t *testing.T, file string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-1] ^= 1
	if err := errors.Join(os.Chmod(file, 0o600), os.WriteFile(file, data, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestRecover(t *testing.T) {
	s := newStore(t, nil)
	dir := t.TempDir()
	img, err := s.Build(t.Context(), Request{Sources: []string{"dir:" + dir}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(s.imageDir(), strings.TrimPrefix(img.Digest, "sha256:"))
	for _, made := range []string{
		filepath.Join(s.tempDir(), "build-1", "root", "etc"), filepath.Join(s.tempDir(), "gone-2"),
		filepath.Join(s.imageDir(), "not-a-digest"), filepath.Join(s.imageDir(), hex64()),
	} {
		if err := os.MkdirAll(made, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// A second image whose file is short.
	short := filepath.Join(s.imageDir(), strings.Repeat("ab", 32))
	record := strings.ReplaceAll(readAll(t, filepath.Join(kept, recordFile)), strings.TrimPrefix(img.Digest, "sha256:"), strings.Repeat("ab", 32))
	if err := errors.Join(os.Mkdir(short, 0o700), os.WriteFile(filepath.Join(short, rootfsFile), []byte("x"), 0o600),
		os.WriteFile(filepath.Join(short, recordFile), []byte(record), 0o600)); err != nil {
		t.Fatal(err)
	}
	old, young := filepath.Join(s.debianDir(), newTree+"1"), filepath.Join(s.debianDir(), newTree+"2")
	if err := errors.Join(os.WriteFile(old, nil, 0o600), os.WriteFile(young, nil, 0o600), os.Chtimes(old, time.Time{}, time.Unix(1, 0))); err != nil {
		t.Fatal(err)
	}
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	assertNoLeftovers(t, s)
	if trees, err := os.ReadDir(s.debianDir()); err != nil || len(trees) != 1 || trees[0].Name() != filepath.Base(young) {
		t.Errorf("new trees after Recover: %v, %v; want only the young one", trees, err)
	}
	left, err := os.ReadDir(s.imageDir())
	if err != nil || len(left) != 1 || filepath.Join(s.imageDir(), left[0].Name()) != kept {
		t.Errorf("images after Recover: %v, %v", left, err)
	}
}

func readAll(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestMountsBelow(t *testing.T) {
	info := "22 1 0:1 / / rw - ext4 /dev/vda rw\n" +
		"30 22 0:5 / /srv/tmp/b/root/proc rw - proc none rw\n" +
		"31 22 0:6 / /srv/tmp/b/root/proc rw - tmpfs on-top rw\n" +
		"32 22 0:7 / /srv/tmp/b/root/proc/sys\\040x rw - proc none rw\n" +
		"33 22 0:8 / /srv/tmpother rw - proc none rw\nshort line\n"
	want := []string{"/srv/tmp/b/root/proc/sys x", "/srv/tmp/b/root/proc", "/srv/tmp/b/root/proc"}
	if diff := cmp.Diff(want, mountsBelow(info, "/srv/tmp")); diff != "" {
		t.Errorf("mounts (-want +got):\n%s", diff)
	}
}
