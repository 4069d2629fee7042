package delta

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func file(name, body string) tar.Header { return tar.Header{Name: name, Mode: 0o644, Linkname: body} }

func dir(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }

func gone(name string) tar.Header {
	at, base := path.Split(name)
	return file(at+whiteout+base, "")
}

func opaqueDir(name string) []tar.Header { return []tar.Header{dir(name), file(name+"/"+opaque, "")} }

func hard(to, name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
}

// archive makes a tar of entries; the Linkname of a regular file is its contents.
func archive(tb testing.TB, entries ...tar.Header) []byte {
	tb.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, hdr := range entries {
		body := ""
		if hdr.Typeflag == tar.TypeReg || hdr.Typeflag == 0 {
			body, hdr.Linkname = hdr.Linkname, ""
			hdr.Size = int64(len(body))
		}
		hdr.Name = "./" + hdr.Name
		if hdr.ModTime.IsZero() {
			hdr.ModTime = time.Unix(1_700_000_000, 7)
		}
		hdr.Format = tar.FormatPAX
		if err := w.WriteHeader(&hdr); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func newSpool(t *testing.T) *tree.Spool {
	t.Helper()
	s, err := tree.NewSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// recording does what the store's recorder does.
type recording struct {
	t    *testing.T
	last *Archive
}

// add returns the layer of an archive, nil when nothing changed.
func (r *recording) add(data []byte) ([]byte, error) {
	r.t.Helper()
	spool := newSpool(r.t)
	next, err := Read(r.t.Context(), bytes.NewReader(data), r.last, tree.Limits{Entries: 1000, Bytes: 1 << 20}, spool)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(r.t.TempDir(), "layer")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = f.Close() })
	n, err := next.Write(r.t.Context(), f, r.last, func(off, size int64) tree.Content {
		return tree.Extent{File: f, Off: off, Bytes: size}
	})
	if err != nil || n == 0 {
		return nil, err
	}
	r.last = next
	layer, err := os.ReadFile(f.Name())
	if err != nil {
		r.t.Fatal(err)
	}
	return layer, nil
}

func entries(t *testing.T, layer []byte) []string {
	t.Helper()
	var all []string
	for tr := tar.NewReader(bytes.NewReader(layer)); ; {
		hdr, err := tr.Next()
		if err != nil {
			return all
		}
		text := hdr.Name
		switch hdr.Typeflag {
		case tar.TypeReg:
			body, err := io.ReadAll(tr)
			if err != nil {
				t.Fatal(err)
			}
			if len(body) > 0 {
				text += "=" + string(body)
			}
		case tar.TypeLink, tar.TypeSymlink:
			text += "->" + hdr.Linkname
		}
		all = append(all, text)
	}
}

func TestLayers(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps [][]tar.Header
		want  [][]string
	}{
		{
			"nothing but what the node writes",
			[][]tar.Header{{
				dir(""), dir("run"), dir("run/e2b"), file("run/e2b/.E2B_ENVS", "x"), dir("etc"), file("etc/hosts", "h"),
				gone("etc/hostname"), file("etc/resolv.conf", "r"), dir("proc"), dir("sys"), dir("dev"), file("dev/x", "x"),
			}},
			[][]string{nil},
		},
		{
			"a file that is new, changed, gone",
			[][]tar.Header{{file("a", "1")}, {file("a", "2")}, {}, {file("a", "2")}},
			[][]string{{"a=1"}, {"a=2"}, {".wh.a"}, {"a=2"}},
		},
		{
			"only what is other",
			[][]tar.Header{{dir("d"), file("d/a", "1"), file("d/b", "1")}, {dir("d"), file("d/a", "1"), file("d/b", "2"), gone("c")}},
			[][]string{{"d/", "d/a=1", "d/b=1"}, {".wh.c", "d/b=2"}},
		},
		{
			"attributes alone",
			[][]tar.Header{{file("a", "1")}, {{Name: "a", Mode: 0o600, Linkname: "1"}}, {{Name: "a", Mode: 0o600, Linkname: "1", Uid: 5}}},
			[][]string{{"a=1"}, {"a=1"}, {"a=1"}},
		},
		{
			"a whiteout once",
			[][]tar.Header{{gone("a")}, {gone("a"), file("b", "")}, {file("a", "1"), file("b", "")}},
			[][]string{{".wh.a"}, {"b"}, {"a=1"}},
		},
		{
			"kinds that change",
			[][]tar.Header{
				{dir("a"), file("a/b", "1")},
				{file("a", "2")},
				{{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "b"}},
				opaqueDir("a"),
			},
			[][]string{{"a/", "a/b=1"}, {"a=2"}, {"a->b"}, {"a/", "a/.wh..wh..opq"}},
		},
		{
			"a directory that becomes opaque",
			[][]tar.Header{
				{dir("d"), file("d/a", "1"), file("d/b", "1")},
				append(opaqueDir("d"), file("d/a", "1")),
				append(opaqueDir("d"), file("d/c", "1")),
			},
			[][]string{{"d/", "d/a=1", "d/b=1"}, {"d/", "d/.wh..wh..opq", "d/a=1"}, {"d/.wh.a", "d/c=1"}},
		},
		{
			"hard links in any order",
			[][]tar.Header{
				{dir("d"), file("d/z", "1"), hard("./d/z", "a"), hard("d/z", "d/b")},
				{dir("d"), file("a", "1"), hard("a", "d/z"), hard("a", "d/b")},
				{dir("d"), file("a", "1"), hard("a", "d/z"), hard("a", "d/b"), hard("a", "c")},
				{dir("d"), file("a", "1"), hard("a", "c")},
			},
			[][]string{
				{"a=1", "d/", "d/b->a", "d/z->a"},
				nil,
				{"a=1", "c->a", "d/b->a", "d/z->a"},
				{"a=1", "c->a", "d/.wh.b", "d/.wh.z"},
			},
		},
		{
			"a link to what the node writes",
			[][]tar.Header{{dir("etc"), file("etc/hosts", "h")}, {dir("etc"), file("etc/hosts", "h"), hard("etc/hosts", "x")}},
			[][]string{nil, {"x=h"}},
		},
		{
			"a directory's time with and without a reason",
			[][]tar.Header{
				{dir("d"), file("d/a", "1")},
				{{Typeflag: tar.TypeDir, Name: "d", Mode: 0o755, ModTime: time.Unix(1_800_000_000, 0)}, file("d/a", "1")},
				{{Typeflag: tar.TypeDir, Name: "d", Mode: 0o755, ModTime: time.Unix(1_900_000_000, 0)}, file("d/b", "1")},
			},
			[][]string{{"d/", "d/a=1"}, nil, {"d/", "d/.wh.a", "d/b=1"}},
		},
		{
			"directories that the node touches",
			[][]tar.Header{{{Typeflag: tar.TypeDir, Name: "etc", Mode: 0o700}}, append(opaqueDir("etc"), file("etc/a", "1"))},
			[][]string{{"etc/"}, {"etc/", "etc/.wh..wh..opq", "etc/a=1"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &recording{t: t, last: Empty()}
			var layers [][]byte
			for i, step := range tt.steps {
				data := archive(t, step...)
				layer, err := r.add(data)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want[i], entries(t, layer)); diff != "" {
					t.Errorf("layer %d (-want +got):\n%s", i, diff)
				}
				if layer != nil {
					layers = append(layers, layer)
				}
				want, err := fold(t, data)
				if err != nil {
					t.Fatal(err)
				}
				got, err := fold(t, layers...)
				if diff := cmp.Diff(want, got); err != nil || diff != "" {
					t.Errorf("files after step %d: %v (-archive +layers):\n%s", i, err, diff)
				}
			}
		})
	}
}

