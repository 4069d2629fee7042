package agent

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// tarball is a gzipped archive with one file.
func tarball(tb testing.TB) []byte {
	tb.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	err := w.WriteHeader(&tar.Header{Name: "a.txt", Typeflag: tar.TypeReg, Mode: 0o644, Size: 1})
	if err == nil {
		_, err = w.Write([]byte("a"))
	}
	if err = errors.Join(err, w.Close(), z.Close()); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func TestPutFile(t *testing.T) {
	m := newMachine(t)
	newShop(m)
	n := m.boot()
	data := tarball(t)
	put := func(offset int, part []byte, complete bool) (int64, bool, error) {
		resp, err := n.PutFile(t.Context(), &agentv1.PutFileRequest{Hash: "h", Offset: int64(offset), Data: part, Complete: complete})
		return resp.GetBytes(), resp.GetComplete(), err
	}
	check := func(what string, size int, complete bool) func(int64, bool, error) {
		return func(got int64, whole bool, err error) {
			t.Helper()
			if err != nil || got != int64(size) || whole != complete {
				t.Errorf("%s: %d bytes, complete %v, %v", what, got, whole, err)
			}
		}
	}
	check("nothing", 0, false)(put(0, nil, false))
	check("a part", 10, false)(put(0, data[:10], false))
	check("asked", 10, false)(put(0, nil, false))
	if _, _, err := put(20, data[20:], true); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("a gap: %v", err)
	}
	n.down()
	n = m.boot()
	check("after a restart", 10, false)(put(0, nil, false))
	check("the rest", len(data), true)(put(10, data[10:], true))
	check("asked for what is there", len(data), true)(put(0, nil, false))
	check("put once more", len(data), true)(put(0, []byte("other"), true))
	if got, err := os.ReadFile(filepath.Join(m.cfg.FilesDir, "h"+fileSuffix)); err != nil || !bytes.Equal(got, data) {
		t.Errorf("stored: %v", err)
	}
	for name, req := range map[string]*agentv1.PutFileRequest{
		"hash":    {Hash: "../x", Data: data},
		"offset":  {Hash: "x", Offset: -1, Data: data},
		"size":    {Hash: "x", Offset: maxFileBytes, Data: data},
		"damaged": {Hash: "x", Data: data[:len(data)-4], Complete: true},
		"no tar":  {Hash: "x", Data: bytes.Repeat([]byte("x"), 2000), Complete: true},
	} {
		if _, err := n.PutFile(t.Context(), req); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	old := time.Now().Add(-2 * fileUnused)
	if err := os.Chtimes(filepath.Join(m.cfg.FilesDir, "h"+fileSuffix), old, old); err != nil {
		t.Fatal(err)
	}
	n.upload("h2")
	check("unused for long", 0, false)(put(0, nil, false))
}

func FuzzCheckArchive(f *testing.F) {
	whole := tarball(f)
	f.Add(whole)
	f.Add(whole[:len(whole)-3])
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := checkArchive(bytes.NewReader(data)); err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Error(err)
		}
	})
}

func TestRecoverBuildFiles(t *testing.T) {
	m := newMachine(t)
	newShop(m)
	half := filepath.Join(m.cfg.FilesDir, layersDir, "step-1")
	if err := os.MkdirAll(half, 0o700); err != nil {
		t.Fatal(err)
	}
	m.boot()
	if _, err := os.Stat(half); err == nil {
		t.Error("a half-made layer is left")
	}
}
