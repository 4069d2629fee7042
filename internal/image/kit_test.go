package image

import (
	"archive/tar"
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	reader "gvisor.dev/gvisor/pkg/erofs"
)

func newStore(t *testing.T, change func(*Config)) *Store {
	t.Helper()
	cfg := Config{Dir: filepath.Join(t.TempDir(), "store"), Guest: func() ([]byte, error) { return []byte("guest agent"), nil }}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tarOf makes a layer of name -> contents; names that end in a slash are directories.
func tarOf(tb testing.TB, files ...string) []byte {
	tb.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := 0; i < len(files); i += 2 {
		hdr := &tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1])), ModTime: time.Unix(1_700_000_000, 0)}
		if strings.HasSuffix(files[i], "/") {
			hdr.Mode = 0o755
		}
		if err := w.WriteHeader(hdr); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.WriteString(w, files[i+1]); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

// zstdLayer is a layer compressed with zstd, which the library cannot make.
type zstdLayer struct{ plain, packed []byte }

func newZstdLayer(t *testing.T, plain []byte) v1.Layer {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := partial.CompressedToLayer(&zstdLayer{plain, enc.EncodeAll(plain, nil)})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (z *zstdLayer) DiffID() (v1.Hash, error) { return v1.NewHash(digestOf(z.plain)) }
func (z *zstdLayer) Digest() (v1.Hash, error) { return v1.NewHash(digestOf(z.packed)) }
func (z *zstdLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(z.packed)), nil
}
func (z *zstdLayer) Size() (int64, error)                { return int64(len(z.packed)), nil }
func (z *zstdLayer) MediaType() (types.MediaType, error) { return types.OCILayerZStd, nil }

func gzipLayer(t *testing.T, plain []byte) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(plain)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// testImage has two layers and says how to run.
func testImage(t *testing.T, layers ...v1.Layer) v1.Image {
	t.Helper()
	if layers == nil {
		layers = []v1.Layer{
			gzipLayer(t, tarOf(t, "etc/", "", "etc/passwd", "root:x:0:0::/root:/bin/sh\n", "gone", "x", "usr/bin/python3", "py")),
			newZstdLayer(t, tarOf(t, ".wh.gone", "", "app/main.py", "print()")),
		}
	}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", runtime.GOARCH
	cfg.Config = v1.Config{
		Env: []string{"A=b"}, User: "app", WorkingDir: "/app", Entrypoint: []string{"python"}, Cmd: []string{"main.py"},
	}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	return img
}

// paths lists what an image in the cache has.
func paths(t *testing.T, s *Store, digest string) []string {
	t.Helper()
	var all []string
	walkImage(t, s, digest, func(at string, _ *reader.Inode) { all = append(all, at) })
	slices.Sort(all)
	return all
}

func walkImage(t *testing.T, s *Store, digest string, see func(string, *reader.Inode)) {
	t.Helper()
	p, err := s.Path(digest)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	img, err := reader.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	var visit func(string, uint64)
	visit = func(at string, nid uint64) {
		ino, err := img.Inode(nid)
		if err != nil {
			t.Fatal(err)
		}
		see(at, &ino)
		if !ino.IsDir() {
			return
		}
		if err := ino.IterDirents(func(name string, _ uint8, child uint64) error {
			if name != "." && name != ".." {
				visit(at+"/"+name, child)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	visit("", img.RootNid())
}

// imageFile returns a file's contents and inode.
func imageFile(t *testing.T, s *Store, digest, want string) (string, *reader.Inode) {
	t.Helper()
	var data string
	var found *reader.Inode
	walkImage(t, s, digest, func(at string, ino *reader.Inode) {
		if at != want {
			return
		}
		copied := *ino
		found = &copied
		if ino.IsSymlink() {
			data, _ = ino.Readlink()
		} else if ranges, err := ino.DataRanges(); err == nil && ino.IsRegular() {
			data = string(ranges[0].Bytes)
		}
	})
	return data, found
}

func basicAuth(next http.Handler, user, password string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.Header().Set("Www-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func push(t *testing.T, host, repo string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	auth := remote.WithAuth(authn.FromConfig(authn.AuthConfig{Username: "me", Password: "secret"}))
	if err := remote.Write(ref, img, auth, remote.WithTransport(transport)); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

func quietRegistry() http.Handler {
	return registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)))
}
