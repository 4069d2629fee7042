package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// base builds an image from a small directory.
func base(t *testing.T, s *Store) Image {
	t.Helper()
	dir := t.TempDir()
	for name, body := range map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/os-release": "ID=test\n", "opt/keep": "kept", "opt/drop": "dropped",
		"srv/deep/er/file": strings.Repeat("deep", 5000),
	} {
		at := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(body), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	img, err := s.Build(t.Context(), Request{Sources: []string{"dir:" + dir}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// record adds an archive of name -> contents, and checks that it makes a layer.
func record(t *testing.T, r *Recorder, files ...string) string {
	t.Helper()
	l, err := r.Add(t.Context(), bytes.NewReader(tarOf(t, files...)))
	if err != nil || l.Digest == "" || l.Bytes == 0 {
		t.Fatalf("record: %+v, %v", l, err)
	}
	return l.Digest
}

// describe says what an image has, by path.
func describe(t *testing.T, s *Store, digest string) map[string]string {
	t.Helper()
	b := &build{store: s}
	tr, err := b.openImage(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, c := range b.release {
			closeTest(t, c)
		}
	}()
	return describeTree(t, tr)
}

func describeTree(t *testing.T, tr *tree.Tree) map[string]string {
	t.Helper()
	all := map[string]string{}
	first := map[*tree.Node]string{}
	var visit func(string, *tree.Node)
	visit = func(at string, n *tree.Node) {
		if first[n] == "" {
			first[n] = at
		}
		text := fmt.Sprintf("%o %d:%d %d.%09d rdev %d is %s", n.Mode, n.UID, n.GID, n.Sec, n.Nsec, n.Rdev, first[n])
		switch n.Type() {
		case unix.S_IFLNK:
			text += " -> " + n.Target
		case unix.S_IFREG:
			text += " " + digestOf(contents(t, n))
		}
		all[at] = text
		for _, name := range n.Names() {
			visit(path.Join(at, name), n.Child(name))
		}
	}
	visit("/", tr.Root)
	return all
}

func contents(t *testing.T, n *tree.Node) []byte {
	t.Helper()
	if n.Content == nil {
		return nil
	}
	r, err := n.Content.Open()
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return data
}

func TestCompose(t *testing.T) {
	s := newStore(t, nil)
	under := base(t, s)
	r := s.NewRecorder()
	defer closeTest(t, r)
	one := record(t, r, "opt/", "", "opt/.wh.drop", "", "app/main.py", "print()")
	two := record(t, r, "opt/", "", "opt/.wh.drop", "", "app/main.py", "print(2)", "etc/passwd", "mine\n")
	img, err := s.Compose(t.Context(), under.Digest, []string{one, two}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Image{
		Digest: img.Digest, Bytes: img.Bytes, Source: under.Source, GuestDigest: under.GuestDigest, CreatedAt: img.CreatedAt,
		Config: under.Config, Base: under.Digest, Layers: []string{one, two},
	}
	if diff := cmp.Diff(want, img); diff != "" {
		t.Errorf("image (-want +got):\n%s", diff)
	}
	for name, body := range map[string]string{
		"/app/main.py": "print(2)", "/etc/passwd": "mine\n", "/opt/keep": "kept", "/srv/deep/er/file": strings.Repeat("deep", 5000),
		GuestPath: "guest agent",
	} {
		got, ino := imageFile(t, s, img.Digest, name)
		if ino == nil || got != body {
			t.Errorf("%s: %.40q, want %.40q", name, got, body)
		}
	}
	if _, ino := imageFile(t, s, img.Digest, "/opt/drop"); ino != nil {
		t.Error("a file that a layer took away is there")
	}
	if err := s.Verify(t.Context(), img.Digest); err != nil {
		t.Error(err)
	}
	again, err := s.Compose(t.Context(), under.Digest, []string{one, two}, func(p Progress) { t.Errorf("made again: %+v", p) })
	if diff := cmp.Diff(img, again); err != nil || diff != "" {
		t.Errorf("again: %v\n%s", err, diff)
	}
	if same, err := s.Compose(t.Context(), under.Digest, nil, nil); err != nil || same.Digest != under.Digest {
		t.Errorf("without layers: %+v, %v", same, err)
	}
	higher, err := s.Compose(t.Context(), img.Digest, []string{one}, nil)
	if err != nil || higher.Base != img.Digest {
		t.Errorf("on a composed image: %+v, %v", higher, err)
	}
	assertNoLeftovers(t, s)
}

// TestComposedImageKeepsWhatTheNodeGave takes everything away that a sandbox needs.
func TestComposedImageKeepsWhatTheNodeGave(t *testing.T) {
	for _, tt := range []struct {
		name  string
		layer []string
	}{
		{"removed", []string{"usr/local/bin/", "", "usr/local/bin/.wh.cloister-guest", "", ".wh.tmp", "", ".wh.proc", ""}},
		{"directories removed", []string{".wh.usr", "", ".wh.etc", "", ".wh.dev", ""}},
		{"opaque", []string{"usr/local/", "", "usr/local/.wh..wh..opq", "", "etc/", "", "etc/.wh..wh..opq", ""}},
		{"replaced", []string{"usr/local/bin/cloister-guest", "mine"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t, nil)
			under := base(t, s)
			r := s.NewRecorder()
			defer closeTest(t, r)
			img, err := s.Compose(t.Context(), under.Digest, []string{record(t, r, tt.layer...)}, nil)
			if err != nil {
				t.Fatal(err)
			}
			was, is := describe(t, s, under.Digest), describe(t, s, img.Digest)
			for _, name := range []string{GuestPath, "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} {
				if diff := cmp.Diff(was[name], is[name]); diff != "" {
					t.Errorf("%s (-base +composed):\n%s", name, diff)
				}
			}
			for _, name := range []string{"/proc", "/sys", "/dev", "/tmp", "/run"} {
				if is[name] == "" {
					t.Errorf("%s is not there", name)
				}
			}
		})
	}
}

func TestComposeRefuses(t *testing.T) {
	s := newStore(t, nil)
	under := base(t, s)
	r := s.NewRecorder()
	defer closeTest(t, r)
	layer := record(t, r, "a", "1")
	none := "sha256:" + hex64()
	for _, tt := range []struct {
		name, base string
		layers     []string
		want       error
	}{
		{"no base", none, []string{layer}, sandbox.ErrNotFound},
		{"no layer", under.Digest, []string{layer, none}, sandbox.ErrNotFound},
		{"no digest", under.Digest, []string{"../../etc/passwd"}, sandbox.ErrInvalid},
		{"below the agent", under.Digest, []string{record(t, r, "usr/local/bin", "a file")}, sandbox.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if img, err := s.Compose(t.Context(), tt.base, tt.layers, nil); !errors.Is(err, tt.want) {
				t.Errorf("got %+v, %v; want %v", img, err, tt.want)
			}
		})
	}
	if all, err := s.List(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("images: %v, %v", all, err)
	}
	assertNoLeftovers(t, s)
}

// TestCancelledCompose cancels in the middle: the image is whole, or not there.
func TestCancelledCompose(t *testing.T) {
	s := newStore(t, nil)
	under := base(t, s)
	r := s.NewRecorder()
	defer closeTest(t, r)
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := s.Compose(ctx, under.Digest, []string{record(t, r, "a", "1")}, func(Progress) { cancel(errGone) })
	if err != nil && !errors.Is(err, errGone) {
		t.Errorf("cancelled: %v", err)
	}
	all, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range all {
		if err := s.Verify(t.Context(), img.Digest); err != nil {
			t.Error(err)
		}
	}
	assertNoLeftovers(t, s)
}

func TestRecorder(t *testing.T) {
	s := newStore(t, nil)
	r, other := s.NewRecorder(), s.NewRecorder()
	defer closeTest(t, r)
	defer closeTest(t, other)
	one := record(t, r, "a", "1", "run/e2b/x", "y")
	if l, err := r.Add(t.Context(), bytes.NewReader(tarOf(t, "a", "1", "run/e2b/x", "z"))); err != nil || l != (Layer{}) {
		t.Errorf("nothing changed: %+v, %v", l, err)
	}
	if _, err := r.Add(t.Context(), strings.NewReader("no archive")); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("no archive: %v", err)
	}
	if _, err := r.Add(t.Context(), bytes.NewReader(tarOf(t, "../a", "1"))); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a name that leads out: %v", err)
	}
	two := record(t, r, "a", "1", "b", "2", "run/e2b/x", "") // after errors, the recorder is as before
	if same := record(t, other, "a", "1"); same != one {
		t.Errorf("the same change gives %s, then %s", one, same)
	}
	file, err := s.openLayer(two)
	if err != nil {
		t.Fatal(err)
	}
	defer closeTest(t, file)
	tr := tar.NewReader(file)
	if hdr, err := tr.Next(); err != nil || hdr.Name != "b" {
		t.Errorf("the second layer begins with %+v, %v", hdr, err)
	}
	left, err := os.ReadDir(s.layerDir())
	if err != nil || len(left) != 2 {
		t.Errorf("layers: %v, %v", left, err)
	}
	assertNoLeftovers(t, s)
}

