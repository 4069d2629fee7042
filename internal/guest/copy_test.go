package guest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// tarOf makes an archive from lines: "dir/" is a directory, "a=text" a file, "a->b" a link, "a=>b" a hard link, "a|" a
// named pipe.
func tarOf(tb testing.TB, entries ...string) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	at := time.Unix(1_000_000_000, 0)
	for _, e := range entries {
		h := &tar.Header{Mode: 0o644, ModTime: at, Uid: 77, Gid: 77}
		content := ""
		switch {
		case strings.Contains(e, "=>"):
			h.Name, h.Linkname, _ = strings.Cut(e, "=>")
			h.Typeflag = tar.TypeLink
		case strings.Contains(e, "->"):
			h.Name, h.Linkname, _ = strings.Cut(e, "->")
			h.Typeflag = tar.TypeSymlink
		case strings.HasSuffix(e, "/"):
			h.Name, h.Typeflag, h.Mode = e, tar.TypeDir, 0o750
		case strings.HasSuffix(e, "|"):
			h.Name, h.Typeflag = strings.TrimSuffix(e, "|"), tar.TypeFifo
		default:
			h.Name, content, _ = strings.Cut(e, "=")
			h.Typeflag, h.Size = tar.TypeReg, int64(len(content))
		}
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func (a *agent) copyIn(t *testing.T, archive []byte, pairs ...string) (int, string) {
	t.Helper()
	q := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		q.Set(pairs[i], pairs[i+1])
	}
	status, body, _ := a.do(t, http.MethodPost, "/copy?"+q.Encode(), bytes.NewReader(archive))
	return status, body
}

// treeOf lists what is below dir: path, mode, owner, content or target.
func treeOf(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		must(t, err)
		rel, err := filepath.Rel(dir, path)
		must(t, err)
		info, err := d.Info()
		must(t, err)
		if rel == "." {
			return nil
		}
		st, _ := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%s %v %d:%d", rel, info.Mode(), st.Uid, st.Gid)
		switch {
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path)
			must(t, err)
			b.WriteString(" " + string(text))
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			must(t, err)
			b.WriteString(" -> " + to)
		}
		b.WriteString("\n")
		return nil
	})
	must(t, err)
	return b.String()
}

