package gvisor

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/engine"
)

// describeLayer returns what a layer holds, one line per entry.
func describeLayer(tb testing.TB, file string) []string {
	tb.Helper()
	f, err := os.Open(file)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var out []string
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			tb.Fatalf("after %v: %v", out, err)
		}
		line := fmt.Sprintf("%c %o %d:%d %s", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Name)
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		if h.Typeflag == tar.TypeReg {
			content, err := io.ReadAll(tr)
			if err != nil {
				tb.Fatal(err)
			}
			zeros := len(content) - len(bytes.TrimLeft(content, "\x00"))
			line += fmt.Sprintf(" %d zeros, %.10q", zeros, content[zeros:])
		}
		if h.ModTime.Unix() < 1e9 {
			line += fmt.Sprintf(" at %d", h.ModTime.Unix())
		}
		if v := h.PAXRecords[opaqueXattr]; v != "" {
			line += " opaque"
		}
		if v := h.PAXRecords[paxXattr+"user.color"]; v != "" {
			line += " user.color=" + v
		}
		out = append(out, line)
	}
}

func TestSaveLayer(t *testing.T) {
	p := newPlace(t)
	e := p.open(t)
	s, w := p.servingIn(t, e, 0)
	for _, do := range []string{
		"write /etc/new 3", "chown 7 8 /etc/new", "chmod 04711 /etc/new", "times 1000 /etc/new", "link /etc/new /etc/alias",
		"symlink /etc/keep /etc/sym", "xattr user.color blue /etc/keep", "rm /etc/gone",
		"rmall /srv/d", "mkdir /srv/d", "write /srv/d/fresh 1", "fifo /tmp/pipe", "sparse 3000000 /tmp/sparse",
	} {
		if got := w.ask(t, do); got != "<nil>" && !strings.HasSuffix(got, " ok") {
			t.Fatalf("%s: %s", do, got)
		}
	}
	w.ask(t, "tick /tmp/ticks") // it goes on while the layer is written
	dir, saved := p.save(t, e, s.ID, engine.SaveSpec{Kind: engine.SaveLayer})
	if saved.Bytes <= 0 || saved.Bytes > 1<<20 {
		t.Errorf("got %+v, want that zeros occupy nothing", saved)
	}
	got := slices.DeleteFunc(describeLayer(t, filepath.Join(dir, engine.LayerFile)), func(l string) bool {
		return strings.Contains(l, "/ticks")
	})
	want := []string{
		"5 755 0:0 etc/",
		"0 600 0:0 etc/.wh.gone 0 zeros, \"\"",
		"0 4711 7:8 etc/alias 1 zeros, \"\\a\\x0e\" at 1000",
		"0 755 0:0 etc/keep 0 zeros, \"keep\" at 0 user.color=blue",
		"1 4711 7:8 etc/new -> etc/alias at 1000",
		"2 777 0:0 etc/sym -> /etc/keep",
		"5 755 0:0 srv/",
		"5 755 0:0 srv/d/",
		"0 600 0:0 srv/d/.wh..wh..opq 0 zeros, \"\"",
		"0 644 0:0 srv/d/fresh 1 zeros, \"\"",
		"5 755 0:0 tmp/",
		"6 644 0:0 tmp/pipe",
		"0 644 0:0 tmp/sparse 2999999 zeros, \"x\"",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("got %v, %v, want the layer alone", entries, err)
	}
	before := w.ask(t, "sum /tmp/ticks")
	await(t, "the guest goes on", func() bool { return w.ask(t, "sum /tmp/ticks") != before })
	w.ask(t, "write /etc/.wh.odd 1")
	if _, err := e.Save(testContext(t), s.ID, engine.SaveSpec{Kind: engine.SaveLayer, Dir: t.TempDir()}); err == nil ||
		!strings.Contains(err.Error(), ".wh.odd") {
		t.Errorf("a name that means a deletion: got %v", err)
	}
	if got := w.ask(t, "host"); got != "box-1" {
		t.Errorf("after a failed save: %s", got)
	}
}

// sampleTree returns an archive like those of the sentry.
func sampleTree(tb testing.TB, kind int) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	content := append(binary.LittleEndian.AppendUint64(nil, 5000), make([]byte, segmentBytes)...)
	binary.NativeEndian.PutUint64(content[16:], 4096) // the end of the one segment
	for _, h := range [][]*tar.Header{
		{{Typeflag: tar.TypeDir, Name: "./"}, {Typeflag: tar.TypeReg, Name: "./a", Size: int64(len(content))}},
		{{Typeflag: tar.TypeReg, Name: "./b", Size: int64(len(content))}, {Typeflag: tar.TypeLink, Name: "./a", Linkname: "./b"}},
		{
			{Typeflag: tar.TypeDir, Name: "./d/", PAXRecords: map[string]string{opaqueXattr: "y"}},
			{Typeflag: tar.TypeChar, Name: "./gone"},
			{Typeflag: tar.TypeSymlink, Name: "./s", Linkname: "../../x"},
		},
	}[kind] {
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(content); err != nil {
				tb.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// readLayerNames returns the names in a layer.
func readLayerNames(tb testing.TB, f *os.File) map[string]bool {
	tb.Helper()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		tb.Fatal(err)
	}
	out := map[string]bool{}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			tb.Fatalf("the layer cannot be read: %v", err)
		}
		out[h.Name] = true
	}
}
