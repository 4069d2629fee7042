package e2e_test

import (
	"archive/tar"
	"bytes"
	"crypto/subtle"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cloister-dev/cloister/test/harness"
)

// reader may read the closed registry.
const reader, password = "reader", "open-sesame"

// registries starts a registry for everybody and one with a password, each with a small image, and returns the variables
// by which the tests find them.
func registries(t *testing.T) []string {
	t.Helper()
	img := tinyImage(t)
	open := serve(t, registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo))))
	push(t, open+"/tiny:latest", img, authn.Anonymous)
	closed := serve(t, guarded(registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))))
	push(t, closed+"/team/tiny:v1", img, &authn.Basic{Username: reader, Password: password})
	return []string{"E2E_REGISTRY=" + open, "E2E_PRIVATE_REGISTRY=" + closed, "E2E_PRIVATE_PASSWORD=" + password}
}

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// guarded lets nobody in without the password.
func guarded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, given, _ := r.BasicAuth()
		if user != reader || subtle.ConstantTimeCompare([]byte(given), []byte(password)) != 1 {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func push(t *testing.T, ref string, img v1.Image, auth authn.Authenticator) {
	t.Helper()
	to, err := name.ParseReference(ref, name.Insecure)
	if err == nil {
		err = remote.Write(to, img, remote.WithAuth(auth), remote.WithContext(t.Context()))
	}
	if err != nil {
		t.Fatalf("push %s: %v", ref, err)
	}
}

// tinyImage is a tiny tree with a second layer, which hides a file of the first one.
func tinyImage(t *testing.T) v1.Image {
	t.Helper()
	tree := harness.TinyTree(t)
	if err := os.WriteFile(filepath.Join(tree, "gone"), []byte("layer one\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	second := t.TempDir()
	for file, text := range map[string]string{".wh.gone": "", "from-image": "layer two\n"} {
		if err := os.WriteFile(filepath.Join(second, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	img, err := mutate.AppendLayers(empty.Image, layer(t, tree), layer(t, second))
	if err == nil {
		img, err = mutate.Config(img, v1.Config{Env: []string{"PATH=/bin:/usr/bin", "FROM_IMAGE=yes"}, User: "nobody", WorkingDir: "/nowhere"})
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// layer packs a directory.
func layer(t *testing.T, dir string) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		return addFile(w, dir, path, e)
	})
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func addFile(w *tar.Writer, dir, path string, e fs.DirEntry) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	h, err := tar.FileInfoHeader(info, "")
	if err != nil {
		return err
	}
	if h.Name, err = filepath.Rel(dir, path); err != nil {
		return err
	}
	if err := w.WriteHeader(h); err != nil || !info.Mode().IsRegular() {
		return err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("pack %s: %w", path, err)
	}
	_, err = w.Write(text)
	return err
}