func TestCopy(t *testing.T) {
	needRoot(t)
	app := []string{"app/", "app/a=1", "app/sub/", "app/sub/b=2", "app/l->sub/b", "app/h=>app/a", "other=3"}
	for name, test := range map[string]struct {
		entries []string
		query   []string
		before  func(home string)
		want    string
	}{
		"file to file": {
			[]string{"a=1"}, []string{"src", "a", "dest", "x/b"}, nil, "x drwxr-xr-x 0:0\nx/b -rw-r--r-- 0:0 1\n",
		},
		"file to directory": {
			[]string{"d/a=1"}, []string{"src", "d/a", "dest", "x/"}, nil, "x drwxr-xr-x 0:0\nx/a -rw-r--r-- 0:0 1\n",
		},
		"file into an existing directory": {
			[]string{"a=1"},
			[]string{"src", "a", "dest", "x"},
			func(home string) { must(t, os.Mkdir(filepath.Join(home, "x"), 0o700)) },
			"x drwx------ 0:0\nx/a -rw-r--r-- 0:0 1\n",
		},
		"directory": {
			app,
			[]string{"src", "app", "dest", "x"},
			nil,
			"x drwxr-xr-x 0:0\nx/a -rw-r--r-- 0:0 1\nx/h -rw-r--r-- 0:0 1\nx/l Lrwxrwxrwx 0:0 -> sub/b\nx/sub drwxr-x--- 0:0\nx/sub/b -rw-r--r-- 0:0 2\n",
		},
		"directories merge": {
			app,
			[]string{"src", "app/", "dest", "x"},
			func(home string) {
				must(t, os.MkdirAll(filepath.Join(home, "x/sub"), 0o711))
				must(t, os.WriteFile(filepath.Join(home, "x/sub/old"), []byte("o"), 0o600))
				must(t, os.WriteFile(filepath.Join(home, "x/sub/b"), []byte("o"), 0o600))
			},
			"x drwx--x--x 0:0\nx/a -rw-r--r-- 0:0 1\nx/h -rw-r--r-- 0:0 1\nx/l Lrwxrwxrwx 0:0 -> sub/b\nx/sub drwx--x--x 0:0\nx/sub/b -rw-r--r-- 0:0 2\nx/sub/old -rw------- 0:0 o\n",
		},
		"everything": {
			[]string{"./", "./a=1", "d/b=2"},
			[]string{"src", ".", "dest", "x"},
			nil,
			"x drwxr-xr-x 0:0\nx/a -rw-r--r-- 0:0 1\nx/d drwxr-xr-x 0:0\nx/d/b -rw-r--r-- 0:0 2\n",
		},
		"pattern": {
			[]string{"d/a.txt=1", "d/b.txt=2"},
			[]string{"src", "d/*.txt", "dest", "x"},
			nil,
			"x drwxr-xr-x 0:0\nx/a.txt -rw-r--r-- 0:0 1\nx/b.txt -rw-r--r-- 0:0 2\n",
		},
		"owner and mode": {
			[]string{"d/", "d/a=1"},
			[]string{"src", "d", "dest", "x", "owner", "nobody:extra", "mode", "4711"},
			nil,
			"x drwxr-xr-x 65534:4711\nx/a urwx--x--x 65534:4711 1\n",
		},
		"owner by number": {
			[]string{"a=1"}, []string{"src", "a", "dest", "y", "owner", "42"}, nil, "y -rw-r--r-- 42:42 1\n",
		},
		"a file replaces a link": {
			[]string{"a=1"},
			[]string{"src", "a", "dest", "y"},
			func(home string) { must(t, os.Symlink("/etc/hosts", filepath.Join(home, "y"))) }, "y -rw-r--r-- 0:0 1\n",
		},
		"below the working directory": {
			[]string{"a=1"}, []string{"src", "a", "dest", ".", "workdir", "~/w"}, nil, "w drwxr-xr-x 0:0\nw/a -rw-r--r-- 0:0 1\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t)
			if test.before != nil {
				test.before(a.home)
			}
			status, body := a.copyIn(t, tarOf(t, test.entries...), test.query...)
			if status != http.StatusNoContent {
				t.Fatalf("status %d: %s", status, body)
			}
			if diff := cmp.Diff(test.want, treeOf(t, a.home)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestCopyGzip(t *testing.T) {
	a := newAgent(t)
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(tarOf(t, "a=1"))
	must(t, err)
	must(t, z.Close())
	if status, body := a.copyIn(t, b.Bytes(), "src", "a", "dest", "b"); status != http.StatusNoContent {
		t.Fatalf("status %d: %s", status, body)
	}
	info, err := os.Stat(filepath.Join(a.home, "b"))
	if err != nil || info.ModTime().Unix() != 1_000_000_000 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestCopyRefuses(t *testing.T) {
	a := newAgent(t)
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.Mkdir(outside, 0o755))
	for name, test := range map[string]struct {
		entries []string
		query   []string
		want    string
	}{
		"no match":                                 {[]string{"a=1"}, []string{"src", "b", "dest", "x"}, "the archive has no 'b'"},
		"out of the context":                       {[]string{"a=1"}, []string{"src", "../a", "dest", "x"}, "leads out"},
		"out of the archive":                       {[]string{"../a=1"}, []string{"src", "a", "dest", "x"}, "leads out"},
		"through a link":                           {[]string{"l->" + outside, "l/a=1"}, []string{"src", ".", "dest", "x"}, "escapes"},
		"through a link above":                     {[]string{"l->../../..", "l/a=1"}, []string{"src", ".", "dest", "x"}, "escapes"},
		"a hard link outside":                      {[]string{"d/h=>../../etc/passwd"}, []string{"src", "d", "dest", "x"}, "leads out"},
		"a hard link to a file that is not copied": {[]string{"a=1", "d/h=>a"}, []string{"src", "d", "dest", "x"}, "not copied"},
		"a pipe inside":                            {[]string{"d/p|"}, []string{"src", "d", "dest", "x"}, "only files"},
		"a directory in place of one":              {[]string{"f=1", "f/"}, []string{"src", ".", "dest", "x"}, "not a directory"},
		"no destination":                           {nil, []string{"src", "a"}, "destination"},
		"no owner":                                 {nil, []string{"src", "a", "dest", "x", "owner", "who"}, "no user"},
		"no group":                                 {nil, []string{"src", "a", "dest", "x", "owner", ":who"}, "no group"},
		"no mode":                                  {nil, []string{"src", "a", "dest", "x", "mode", "9"}, "octal"},
		"no user":                                  {nil, []string{"src", "a", "dest", "x", "user", "who"}, "who"},
	} {
		status, body := a.copyIn(t, tarOf(t, test.entries...), test.query...)
		if status/100 != 4 && status != http.StatusInternalServerError || !strings.Contains(body, test.want) {
			t.Errorf("%s: status %d: %s", name, status, body)
		}
	}
	if status, body := a.copyIn(t, []byte("no archive"), "src", "a", "dest", "x"); status != http.StatusBadRequest {
		t.Errorf("no archive: status %d: %s", status, body)
	}
	if got := treeOf(t, outside); got != "" {
		t.Errorf("written outside: %s", got)
	}
}

func TestNewAccounts(t *testing.T) {
	needRoot(t)
	a := newAgent(t)
	must(t, os.WriteFile(filepath.Join(a.root, "etc/shadow"), []byte("root:*:::::::"), 0o640))
	ensure := func(name string) string {
		t.Helper()
		status, body, _ := a.do(t, http.MethodPost, "/accounts", strings.NewReader(`{"user":"`+name+`"}`))
		return fmt.Sprint(status, " ", strings.TrimSpace(body))
	}
	for _, test := range [][2]string{
		{"app", `200 {"user":"app","uid":1000,"gid":1000,"home":"/home/app","created":true}`},
		{"app", `200 {"user":"app","uid":1000,"gid":1000,"home":"/home/app","created":false}`},
		{"extra", `200 {"user":"extra","uid":1001,"gid":4711,"home":"/home/extra","created":true}`},
		{"2000", `200 {"user":"u2000","uid":2000,"gid":2000,"home":"/home/u2000","created":true}`},
		{"2000", `200 {"user":"u2000","uid":2000,"gid":2000,"home":"/home/u2000","created":false}`},
		{"nobody", `200 {"user":"nobody","uid":65534,"gid":65534,"home":"/nonexistent","created":false}`},
	} {
		if got := ensure(test[0]); got != test[1] {
			t.Errorf("%s: %s", test[0], got)
		}
	}
	for _, bad := range []string{"", "a b", "a:b", "-x", "../x", strings.Repeat("x", 33)} {
		if got := ensure(bad); !strings.HasPrefix(got, "400") {
			t.Errorf("%q: %s", bad, got)
		}
	}
	want := "app drwxr-xr-x 1000:1000\nextra drwxr-xr-x 1001:4711\nu2000 drwxr-xr-x 2000:2000\nuser drwxr-xr-x 0:0\n"
	if diff := cmp.Diff(want, treeOf(t, filepath.Join(a.root, "home"))); diff != "" {
		t.Errorf("homes (-want +got):\n%s", diff)
	}
	shadow, err := os.ReadFile(filepath.Join(a.root, "etc/shadow"))
	must(t, err)
	if got := string(shadow); !strings.HasPrefix(got, "root:*:::::::\napp:*:") || strings.Count(got, "\n") != 4 {
		t.Errorf("shadow: %q", got)
	}
}

func TestMissingDefaultUser(t *testing.T) {
	a := newAgent(t)
	must(t, os.Remove(filepath.Join(a.root, "etc/passwd")))
	if acc, err := a.account(""); err != nil || acc.name != "root" || acc.home != "/" {
		t.Errorf("no accounts at all: %+v, %v", acc, err)
	}
	must(t, os.WriteFile(filepath.Join(a.root, "etc/passwd"), []byte("root:x:0:0::/root:/bin/sh\n"), 0o600))
	if acc, err := a.account(""); err != nil || acc.home != "/root" {
		t.Errorf("root alone: %+v, %v", acc, err)
	}
	if _, err := a.account("user"); err == nil {
		t.Error("a user who is named must exist")
	}
}

func FuzzCopy(f *testing.F) {
	f.Add(tarOf(f, "a=1", "d/", "d/b=2"), ".", "x")
	f.Add(tarOf(f, "l->..", "l/a=1", "l/l->/", "l/l/b=1"), ".", "x/")
	f.Add(tarOf(f, "d/h=>d/a", "d/p|"), "d/*", "x")
	f.Fuzz(func(t *testing.T, archive []byte, src, dest string) {
		top := t.TempDir()
		source, err := parseCopySource(src)
		if err != nil || strings.ContainsRune(dest, 0) || len(dest) > 100 {
			return
		}
		inner := filepath.Join(top, "inner")
		c := &copyRequest{source: source, dest: filepath.Join(inner, filepath.Clean("/"+dest)), dir: strings.HasSuffix(dest, "/"), mode: -1}
		_ = c.extract(bytes.NewReader(archive))
		left, err := os.ReadDir(top)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range left {
			if e.Name() != "inner" {
				t.Errorf("%q was made outside", e.Name())
			}
		}
	})
}