// TestSparseFile records and composes a file of 256 MiB that is almost all holes: a guest can make such files for nothing.
func TestSparseFile(t *testing.T) {
	s := newStore(t, nil)
	under := base(t, s)
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	const size = 256 << 20
	if err := w.WriteHeader(&tar.Header{Name: "sparse", Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, size)
	body[size/2], body[size-1] = 1, 2
	if _, err := w.Write(body); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r := s.NewRecorder()
	defer closeTest(t, r)
	for range 2 { // the second time, it is not kept again
		if _, err := r.Add(t.Context(), bytes.NewReader(archive.Bytes())); err != nil {
			t.Fatal(err)
		}
	}
	layers, err := os.ReadDir(s.layerDir())
	if err != nil || len(layers) != 1 {
		t.Fatalf("layers: %v, %v", layers, err)
	}
	img, err := s.Compose(t.Context(), under.Digest, []string{"sha256:" + layers[0].Name()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), img.Digest); err != nil {
		t.Error(err)
	}
	file, err := s.Path(img.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{file, filepath.Join(s.layerDir(), layers[0].Name())} {
		var st unix.Stat_t
		if err := unix.Stat(file, &st); err != nil {
			t.Fatal(err)
		}
		if used := st.Blocks * 512; st.Size < size || used > 8<<20 {
			t.Errorf("%s has %d bytes and takes %d", file, st.Size, used)
		}
	}
}

func stepKey(i int) string { return hashText(strconv.Itoa(i)) }

func TestSteps(t *testing.T) {
	s := newStore(t, nil)
	r := s.NewRecorder()
	defer closeTest(t, r)
	layer := record(t, r, "a", "1")
	if _, ok := s.StepLayer(stepKey(1)); ok {
		t.Error("a step is cached before it was put")
	}
	if err := errors.Join(s.PutStep(stepKey(1), layer), s.PutStep(stepKey(2), "")); err != nil {
		t.Fatal(err)
	}
	if err := s.PutStep("../../x", layer); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a key that is none: %v", err)
	}
	if err := s.PutStep(stepKey(3), "sha256:"+hex64()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a layer that is not there: %v", err)
	}
	again, err := New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Store{s, again} {
		if got, ok := s.StepLayer(stepKey(1)); !ok || got != layer {
			t.Errorf("got %q, %v; want %q", got, ok, layer)
		}
		if got, ok := s.StepLayer(stepKey(2)); !ok || got != "" {
			t.Errorf("a step that changes nothing: %q, %v", got, ok)
		}
	}
	if err := os.WriteFile(filepath.Join(s.stepDir(), stepKey(4)), []byte(`{"lay`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.StepLayer(stepKey(4)); ok {
		t.Error("a damaged record counts")
	}
	file, err := s.layerPath(layer)
	if err := errors.Join(err, os.Remove(file)); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.StepLayer(stepKey(1)); ok {
		t.Error("a step without its layer counts")
	}
	if err := again.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(s.stepDir()); err != nil || len(left) != 1 {
		t.Errorf("Recover left %v, %v; want the whole record alone", left, err)
	}
}

func TestPrune(t *testing.T) {
	s := newStore(t, nil)
	under := base(t, s)
	r := s.NewRecorder()
	defer closeTest(t, r)
	layers := []string{
		record(t, r, "image", "1"), record(t, r, "image-and-step", "1"), record(t, r, "step", "1"), record(t, r, "new", "1"),
		record(t, r, "used", "1"),
	}
	img, err := s.Compose(t.Context(), under.Digest, layers[:2], nil)
	if err := errors.Join(err, s.PutStep(stepKey(1), layers[1]), s.PutStep(stepKey(2), layers[2])); err != nil {
		t.Fatal(err)
	}
	have := func(when string, want ...int) {
		t.Helper()
		var got []int
		for i, layer := range layers {
			if s.hasLayer(layer) {
				got = append(got, i)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s, layers (-want +got):\n%s", when, diff)
		}
	}
	prune := func(inUse ...string) {
		t.Helper()
		if err := s.Prune(t.Context(), inUse); err != nil {
			t.Fatal(err)
		}
	}
	prune()
	have("all is needed or new", 0, 1, 2, 3, 4)
	s.fresh[layers[3]] = time.Now().Add(-2 * freshFor)
	s.fresh[layers[4]] = time.Now().Add(-2 * freshFor)
	prune(layers[4])
	have("one is old and needed by nothing", 0, 1, 2, 4)
	prune()
	have("none is in use", 0, 1, 2)
	if err := s.Remove(t.Context(), img.Digest); err != nil {
		t.Fatal(err)
	}
	prune()
	have("the image is gone", 1, 2)
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(filepath.Join(s.stepDir(), stepKey(2)), old, old); err != nil {
		t.Fatal(err)
	}
	s.cfg.CacheBytes = s.layerBytes(layers[1])
	prune()
	have("there is room for one step", 1)
	if _, ok := s.StepLayer(stepKey(2)); ok {
		t.Error("the step that was used last is not the one that stayed")
	}
	if left, err := os.ReadDir(s.composedDir()); err != nil || len(left) != 0 {
		t.Errorf("what is remembered of an image that is gone: %v, %v", left, err)
	}
}

func TestChooseSteps(t *testing.T) {
	at := func(i int) time.Time { return time.Unix(int64(i), 0) }
	cost := func(layer string) int64 { return int64(len(layer)) }
	steps := []cachedStep{{"a", "xxx", at(1)}, {"b", "yy", at(3)}, {"c", "yy", at(2)}, {"d", "", at(0)}, {"e", "z", at(4)}}
	keep, drop := chooseSteps(steps, 3, cost)
	names := func(steps []cachedStep) string {
		var all strings.Builder
		for _, step := range steps {
			all.WriteString(step.key)
		}
		return all.String()
	}
	if names(keep) != "ebcd" || names(drop) != "a" {
		t.Errorf("kept %s, dropped %s", names(keep), names(drop))
	}
	many := make([]cachedStep, maxSteps+2)
	for i := range many {
		many[i] = cachedStep{key: stepKey(i), used: at(i)}
	}
	if keep, drop := chooseSteps(many, 0, cost); len(keep) != maxSteps || len(drop) != 2 || !drop[1].used.Equal(at(0)) {
		t.Errorf("kept %d, dropped %d", len(keep), len(drop))
	}
}
