package recipe

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// tree makes a build context: a name that ends with / is a directory, content "-> x" a link.
func tree(t *testing.T, files map[string]string) *Context {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		at := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(at), 0o755)
		switch to, link := strings.CutPrefix(content, "-> "); {
		case strings.HasSuffix(name, "/"):
			err = errors.Join(err, os.MkdirAll(at, 0o755))
		case link:
			err = errors.Join(err, os.Symlink(to, at))
		default:
			err = errors.Join(err, os.WriteFile(at, []byte(content), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	c, err := OpenContext(dir, "Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// listing unpacks an archive into one line per entry.
func listing(t *testing.T, s *Selection) string {
	t.Helper()
	var packed, again bytes.Buffer
	if err := errors.Join(s.Archive(&packed), s.Archive(&again)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(packed.Bytes(), again.Bytes()) {
		t.Error("two archives of the same files differ")
	}
	z, err := gzip.NewReader(&packed)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return b.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Linkname != "" {
			text = []byte("-> " + h.Linkname)
		}
		if h.Uid != 0 || !h.ModTime.Equal(archiveTime()) {
			t.Errorf("%s belongs to %d and is of %s", h.Name, h.Uid, h.ModTime)
		}
		fmt.Fprintf(&b, "%s %o %s\n", h.Name, h.Mode, text)
	}
}

func TestSelect(t *testing.T) {
	c := tree(t, map[string]string{
		"a.py": "A", "b.py": "B", "c.txt": "C", "src/m.py": "M", "src/sub/n.py": "N", "src/link": "-> m.py", "src/out": "-> /etc/passwd",
		"dir1/x": "1", "dir2/x": "2", "dir2/y": "3", "empty/": "", "to-src": "-> src", "to-file": "-> c.txt", "away": "-> /etc",
		"secret.env": "S", "src/skip.log": "L", "logs/a.log": "L", "logs/keep.log": "K", "[id].js": "I", "x.tar.gz": "\x1f\x8b..",
		".dockerignore": "# comment\nsecret.env\n**/*.log\n!logs/keep.log\n",
	})
	const src = "src/ 755 \nsrc/link 777 -> m.py\nsrc/m.py 644 M\nsrc/out 777 -> /etc/passwd\nsrc/sub/ 755 \nsrc/sub/n.py 644 N\n"
	for _, tc := range []struct {
		src  Source
		from string // "" stands for the path
		dir  bool
		want string // the listing, or the error after a !
	}{
		{src: Source{Path: "a.py"}, want: "a.py 644 A\n"},
		{src: Source{Path: "src"}, want: src},
		{src: Source{Path: "src/sub"}, want: "src/sub/ 755 \nsrc/sub/n.py 644 N\n"},
		{src: Source{Path: "src", Exclude: []string{"src/sub", "**/link"}}, want: "src/ 755 \nsrc/m.py 644 M\nsrc/out 777 -> /etc/passwd\n"},
		{src: Source{Path: "to-src"}, want: strings.ReplaceAll(src, "src/", "to-src/")},
		{src: Source{Path: "to-file"}, want: "to-file 644 C\n"},
		{src: Source{Path: "empty"}, want: "empty/ 755 \n"},
		{src: Source{Path: "logs"}, want: "logs/ 755 \nlogs/keep.log 644 K\n"},
		{src: Source{Path: "*.py"}, from: ".", dir: true, want: "a.py 644 A\nb.py 644 B\n"},
		{src: Source{Path: "?.txt"}, from: "c.txt", want: "c.txt 644 C\n"},
		{src: Source{Path: "dir*"}, from: ".", dir: true, want: "x 644 2\ny 644 3\n"},
		{src: Source{Path: `\[id].js`}, from: ".", dir: true, want: "[id].js 644 I\n"},
		{src: Source{Name: "EOF", Content: []byte("text")}, from: "EOF", want: "EOF 644 text\n"},
		{src: Source{Path: "nope"}, want: "!\"nope\": no such file in the build context"},
		{src: Source{Path: "*.nope"}, want: "!no such file"},
		{src: Source{Path: "secret.env"}, want: "!leaves it out of the build context"},
		{src: Source{Path: "away"}, want: "!escapes"},
		{src: Source{Path: "a[.py"}, want: "!syntax error in pattern"},
		{src: Source{Path: "x.tar.gz", Add: true}, want: "!ADD \"x.tar.gz\": archives are not unpacked"},
		{src: Source{Path: "x.tar.gz"}, want: "x.tar.gz 644 \x1f\x8b..\n"},
		{src: Source{Path: "src", Exclude: []string{"[a"}}, want: "!--exclude"},
	} {
		t.Run(tc.src.Path+tc.src.Name, func(t *testing.T) {
			s, err := c.Select(&tc.src)
			if text, fails := strings.CutPrefix(tc.want, "!"); fails {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Errorf("%v, want %q", err, text)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, listing(t, s)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if tc.from == "" {
				tc.from = tc.src.Path
			}
			if s.From != tc.from || s.Directory != tc.dir {
				t.Errorf("from %q, directory %v", s.From, s.Directory)
			}
		})
	}
}

// The whole context is everything but what is left out, and never its own directory.
func TestSelectAll(t *testing.T) {
	c := tree(t, map[string]string{"Dockerfile": "FROM a", "a/b": "1", ".git/config": "x", "Dockerfile.dockerignore": ".git\n*ignore\n", ".dockerignore": "a\n"})
	s, err := c.Select(&Source{Path: "."})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("Dockerfile 644 FROM a\na/ 755 \na/b 644 1\n", listing(t, s)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	nothing := tree(t, map[string]string{".dockerignore": "*\n"})
	if _, err := nothing.Select(&Source{Path: "."}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
}

func TestHash(t *testing.T) {
	c := tree(t, map[string]string{"d/a": "1", "d/b": "-> a"})
	at := filepath.Join(c.root.Name(), "d/a")
	hash := func() string {
		t.Helper()
		s, err := c.Select(&Source{Path: "d"})
		if err != nil {
			t.Fatal(err)
		}
		h, err := s.Hash()
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	first := hash()
	if len(first) != 64 {
		t.Error(first)
	}
	if err := os.Chtimes(at, time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if hash() != first {
		t.Error("a time changes the hash")
	}
	seen := map[string]bool{first: true}
	for what, change := range map[string]func() error{
		"content":    func() error { return os.WriteFile(at, []byte("2"), 0o600) },
		"permission": func() error { return os.Chmod(at, 0o755) },
		"name":       func() error { return os.Rename(at, at+"c") },
		"link": func() error {
			return errors.Join(os.Remove(filepath.Join(c.root.Name(), "d/b")), os.Symlink("ac", filepath.Join(c.root.Name(), "d/b")))
		},
	} {
		if err := change(); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if h := hash(); seen[h] && what != "permission" && what != "content" { // both miss the file after its renaming
			t.Errorf("another %s leaves the hash", what)
		} else {
			seen[h] = true
		}
	}
}

// A file that changes between hash and archive is no silent corruption.
func TestChangedFile(t *testing.T) {
	c := tree(t, map[string]string{"a": "1"})
	s, err := c.Select(&Source{Path: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.root.Name(), "a"), []byte("longer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Archive(io.Discard); !errors.Is(err, sandbox.ErrConflict) {
		t.Error(err)
	}
}

func TestWith(t *testing.T) {
	p := Planned{Step: Step{Type: Copy, Args: []string{"*.py", "/app", "", ""}}}
	got := p.With(&Selection{From: ".", Directory: true}, "h")
	if diff := cmp.Diff(Step{Type: Copy, Args: []string{".", "/app/", "", ""}, FilesHash: "h"}, got); diff != "" || p.Args[0] != "*.py" {
		t.Error(diff, p.Args)
	}
}

func FuzzIgnore(f *testing.F) {
	f.Add("*.log\n!keep.log\n", "a/keep.log")
	f.Add("# x\n/a/../b\n**/[a-z]?\n", "b/c")
	f.Add("a\\\n!", "a")
	f.Fuzz(func(t *testing.T, text, name string) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, ".dockerignore"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := OpenContext(dir, "")
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		if left, all, err := c.ignore.covers(name); err != nil && (left || all) {
			t.Errorf("%q is left out beside %v", name, err)
		}
	})
}
