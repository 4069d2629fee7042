package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestBuildFromRegistry(t *testing.T) {
	host := serve(t, basicAuth(quietRegistry(), "me", "secret"))
	ref := push(t, host, "team/app:1", testImage(t))
	s := newStore(t, nil)
	var steps []string
	last := 0.0
	img, err := s.Build(t.Context(), Request{Sources: []string{ref}, Username: "me", Password: "secret"}, func(p Progress) {
		if len(steps) == 0 || steps[len(steps)-1] != p.Step {
			steps = append(steps, p.Step)
		}
		if p.Fraction < last {
			t.Errorf("progress went back from %f to %f", last, p.Fraction)
		}
		last = p.Fraction
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"source", "pull", "unpack", "finalize", "pack"}, steps); diff != "" || last != 1 {
		t.Errorf("steps, ending at %f (-want +got):\n%s", last, diff)
	}
	wantConfig := RunConfig{
		Env: []string{"A=b"}, User: "app", WorkDir: "/app", Entrypoint: []string{"python"}, Cmd: []string{"main.py"},
	}
	if diff := cmp.Diff(wantConfig, img.Config); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	if !strings.Contains(img.Resolved, "@sha256:") || img.GuestDigest != digestOf([]byte("guest agent")) {
		t.Errorf("image %+v", img)
	}
	have := paths(t, s, img.Digest)
	if slices.Contains(have, "/gone") || !slices.Contains(have, "/app/main.py") {
		t.Errorf("paths %v", have)
	}
	if err := s.Verify(t.Context(), img.Digest); err != nil {
		t.Error(err)
	}

	for want, req := range map[error]Request{
		sandbox.ErrDenied:   {Sources: []string{ref}, Username: "me", Password: "wrong"},
		sandbox.ErrNotFound: {Sources: []string{host + "/team/none:1"}, Username: "me", Password: "secret"},
		sandbox.ErrInvalid:  {Sources: []string{"NOT A REFERENCE"}},
	} {
		if _, err := s.Build(t.Context(), req, nil); !errors.Is(err, want) {
			t.Errorf("Build(%+v): %v, want %v", req, err, want)
		}
	}
	assertNoLeftovers(t, s)
}

// assertNoLeftovers checks that no attempt left anything behind.
func assertNoLeftovers(t *testing.T, s *Store) {
	t.Helper()
	left, err := os.ReadDir(s.tempDir())
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestSameImageFromEverySource saves one image in every way and expects one digest.
func TestSameImageFromEverySource(t *testing.T) {
	img := testImage(t)
	dir := t.TempDir()
	lay, err := layout.Write(filepath.Join(dir, "layout"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := lay.AppendImage(img, layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH})); err != nil {
		t.Fatal(err)
	}
	other := v1.Platform{OS: "linux", Architecture: "s390x"}
	if err := lay.AppendImage(empty.Image, layout.WithPlatform(other)); err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewTag("example.com/app:1")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "docker.tar")
	if err := tarball.WriteToFile(archive, ref, img); err != nil {
		t.Fatal(err)
	}
	packDir(t, filepath.Join(dir, "layout"), filepath.Join(dir, "layout.tar"))
	gzipFile(t, archive, filepath.Join(dir, "docker.tar.gz"))
	gzipFile(t, filepath.Join(dir, "layout.tar"), filepath.Join(dir, "layout.tar.gz"))
	host := serve(t, quietRegistry())

	s := newStore(t, nil)
	digests := map[string]string{}
	for _, source := range []string{
		push(t, host, "app:1", img), "oci:" + filepath.Join(dir, "layout"), "oci:" + filepath.Join(dir, "layout.tar"),
		"oci:" + filepath.Join(dir, "layout.tar.gz"), "docker-archive:" + archive, "docker-archive:" + archive + ".gz",
	} {
		built, err := s.Build(t.Context(), Request{Sources: []string{source}}, nil)
		if err != nil {
			t.Errorf("%s: %v", source, err)
		}
		digests[built.Digest] += source + " "
	}
	if len(digests) != 1 {
		t.Errorf("digests differ: %v", digests)
	}
	assertNoLeftovers(t, s)
}