func TestSameChangesSameLayer(t *testing.T) {
	one := archive(t, dir("d"), file("d/b", "1"), file("a", "2"), hard("d/b", "d/c"))
	two := archive(t, file("a", "2"), dir("d"), file("d/c", "1"), hard("d/c", "d/b"))
	first, err := (&recording{t: t, last: Empty()}).add(one)
	if err != nil {
		t.Fatal(err)
	}
	second, err := (&recording{t: t, last: Empty()}).add(two)
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("another layer: %v, %v", entries(t, second), err)
	}
}

func TestExtendedAttributes(t *testing.T) {
	with := func(value string) []byte {
		hdr := file("a", "1")
		hdr.PAXRecords = map[string]string{
			"SCHILY.xattr.user.x": value, "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.other": "z",
		}
		return archive(t, hdr)
	}
	r := &recording{t: t, last: Empty()}
	for _, tt := range []struct {
		value string
		other bool
	}{{"a=b\n", true}, {"a=b\n", false}, {"c", true}} {
		layer, err := r.add(with(tt.value))
		if err != nil || (layer != nil) != tt.other {
			t.Fatalf("%q: %v, %v", tt.value, entries(t, layer), err)
		}
		if layer == nil {
			continue
		}
		hdr, err := tar.NewReader(bytes.NewReader(layer)).Next()
		if err != nil {
			t.Fatal(err)
		}
		delete(hdr.PAXRecords, "mtime")
		if diff := cmp.Diff(map[string]string{"SCHILY.xattr.user.x": tt.value}, hdr.PAXRecords); diff != "" {
			t.Errorf("records (-want +got):\n%s", diff)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	many := make([]tar.Header, 0, 1001)
	for i := range 1001 {
		many = append(many, file(strconv.Itoa(i), ""))
	}
	long := strings.Repeat("n", 256)
	for name, data := range map[string][]byte{
		"no archive":             []byte(strings.Repeat("x", 1024)),
		"cut short":              archive(t, file("a", strings.Repeat("1", 4096)))[:2048],
		"dots":                   archive(t, file("a/../b", "")),
		"long name":              archive(t, file(long, "")),
		"long path":              archive(t, file(strings.Repeat("n/", 3000), "")),
		"deep":                   archive(t, file(strings.Repeat("n/", 1025)+"x", "")),
		"twice":                  archive(t, file("a", ""), file("a", "")),
		"below a file":           archive(t, file("a", ""), file("a/b", "")),
		"below a link":           archive(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: "/"}, file("a/b", "")),
		"below a whiteout":       archive(t, file(".wh.a/b", "")),
		"whiteout of nothing":    archive(t, file(".wh.", "")),
		"link to nothing":        archive(t, hard("a", "b")),
		"link to a directory":    archive(t, dir("a"), hard("a", "b")),
		"link out":               archive(t, hard("../../etc/passwd", "b")),
		"owner":                  archive(t, tar.Header{Name: "a", Uid: 1 << 32}),
		"device":                 archive(t, tar.Header{Typeflag: tar.TypeChar, Name: "a", Devmajor: 1 << 12}),
		"root that is a file":    archive(t, tar.Header{Typeflag: tar.TypeSymlink, Linkname: "a"}),
		"too many":               archive(t, many...),
		"too large":              archive(t, file("a", strings.Repeat("1", 1<<20+1))),
		"symbolic link too long": archive(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: strings.Repeat("t", 4096)}),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := (&recording{t: t, last: Empty()}).add(data); !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("got %v, want %v", err, sandbox.ErrInvalid)
			}
		})
	}
}

