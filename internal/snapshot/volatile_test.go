package snapshot

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What was not flushed counts until the machine is booted anew, unless it was flushed before.
func TestVolatile(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for _, id := range []string{"lost", "kept"} {
		st, err := s.Begin(id)
		if err != nil {
			t.Fatal(err)
		}
		st.Volatile = true
		if err := os.WriteFile(filepath.Join(st.Dir(), "pages.img"), []byte(id), fileMode); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Commit(st, manifest()); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, dir)
	if got := content(s, "lost") + content(s, "kept"); got != "lostkept" {
		t.Errorf("after a restart: %s", got)
	}
	for range 2 { // the second has nothing to do
		if err := s.Flush("kept"); err != nil {
			t.Fatal(err)
		}
	}
	anew, err := New(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	anew.boot = "another"
	if err := anew.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := content(anew, "kept"); got != "kept" {
		t.Errorf("flushed: %s", got)
	}
	if diff := cmp.Diff([]string{"kept"}, entries(t, dir)); diff != "" {
		t.Errorf("after a boot (-want +got):\n%s", diff)
	}
}

// A part that was not flushed is not gone on with.
func TestVolatileImport(t *testing.T) {
	from, dir := open(t, t.TempDir()), t.TempDir()
	m := sparse(t, from, "one")
	all := export(t, from, "one", Position{})
	to := open(t, dir)
	im := startImport(t, to, "one")
	if err := im.DoNotFlush(); err != nil {
		t.Fatal(err)
	}
	if receive(im, &Head{Manifest: m}, bytes.NewReader(all[:len(all)/2])) == nil {
		t.Fatal("half of it was taken for the whole")
	}
	im.Close()
	to = open(t, dir)
	im = startImport(t, to, "one")
	if im.Head() != nil {
		t.Error("it goes on with what was not flushed")
	}
	if err := im.DoNotFlush(); err != nil {
		t.Fatal(err)
	}
	if err := receive(im, &Head{Manifest: m, Parcel: []byte("more")}, bytes.NewReader(all)); err != nil {
		t.Fatal(err)
	}
	got, err := im.Commit(nil)
	if err != nil || got.Boot == "" {
		t.Fatalf("%+v, %v", got, err)
	}
	im.Close()
	same(t, from, to, "one")
	if diff := cmp.Diff([]string{"one"}, entries(t, dir)); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}