func packDir(t *testing.T, dir, to string) {
	t.Helper()
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func gzipFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(z.Close(), os.WriteFile(to, buf.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestFallback(t *testing.T) {
	silent, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0") // accepts in the kernel, never answers
	if err != nil {
		t.Fatal(err)
	}
	defer closeTest(t, silent)
	dir := t.TempDir()
	s := newStore(t, func(c *Config) { c.AnswerTimeout = 50 * time.Millisecond })
	var said []string
	img, err := s.Build(t.Context(), Request{Sources: []string{silent.Addr().String() + "/base", "oci:/nowhere", "dir:" + dir}},
		func(p Progress) { said = append(said, p.Message) })
	if err != nil {
		t.Fatal(err)
	}
	if img.Source != "dir:"+dir {
		t.Errorf("built from %s", img.Source)
	}
	text := strings.Join(said, "\n")
	for _, want := range []string{"gave no answer within 50ms; trying oci:/nowhere next", "/nowhere does not exist; trying dir:"} {
		if !strings.Contains(text, want) {
			t.Errorf("the progress does not say %q:\n%s", want, text)
		}
	}
	_, err = s.Build(t.Context(), Request{Sources: []string{silent.Addr().String() + "/base", "oci:/nowhere"}}, nil)
	if !errors.Is(err, sandbox.ErrUnavailable) || !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("two failures give %v", err)
	}
	assertNoLeftovers(t, s)
}

func TestDamagedContainers(t *testing.T) {
	plain := tarOf(t, "a", "1")
	tests := []struct {
		name  string
		files []string
	}{
		{"no manifest", []string{"x", "y"}},
		{"a manifest that is none", []string{"manifest.json", "[{"}},
		{"no images", []string{"manifest.json", "[]"}},
		{"two images", []string{"manifest.json", `[{"RepoTags":["a"]},{"RepoTags":["b"]}]`}},
		{"a missing layer", []string{"manifest.json", `[{"Config":"c","Layers":["l"]}]`, "c", `{}`}},
		{"more layers than digests", []string{"manifest.json", `[{"Config":"c","Layers":["l"]}]`, "c", `{}`, "l", string(plain)}},
		{"another layer", []string{
			"manifest.json", `[{"Config":"c","Layers":["l"]}]`, "c",
			`{"rootfs":{"diff_ids":["sha256:` + hex64() + `"]}}`, "l", string(plain),
		}},
		{"another machine", []string{
			"manifest.json", `[{"Config":"c","Layers":["l"]}]`, "c",
			`{"architecture":"s390x","rootfs":{"diff_ids":["` + digestOf(plain) + `"]}}`, "l", string(plain),
		}},
		{"no layers", []string{"manifest.json", `[{"Config":"c"}]`, "c", `{}`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "a.tar")
			if err := os.WriteFile(file, tarOf(t, tt.files...), 0o600); err != nil {
				t.Fatal(err)
			}
			s := newStore(t, nil)
			_, err := s.Build(t.Context(), Request{Sources: []string{"docker-archive:" + file}}, nil)
			if !errors.Is(err, sandbox.ErrInvalid) && !errors.Is(err, sandbox.ErrNotFound) {
				t.Errorf("got %v", err)
			}
			assertNoLeftovers(t, s)
		})
	}
}

func TestMain(m *testing.M) {
	if runHelper() {
		return
	}
	goleak.VerifyTestMain(m)
}

var errGone = errors.New("the caller is gone")

// TestSharedBuild lets two callers wait for one build and one of them leave.
func TestSharedBuild(t *testing.T) {
	h := &holdingRegistry{Handler: quietRegistry(), reached: make(chan struct{}), release: make(chan struct{})}
	host := serve(t, h)
	ref := push(t, host, "app:1", testImage(t))
	h.hold.Store(true)
	s := newStore(t, nil)
	req := Request{Sources: []string{ref}}
	leaving, leave := context.WithCancelCause(t.Context())
	type result struct {
		img Image
		err error
	}
	left, stayed := make(chan result, 1), make(chan result, 1)
	go func() {
		img, err := s.Build(leaving, req, nil)
		left <- result{img, err}
	}()
	<-h.reached
	joined := make(chan struct{}, 1)
	go func() {
		img, err := s.Build(t.Context(), req, func(Progress) {
			select {
			case joined <- struct{}{}:
			default:
			}
		})
		stayed <- result{img, err}
	}()
	waitFor(t, func() bool { return s.waiting() == 2 })
	leave(errGone)
	if r := <-left; !errors.Is(r.err, errGone) {
		t.Errorf("the caller that left got %v", r.err)
	}
	close(h.release)
	if r := <-stayed; r.err != nil || r.img.Digest == "" {
		t.Errorf("the caller that stayed got %+v", r)
	}
	<-joined
	if n := h.layers.Load(); n != 2 {
		t.Errorf("%d layers were fetched, want those of one build, 2", n)
	}
	assertNoLeftovers(t, s)
}

// TestCancelledBuild ends a build in the middle of a layer.
func TestCancelledBuild(t *testing.T) {
	h := &holdingRegistry{Handler: quietRegistry(), reached: make(chan struct{}), release: make(chan struct{})}
	host := serve(t, h)
	ref := push(t, host, "app:1", testImage(t))
	h.hold.Store(true)
	defer close(h.release)
	s := newStore(t, nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := s.Build(ctx, Request{Sources: []string{ref, "dir:/"}}, nil)
		done <- err
	}()
	<-h.reached
	cancel(errGone)
	if err := <-done; !errors.Is(err, errGone) {
		t.Errorf("got %v", err)
	}
	assertNoLeftovers(t, s)
	if all, err := s.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("images %v, %v", all, err)
	}
}
