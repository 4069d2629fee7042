package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

func write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, mode); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	got, err := os.ReadFile(name)
	info, serr := os.Stat(name)
	if err != nil || serr != nil || string(got) != text || info.Mode().Perm() != mode {
		t.Errorf("%s: %q, %v, %v; want %q, %v", name, got, info, err, text, mode)
	}
}

func tree(t *testing.T, dir string) {
	t.Helper()
	write(t, filepath.Join(dir, "run.sh"), "#!/bin/sh\n", 0o755)
	write(t, filepath.Join(dir, "sub/secret"), "\x00\xff", 0o600)
	write(t, filepath.Join(dir, "with space\nand line"), "", 0o644)
	if err := os.MkdirAll(filepath.Join(dir, "hollow"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "hollow"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
}

func expectTree(t *testing.T, dir string) {
	t.Helper()
	expect(t, filepath.Join(dir, "run.sh"), "#!/bin/sh\n", 0o755)
	expect(t, filepath.Join(dir, "sub/secret"), "\x00\xff", 0o600)
	expect(t, filepath.Join(dir, "with space\nand line"), "", 0o644)
	if info, err := os.Stat(filepath.Join(dir, "hollow")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "link")); err == nil {
		t.Error("a link was copied")
	}
}

func TestCopyTrees(t *testing.T) {
	w := newWorld(t)
	src, dst := filepath.Join(t.TempDir(), "data"), t.TempDir()
	tree(t, src)
	r := w.do("sandbox", "cp", "-u", "ada", src, w.id+":/work/new")
	if r.code != 0 || !strings.Contains(r.err, "left out 1 links") {
		t.Fatalf("%+v", r)
	}
	expectTree(t, filepath.Join(w.guest.root, "work/new"))
	if w.guest.users[0] != "ada" {
		t.Error(w.guest.users)
	}
	w.must("sandbox", "cp", src, w.id+":")
	expectTree(t, filepath.Join(w.guest.root, "home/user/data"))
	w.must("sandbox", "cp", src+"/.", w.id+":/work")
	expectTree(t, filepath.Join(w.guest.root, "work"))
	w.must("sandbox", "cp", w.id+":data", dst)
	expectTree(t, filepath.Join(dst, "data"))
	w.must("sandbox", "cp", w.id+":data/.", dst)
	expectTree(t, dst)
	w.must("sandbox", "cp", w.id+":data", filepath.Join(dst, "other"))
	expectTree(t, filepath.Join(dst, "other"))
}

func TestCopyFiles(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "empty"), "", 0o640)
	w.must("sandbox", "cp", filepath.Join(dir, "empty"), w.id+":/tmp/")
	expect(t, filepath.Join(w.guest.root, "tmp/empty"), "", 0o640)
	w.in = strings.NewReader("from a pipe")
	w.must("sandbox", "cp", "-", w.id+":/tmp/piped")
	if out := w.must("sandbox", "cp", w.id+":/tmp/piped", "-"); out != "from a pipe" {
		t.Error(out)
	}
	kept := filepath.Join(dir, "kept")
	write(t, kept, "old", 0o644)
	if r := w.do("sandbox", "cp", w.id+":/tmp/nope", kept); r.code != 1 {
		t.Errorf("%+v", r)
	}
	expect(t, kept, "old", 0o644) // a copy that cannot be made takes nothing away
	w.must("sandbox", "cp", w.id+":/tmp/piped", kept)
	expect(t, kept, "from a pipe", 0o644)
}

func TestCopyDeepTree(t *testing.T) {
	w := newWorld(t)
	deep := strings.Repeat("d/", 2*maxDepth+3)
	write(t, filepath.Join(w.guest.root, "home/user/top", deep, "end"), "bottom", 0o644)
	dst := t.TempDir()
	w.must("sandbox", "cp", w.id+":top", dst)
	expect(t, filepath.Join(dst, "top", deep, "end"), "bottom", 0o644)
}

func TestCopyHostileNames(t *testing.T) {
	w := newWorld(t)
	write(t, filepath.Join(w.guest.root, "home/user/d/f"), "x", 0o644)
	write(t, filepath.Join(w.guest.root, "etc/evil"), "evil", 0o644)
	const file, dir = filesystem.FileType_FILE_TYPE_FILE, filesystem.FileType_FILE_TYPE_DIRECTORY
	for _, at := range []string{"/home/user/d/../../../etc/evil", "/etc/evil", "../x", "x", "", "/home/user/d", "/home/user/dx", "/home/user/d/.."} {
		for _, kind := range []filesystem.FileType{file, dir} {
			w.guest.list = func() []*filesystem.EntryInfo {
				return []*filesystem.EntryInfo{{Name: "evil", Path: at, Type: kind, Mode: 0o4777}}
			}
			parent := t.TempDir()
			target := filepath.Join(parent, "target")
			r := w.do("sandbox", "cp", w.id+":d", target)
			if r.code == 0 || !strings.Contains(r.err, "not below") {
				t.Errorf("%q: %+v", at, r)
			}
			if found, err := os.ReadDir(parent); err != nil || len(found) != 1 {
				t.Errorf("%q: %v, %v", at, found, err)
			}
			if found, err := os.ReadDir(target); err != nil || len(found) != 0 {
				t.Errorf("%q: %v, %v", at, found, err)
			}
		}
	}
}

// A link that lies in the target already, or that one copy made, leads no file out of it.
func TestCopyThroughLinks(t *testing.T) {
	w := newWorld(t)
	write(t, filepath.Join(w.guest.root, "home/user/d/sub/f"), "x", 0o644)
	target, outside := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(target, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(target, "d/sub")); err != nil {
		t.Fatal(err)
	}
	if r := w.do("sandbox", "cp", w.id+":d", target); r.code == 0 {
		t.Errorf("%+v", r)
	}
	if found, err := os.ReadDir(outside); err != nil || len(found) != 0 {
		t.Errorf("%v, %v", found, err)
	}
}

func TestCopySetsNoSpecialBits(t *testing.T) {
	w := newWorld(t)
	write(t, filepath.Join(w.guest.root, "home/user/d/f"), "x", 0o755)
	w.guest.list = func() []*filesystem.EntryInfo {
		return []*filesystem.EntryInfo{{Path: "/home/user/d/f", Type: filesystem.FileType_FILE_TYPE_FILE, Mode: 0o6755}}
	}
	dst := t.TempDir()
	w.must("sandbox", "cp", w.id+":d/", filepath.Join(dst, "d"))
	if info, err := os.Stat(filepath.Join(dst, "d/f")); err != nil || info.Mode() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestLeaf(t *testing.T) {
	for in, want := range map[string]string{"a": "a", "/a/b": "b", "a/": "a", ".": "", "a/.": "", "..": "", "a/..": "", "/": "", "~": "", "": ""} {
		if got := leaf(in); got != want {
			t.Errorf("leaf(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzRemotePath(f *testing.F) {
	f.Add("i1a2:/x")
	f.Add("./a:b")
	f.Add("C:\nx")
	f.Fuzz(func(t *testing.T, s string) {
		if m := remotePath.FindStringSubmatch(s); m != nil && (m[1]+":"+m[2] != s || strings.ContainsAny(m[1], "/.:")) {
			t.Errorf("%q: %q", s, m)
		}
	})
}
