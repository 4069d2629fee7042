package binary

import (
	"bytes"
	"compress/gzip"
	"strings"
	"testing"
	"testing/fstest"
)

func TestRead(t *testing.T) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write([]byte("packed")); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	files := fstest.MapFS{
		"bin/cloister-guest-amd64":    {Data: []byte("plain")},
		"bin/cloister-guest-arm64.gz": {Data: packed.Bytes()},
		"bin/cloister-guest-bad.gz":   {Data: []byte("x")},
	}
	for arch, want := range map[string]string{"amd64": "plain", "arm64": "packed"} {
		if got, err := read(files, arch); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", arch, got, err, want)
		}
	}
	for arch, want := range map[string]string{"bad": "unpack", "riscv64": "make build"} {
		if _, err := read(files, arch); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", arch, err, want)
		}
	}
}

// What a build left behind must be an executable; a clean checkout must say how to get one.
func TestBytes(t *testing.T) {
	got, err := Bytes()
	if err != nil && !strings.Contains(err.Error(), "make build") {
		t.Error(err)
	}
	if err == nil && !bytes.HasPrefix(got, []byte("\x7fELF")) {
		t.Errorf("not an executable: %.16q", got)
	}
}