// fold applies layers to a tree and says what it has then, without what no layer tells: the node's own files, the
// directories that they are in, and times of directories.
func fold(t *testing.T, layers ...[]byte) (map[string]string, error) {
	t.Helper()
	tr := tree.New(tree.DefaultLimits())
	spool := newSpool(t)
	for _, layer := range layers {
		if err := tr.ApplyLayer(t.Context(), bytes.NewReader(layer), spool); err != nil {
			return nil, err
		}
	}
	all := map[string]string{}
	numbers := map[*tree.Node]string{}
	var visit func(string, *tree.Node)
	visit = func(at string, n *tree.Node) {
		if ours(at) {
			return
		}
		if numbers[n] == "" {
			numbers[n] = at
		}
		text := fmt.Sprintf("%o %d:%d %d %q same as %s", n.Mode, n.UID, n.GID, n.Rdev, n.Target, numbers[n])
		if n.IsDir() {
			text = fmt.Sprintf("%o %d:%d", n.Mode, n.UID, n.GID)
		} else {
			text += fmt.Sprintf(" %d.%d", n.Sec, n.Nsec)
		}
		if n.Content != nil {
			r, err := n.Content.Open()
			if err != nil {
				t.Fatal(err)
			}
			data, err := io.ReadAll(r)
			if err := errors.Join(err, r.Close()); err != nil {
				t.Fatal(err)
			}
			text += fmt.Sprintf(" %q", data)
		}
		if !n.IsDir() || !touched(at) {
			all[at] = text
		}
		for _, name := range n.Names() {
			visit(at+"/"+name, n.Child(name))
		}
	}
	visit("", tr.Root)
	return all, nil
}

// FuzzLayers checks that layers one by one give what the last archive alone gives.
func FuzzLayers(f *testing.F) {
	f.Add(archive(f, dir("d"), file("d/a", "1"), gone("x")), archive(f, dir("d"), file("d/b", "2"), gone("x")))
	f.Add(archive(f, dir("d"), file("d/a", "1"), hard("d/a", "b")), archive(f, append(opaqueDir("d"), file("d/a", "1"))...))
	f.Add(archive(f, dir("d"), file("d/a", "1")), archive(f, file("d", "1")))
	f.Add(archive(f, file("d", "1")), archive(f, dir("d"), file("d/a", "1"), hard("d/a", "d/b"), hard("d/a", "e")))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		r := &recording{t: t, last: Empty()}
		var layers [][]byte
		for _, data := range [][]byte{first, second} {
			layer, err := r.add(data)
			if err != nil {
				return
			}
			if layer != nil {
				layers = append(layers, layer)
			}
		}
		want, err := fold(t, second)
		if err != nil {
			return // tree is stricter about what a layer may hold
		}
		got, err := fold(t, layers...)
		if err != nil {
			t.Fatalf("the layers do not fit: %v", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("files (-last archive +layers):\n%s\nlayers: %q", diff, layers)
		}
	})
}
