package tree

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// file, dir, link, hard and sym are the entries that most layers have.
func file(name, body string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, PAXRecords: map[string]string{"body": body}}
}

func dir(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }

func hard(to, name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
}

func sym(to, name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}
}

func layerOf(tb testing.TB, entries ...tar.Header) []byte {
	tb.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, hdr := range entries {
		body := hdr.PAXRecords["body"]
		hdr.PAXRecords = nil
		hdr.Size = int64(len(body))
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

func newSpool(t *testing.T) *Spool {
	t.Helper()
	s, err := NewSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func apply(t *testing.T, tr *Tree, layers ...[]byte) error {
	t.Helper()
	spool := newSpool(t)
	for _, l := range layers {
		if err := tr.ApplyLayer(t.Context(), bytes.NewReader(l), spool); err != nil {
			return err
		}
	}
	return nil
}

// list shows a tree as path -> what is there.
func list(t *testing.T, tr *Tree) map[string]string {
	t.Helper()
	all := map[string]string{}
	var visit func(string, *Node)
	visit = func(at string, n *Node) {
		switch n.Type() {
		case unix.S_IFDIR:
			all[at] = "dir"
		case unix.S_IFLNK:
			all[at] = "-> " + n.Target
		case unix.S_IFREG:
			all[at] = "\"" + read(t, n) + "\""
		default:
			all[at] = fmt.Sprintf("%o %x", n.Type(), n.Rdev)
		}
		for _, name := range n.Names() {
			visit(path.Join(at, name), n.Child(name))
		}
	}
	visit("/", tr.Root)
	delete(all, "/")
	return all
}

func read(t *testing.T, n *Node) string {
	t.Helper()
	if n.Content == nil {
		return ""
	}
	r, err := n.Content.Open()
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestApplyLayer(t *testing.T) {
	tests := []struct {
		name   string
		layers [][]tar.Header
		want   map[string]string
	}{
		{
			"later layers win",
			[][]tar.Header{{file("a", "1"), file("b", "1")}, {file("./a", "2"), file("/c", "2")}},
			map[string]string{"/a": `"2"`, "/b": `"1"`, "/c": `"2"`},
		},
		{
			"missing parents are made",
			[][]tar.Header{{file("x/y/z", "1")}},
			map[string]string{"/x": "dir", "/x/y": "dir", "/x/y/z": `"1"`},
		},
		{
			"a directory entry keeps what is below",
			[][]tar.Header{{file("d/a", "1")}, {dir("d/"), file("d/b", "2")}},
			map[string]string{"/d": "dir", "/d/a": `"1"`, "/d/b": `"2"`},
		},
		{
			"a file replaces a directory and all below",
			[][]tar.Header{{file("d/a", "1")}, {file("d", "2")}},
			map[string]string{"/d": `"2"`},
		},
		{
			"a whiteout hides a file and a tree",
			[][]tar.Header{{file("a", "1"), file("d/x/y", "1"), file("k", "1")}, {file(".wh.a", ""), file(".wh.d", "")}},
			map[string]string{"/k": `"1"`},
		},
		{
			"a whiteout does not hide what its own layer adds",
			[][]tar.Header{{file("a", "1"), file("d/x", "1")}, {file("a", "2"), file("d/y", "2"), file(".wh.a", ""), file(".wh.d", "")}},
			map[string]string{"/a": `"2"`, "/d": "dir", "/d/y": `"2"`},
		},
		{
			"an opaque directory hides what earlier layers have, whichever comes first",
			[][]tar.Header{
				{file("d/x", "1"), file("e/x", "1"), file("e/s/x", "1")},
				{file("d/.wh..wh..opq", ""), file("d/y", "2"), file("e/y", "2"), file("e/s/y", "2"), file("e/.wh..wh..opq", "")},
			},
			map[string]string{"/d": "dir", "/d/y": `"2"`, "/e": "dir", "/e/y": `"2"`, "/e/s": "dir", "/e/s/y": `"2"`},
		},
		{
			"aufs bookkeeping is left out",
			[][]tar.Header{{file(".wh..wh.plnk", "x"), file(".wh..wh.orph/a", "x")}},
			map[string]string{},
		},
		{
			"a hard link leads to an earlier layer's file and survives its replacement",
			[][]tar.Header{{file("a", "1")}, {hard("a", "b"), file("a", "2")}, {file(".wh.a", "")}},
			map[string]string{"/b": `"1"`},
		},
		{
			"parents are followed through links",
			[][]tar.Header{{sym("usr/lib", "lib"), file("lib/a", "1")}, {file("lib/b", "2")}},
			map[string]string{"/lib": "-> usr/lib", "/usr": "dir", "/usr/lib": "dir", "/usr/lib/a": `"1"`, "/usr/lib/b": `"2"`},
		},
		{
			"links cannot lead out",
			[][]tar.Header{{sym("../../../..", "up"), file("up/a", "1"), sym("/../../etc", "abs"), file("abs/b", "1")}},
			map[string]string{"/up": "-> ../../../..", "/a": `"1"`, "/abs": "-> /../../etc", "/etc": "dir", "/etc/b": `"1"`},
		},
		{
			"a link at the end is replaced",
			[][]tar.Header{{sym("/etc/passwd", "a"), file("etc/passwd", "1")}, {file("a", "2")}},
			map[string]string{"/a": `"2"`, "/etc": "dir", "/etc/passwd": `"1"`},
		},
		{
			"devices and pipes",
			[][]tar.Header{{
				{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3},
				{Typeflag: tar.TypeBlock, Name: "big", Devmajor: 259, Devminor: 0x12345},
				{Typeflag: tar.TypeFifo, Name: "pipe"},
			}},
			map[string]string{"/null": "20000 103", "/big": "60000 12310345", "/pipe": "10000 0"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tr := New(DefaultLimits())
			var layers [][]byte
			for _, l := range tt.layers {
				layers = append(layers, layerOf(t, l...))
			}
			spool := newSpool(t)
			for _, l := range layers {
				if err := tr.ApplyLayer(t.Context(), bytes.NewReader(l), spool); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(tt.want, list(t, tr)); diff != "" {
				t.Errorf("tree (-want +got):\n%s", diff)
			}
		})
	}
}

func TestApplyLayerRefuses(t *testing.T) {
	long := strings.Repeat("n", 256)
	tests := []struct {
		name  string
		layer []byte
	}{
		{"two dots", layerOf(t, file("../a", "1"))},
		{"two dots inside", layerOf(t, file("a/../../b", "1"))},
		{"a file as parent", layerOf(t, file("a", "1"), file("a/b", "1"))},
		{"a link to a file as parent", layerOf(t, file("a", "1"), sym("a", "l"), file("l/b", "1"))},
		{"a loop", layerOf(t, sym("b", "a"), sym("a", "b"), file("a/x", "1"))},
		{"a long name", layerOf(t, file(long, "1"))},
		{"a long directory name", layerOf(t, file(long+"/a", "1"))},
		{"a long path", layerOf(t, file(strings.Repeat("d/", 3000)+"f", "1"))},
		{"a deep path", layerOf(t, file(strings.Repeat("d/", 1500)+"f", "1"))},
		{"an empty link target", layerOf(t, sym("", "a"))},
		{"a long link target", layerOf(t, sym(strings.Repeat("x", 5000), "a"))},
		{"a hard link to nothing", layerOf(t, hard("nothing", "a"))},
		{"a hard link to a directory", layerOf(t, dir("d"), hard("d", "a"))},
		{"a hard link to the root", layerOf(t, hard("/", "a"))},
		{"a whiteout of nothing", layerOf(t, file(".wh.", ""))},
		{"a root that is a link", layerOf(t, sym("x", "."))},
		{"a directory named like a whiteout", layerOf(t, sym(".wh.a", "l"), file("l/b", "1"))},
		{"a device out of range", layerOf(t, tar.Header{Typeflag: tar.TypeChar, Name: "d", Devmajor: 5000})},
		{"a negative owner", layerOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: -2, Format: tar.FormatGNU})},
		{"an unknown type", layerOf(t, tar.Header{Typeflag: 'V', Name: "f"})},
		{"half an archive", layerOf(t, file("a", strings.Repeat("x", 2000)))[:1500]},
		{"no archive", bytes.Repeat([]byte("no tar "), 1000)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := apply(t, New(DefaultLimits()), tt.layer); !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("got %v, want ErrInvalid", err)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	if err := apply(t, New(Limits{Entries: 3, Bytes: 100}), layerOf(t, file("a/b/c/d", "1"))); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("too many entries: %v", err)
	}
	one := layerOf(t, file("a", strings.Repeat("x", 60)))
	if err := apply(t, New(Limits{Entries: 9, Bytes: 100}), one, one); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("too many bytes: %v", err)
	}
}

func TestAttributes(t *testing.T) {
	when := time.Unix(1_600_000_000, 123_456_789)
	hdr := tar.Header{
		Typeflag: tar.TypeReg, Name: "f", Mode: 0o6755, Uid: 70_000, Gid: 3_000_000_000, ModTime: when, Format: tar.FormatPAX,
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"},
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := errors.Join(w.WriteHeader(&hdr), w.Close()); err != nil {
		t.Fatal(err)
	}
	tr := New(DefaultLimits())
	if err := apply(t, tr, buf.Bytes()); err != nil {
		t.Fatal(err)
	}
	got := *tr.Lookup("/f")
	want := Node{Mode: unix.S_IFREG | 0o6755, UID: 70_000, GID: 3_000_000_000, Sec: when.Unix(), Nsec: 123_456_789}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(Node{})); diff != "" {
		t.Errorf("node (-want +got):\n%s", diff)
	}
	if tr.DroppedXattrs() != 1 {
		t.Errorf("dropped %d extended attributes, want 1", tr.DroppedXattrs())
	}
}

func TestAddDir(t *testing.T) {
	d := t.TempDir()
	write := func(name, body string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(d, name), []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a", "1")
	write("empty", "")
	l, err := net.Listen("unix", filepath.Join(d, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	for _, err := range []error{
		os.Link(filepath.Join(d, "a"), filepath.Join(d, "b")),
		os.Symlink("/nowhere", filepath.Join(d, "l")),
		os.MkdirAll(filepath.Join(d, "x/y"), 0o700),
		unix.Mkfifo(filepath.Join(d, "pipe"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(d)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = root.Close() }()
	tr := New(DefaultLimits())
	if _, err := tr.AddDir(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"/a": `"1"`, "/b": `"1"`, "/empty": `""`, "/l": "-> /nowhere", "/x": "dir", "/x/y": "dir", "/pipe": "10000 0",
		"/sock": "140000 0",
	}
	if diff := cmp.Diff(want, list(t, tr)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	if tr.Lookup("/a") != tr.Lookup("/b") {
		t.Error("hard links became different files")
	}

	write("a", "changed")
	if _, err := tr.Lookup("/a").Content.Open(); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("open a file that changed: %v", err)
	}
	if err := os.Remove(filepath.Join(d, "a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(d, "a")); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Lookup("/a").Content.Open(); err == nil {
		t.Error("a file that became a link was opened")
	}
}

func TestWriteTarRoundTrip(t *testing.T) {
	tr := New(DefaultLimits())
	err := apply(t, tr, layerOf(t, dir("./"), file("a", "1"), hard("a", "d/b"), sym("a", "l"), file("empty", ""),
		tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 259, Devminor: 0x12345},
		tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o600, Uid: 70_000}))
	if err != nil {
		t.Fatal(err)
	}
	tr = New(DefaultLimits())
	spool := newSpool(t)
	first := layerOf(t, file("x", "1"), hard("x", "y"), sym("x", "l"), file("d/e/f", "2"),
		tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o4666, Devmajor: 259, Devminor: 0x12345, Gid: 70_000})
	if err := tr.ApplyLayer(t.Context(), bytes.NewReader(first), spool); err != nil {
		t.Fatal(err)
	}
	var once, twice bytes.Buffer
	if err := tr.WriteTar(t.Context(), &once); err != nil {
		t.Fatal(err)
	}
	again := New(DefaultLimits())
	if err := again.ApplyLayer(t.Context(), bytes.NewReader(once.Bytes()), spool); err != nil {
		t.Fatal(err)
	}
	if err := again.WriteTar(t.Context(), &twice); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(once.Bytes(), twice.Bytes()) {
		t.Error("a tree read back from its archive makes another archive")
	}
	if diff := cmp.Diff(list(t, tr), list(t, again)); diff != "" {
		t.Errorf("tree (-first +second):\n%s", diff)
	}
}

func TestEdit(t *testing.T) {
	tr := New(DefaultLimits())
	attr := Attr{Perm: 0o640, UID: 1, GID: 2, Sec: 3}
	if err := tr.Symlink("../../run/resolv", "/etc/resolv.conf", attr); err != nil {
		t.Fatal(err)
	}
	if err := tr.WriteFile("/etc/resolv.conf", []byte("through"), attr); err != nil {
		t.Fatal(err)
	}
	if err := tr.ReplaceFile("/etc/other", []byte("plain"), attr); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"/etc": "dir", "/etc/resolv.conf": "-> ../../run/resolv", "/run": "dir", "/run/resolv": `"through"`, "/etc/other": `"plain"`,
	}
	if diff := cmp.Diff(want, list(t, tr)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	if err := tr.WriteFile("/etc", nil, attr); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a file in place of a directory: %v", err)
	}
	if _, _, err := tr.Mkdir("/etc/other", attr); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a directory in place of a file: %v", err)
	}
	if _, err := tr.ReadFile("/etc/other", 2); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("read a file over the limit: %v", err)
	}
	if _, err := tr.ReadFile("/etc/none", 2); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("read no file: %v", err)
	}
	tr.Remove("/etc/resolv.conf")
	tr.Remove("/nothing/here")
	tr.Clear("/run")
	if diff := cmp.Diff(map[string]string{"/etc": "dir", "/run": "dir", "/etc/other": `"plain"`}, list(t, tr)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
}

func TestWriteSparse(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "sparse")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	want := make([]byte, 64<<10)
	for _, at := range []int{0, 4095, 4096, 20_000, 40_959, 65_535} {
		want[at] = 1
	}
	for at := 0; at < len(want); { // pieces that end anywhere
		n, err := WriteSparse(f, want[at:min(at+7777, len(want))], int64(at))
		if err != nil {
			t.Fatal(err)
		}
		at += n
	}
	got, err := os.ReadFile(f.Name())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read back: %v, %d bytes, equal %v", err, len(got), bytes.Equal(got, want))
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Blocks*512 > 6*4096 {
		t.Errorf("5 blocks with something take %d bytes: %v", st.Blocks*512, err)
	}
}

func TestSpoolForgets(t *testing.T) {
	spool := newSpool(t)
	add := func(want []byte) {
		t.Helper()
		c, err := spool.Add(bytes.NewReader(want), int64(len(want)))
		if err != nil {
			t.Fatal(err)
		}
		if got := read(t, &Node{Content: c}); got != string(want) {
			t.Errorf("%d bytes are %d others", len(want), len(got))
		}
	}
	add([]byte("first"))
	mark := spool.Mark()
	add(bytes.Repeat([]byte("x"), 100_000))
	spool.Rewind(mark)
	add(make([]byte, 50_000))
	add(make([]byte, 200_000))
	add(append(make([]byte, 300_000), 1))
	spool.Rewind(mark)
	add(make([]byte, 3_000_000))
}

func FuzzApplyLayer(f *testing.F) {
	f.Add(layerOf(f, file("a", "1"), hard("a", "b"), sym("../..", "c"), file("c/d", "2"), file(".wh.a", "")), []byte{})
	f.Add(layerOf(f, file("d/x", "1")), layerOf(f, file("d/.wh..wh..opq", ""), hard("d/x", "y")))
	f.Add(layerOf(f, sym("b", "a"), sym("a", "b"), file("a/x", "1")), layerOf(f, dir("a"), sym("/", "a/a")))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		tr := New(Limits{Entries: 1000, Bytes: 1 << 20})
		spool := newSpool(t)
		for _, l := range [][]byte{first, second} {
			if err := tr.ApplyLayer(t.Context(), bytes.NewReader(l), spool); err != nil {
				return
			}
		}
		var buf bytes.Buffer
		if err := tr.WriteTar(t.Context(), &buf); err != nil {
			t.Fatalf("export what was imported: %v", err)
		}
		again := New(DefaultLimits())
		if err := again.ApplyLayer(t.Context(), &buf, spool); err != nil {
			t.Fatalf("import what was exported: %v", err)
		}
		if diff := cmp.Diff(list(t, tr), list(t, again)); diff != "" {
			t.Fatalf("tree (-first +second):\n%s", diff)
		}
	})
}
