package image

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// composed makes a base and an image with two layers on it.
func composed(t *testing.T, s *Store) Image {
	t.Helper()
	under := base(t, s)
	r := s.NewRecorder()
	defer closeTest(t, r)
	one := record(t, r, "opt/", "", "opt/.wh.drop", "", "app/main.py", "print()", "usr/bin/python3", "py")
	two := record(t, r, "opt/", "", "opt/.wh.drop", "", "app/main.py", "print(2)", "usr/bin/python3", "py", "etc/ssh/ssh_host_key", "k")
	img, err := s.Compose(t.Context(), under.Digest, []string{one, two}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func pushRequest(digest, to string) PushRequest {
	return PushRequest{
		Digest: digest, Destination: to, Env: map[string]string{"B": "2", "A": "1 = one"}, User: "app", WorkDir: "/app",
		StartCommand: "python main.py", ReadyCommand: "true",
		Resources: sandbox.Resources{MilliCPU: 2000, MemoryBytes: 1 << 30, DiskBytes: 5 << 30},
	}
}

// counting counts what is sent to a registry, and can fail.
type counting struct {
	http.Handler
	blobs, failures atomic.Int32
	// broken is how many requests get a 503 first.
	broken atomic.Int32
}

func (c *counting) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c.broken.Load() > 0 && r.Method == http.MethodPatch {
		c.broken.Add(-1)
		c.failures.Add(1)
		http.Error(w, "not now", http.StatusServiceUnavailable)
		return
	}
	if r.Method == http.MethodPatch {
		c.blobs.Add(1)
	}
	c.Handler.ServeHTTP(w, r)
}

// TestPushRoundTrip pushes a composed image to all that can be pushed to, and builds it again elsewhere.
func TestPushRoundTrip(t *testing.T) {
	s := newStore(t, nil)
	img := composed(t, s)
	want := describe(t, s, img.Digest)
	host := serve(t, quietRegistry())
	dir := t.TempDir()
	for _, to := range []string{
		host + "/template:1", "docker://" + host + "/template:2", "oci:" + dir + "/layout", "oci:" + dir + "/layout.tar",
		"docker-archive:" + dir + "/docker.tar",
	} {
		t.Run(strings.NewReplacer(dir, "", host, "").Replace(to), func(t *testing.T) {
			var mu sync.Mutex
			var last Progress
			see := func(p Progress) {
				if !mu.TryLock() {
					t.Error("two reports at once")
					return
				}
				defer mu.Unlock()
				if p.Fraction < last.Fraction || p.Step != "push" {
					t.Errorf("progress %+v after %+v", p, last)
				}
				last = p
			}
			if err := s.Push(t.Context(), pushRequest(img.Digest, to), see); err != nil {
				t.Fatal(err)
			}
			if last.Fraction != 1 {
				t.Errorf("the last progress is %+v", last)
			}
			elsewhere := newStore(t, nil)
			got, err := elsewhere.Build(t.Context(), Request{Sources: []string{to}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, describe(t, elsewhere, got.Digest)); diff != "" {
				t.Errorf("files (-pushed +built):\n%s", diff)
			}
			if got.Digest != img.Digest {
				t.Errorf("image %s, want %s", got.Digest, img.Digest)
			}
			config := RunConfig{
				Env: []string{"A=1 = one", "B=2"}, User: "app", WorkDir: "/app",
				Labels: map[string]string{
					LabelRootFS: rootFSRules, LabelStart: "python main.py", LabelReady: "true", LabelCPU: "2000",
					LabelMemory: "1073741824", LabelDisk: "5368709120",
				},
			}
			if diff := cmp.Diff(config, got.Config); diff != "" {
				t.Errorf("configuration (-want +got):\n%s", diff)
			}
			assertNoLeftovers(t, elsewhere)
		})
	}
	assertNoLeftovers(t, s)
}

func TestPushSendsOnlyWhatIsMissing(t *testing.T) {
	s := newStore(t, nil)
	img := composed(t, s)
	c := &counting{Handler: quietRegistry()}
	to := serve(t, c) + "/template:1"
	push := func(r PushRequest) int32 {
		t.Helper()
		before := c.blobs.Load()
		if err := s.Push(t.Context(), r, nil); err != nil {
			t.Fatal(err)
		}
		return c.blobs.Load() - before
	}
	if n := push(pushRequest(img.Digest, to)); n != 4 {
		t.Errorf("%d blobs were sent, want 3 layers and a configuration", n)
	}
	if n := push(pushRequest(img.Digest, to)); n != 0 {
		t.Errorf("%d blobs were sent again", n)
	}
	other := pushRequest(img.Digest, to)
	other.StartCommand = "another"
	if n := push(other); n != 1 {
		t.Errorf("%d blobs were sent, want the other configuration alone", n)
	}
	if n := push(pushRequest(img.Base, to)); n != 1 {
		t.Errorf("%d blobs were sent for the base, want a configuration alone", n)
	}
	// What is remembered of a layer is not enough for a registry that has nothing.
	c.Handler = quietRegistry()
	if n := push(pushRequest(img.Digest, to)); n != 4 {
		t.Errorf("%d blobs were sent to an empty registry", n)
	}
}

func TestPushWithoutItsParts(t *testing.T) {
	s := newStore(t, nil)
	img := composed(t, s)
	if err := errors.Join(s.Remove(t.Context(), img.Base)); err != nil {
		t.Fatal(err)
	}
	c := &counting{Handler: quietRegistry()}
	to := serve(t, c) + "/template:1"
	if err := s.Push(t.Context(), pushRequest(img.Digest, to), nil); err != nil {
		t.Fatal(err)
	}
	if n := c.blobs.Load(); n != 2 {
		t.Errorf("%d blobs were sent, want one layer and a configuration", n)
	}
	got, err := newStore(t, nil).Build(t.Context(), Request{Sources: []string{to}}, nil)
	if err != nil || got.Digest != img.Digest {
		t.Errorf("built again: %s, %v; want %s", got.Digest, err, img.Digest)
	}
}

func TestPushTriesAgain(t *testing.T) {
	s := newStore(t, nil)
	img := composed(t, s)
	c := &counting{Handler: quietRegistry()}
	c.broken.Store(2)
	if err := s.Push(t.Context(), pushRequest(img.Digest, serve(t, c)+"/template:1"), nil); err != nil {
		t.Error(err)
	}
	if c.failures.Load() != 2 {
		t.Errorf("%d requests failed, want 2", c.failures.Load())
	}
	c.broken.Store(1000)
	c.Handler = quietRegistry()
	if err := s.Push(t.Context(), pushRequest(img.Digest, serve(t, c)+"/template:1"), nil); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("a registry that stays broken: %v", err)
	}
	assertNoLeftovers(t, s)
}

func TestPushRefuses(t *testing.T) {
	s := newStore(t, nil)
	img := base(t, s)
	host := serve(t, basicAuth(quietRegistry(), "me", "secret"))
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*PushRequest)
		want   error
	}{
		{"no image", func(r *PushRequest) { r.Digest = "sha256:" + hex64() }, sandbox.ErrNotFound},
		{"no digest", func(r *PushRequest) { r.Digest = "x" }, sandbox.ErrInvalid},
		{"no destination", func(r *PushRequest) { r.Destination = "" }, sandbox.ErrInvalid},
		{"a directory", func(r *PushRequest) { r.Destination = "dir:" + dir }, sandbox.ErrInvalid},
		{"a suite", func(r *PushRequest) { r.Destination = "debian:bookworm" }, sandbox.ErrInvalid},
		{"a relative path", func(r *PushRequest) { r.Destination = "oci:x" }, sandbox.ErrInvalid},
		{"a directory of other things", func(r *PushRequest) { r.Destination = "oci:" + dir }, sandbox.ErrConflict},
		{"a path, where only registries may be", func(r *PushRequest) {
			r.Destination, r.RegistryOnly = "oci:"+dir+"/new", true
		}, sandbox.ErrDenied},
		{"a variable without a name", func(r *PushRequest) { r.Env = map[string]string{"": "x"} }, sandbox.ErrInvalid},
		{"a wrong password", func(r *PushRequest) { r.Username, r.Password = "me", "wrong" }, sandbox.ErrDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := pushRequest(img.Digest, host+"/template:1")
			tt.change(&r)
			if err := s.Push(t.Context(), r, nil); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	r := pushRequest(img.Digest, host+"/template:1")
	r.Username, r.Password = "me", "secret"
	if err := s.Push(t.Context(), r, nil); err != nil {
		t.Errorf("the right password: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left in the directory: %v, %v", left, err)
	}
	assertNoLeftovers(t, s)
}

func TestCancelledPush(t *testing.T) {
	s := newStore(t, nil)
	img := composed(t, s)
	dir := t.TempDir()
	for _, to := range []string{serve(t, quietRegistry()) + "/template:1", "oci:" + dir + "/layout.tar", "docker-archive:" + dir + "/docker.tar"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		if err := s.Push(ctx, pushRequest(img.Digest, to), func(Progress) { cancel(errGone) }); !errors.Is(err, errGone) {
			t.Errorf("%s: %v", to, err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left in the directory: %v, %v", left, err)
	}
	assertNoLeftovers(t, s)
}

func TestRegistryOnly(t *testing.T) {
	s := newStore(t, nil)
	for _, source := range []string{"dir:/", "oci:/x", "docker-archive:/x.tar", "debian:bookworm"} {
		r := Request{Sources: []string{"docker://localhost:1/x", source}, RegistryOnly: true}
		if _, err := s.Build(t.Context(), r, nil); !errors.Is(err, sandbox.ErrDenied) {
			t.Errorf("%s: %v", source, err)
		}
	}
	host := serve(t, quietRegistry())
	if _, err := s.Build(t.Context(), Request{Sources: []string{push(t, host, "app:1", testImage(t))}, RegistryOnly: true}, nil); err != nil {
		t.Errorf("a registry: %v", err)
	}
}
