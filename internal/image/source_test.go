package image

import (
	"errors"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestParseSource(t *testing.T) {
	for text, want := range map[string]Source{
		"python:3.13":                   {KindRegistry, "python:3.13"},
		"docker://debian:bookworm":      {KindRegistry, "debian:bookworm"},
		"localhost:5000/base":           {KindRegistry, "localhost:5000/base"},
		"ghcr.io/a/b@sha256:" + hex64(): {KindRegistry, "ghcr.io/a/b@sha256:" + hex64()},
		"registry:5000/x":               {KindRegistry, "registry:5000/x"},
		"debian:bookworm":               {KindDebian, "bookworm"},
		"oci:/srv/layout/":              {KindOCI, "/srv/layout"},
		"docker-archive:/srv/a.tar":     {KindDockerArchive, "/srv/a.tar"},
		"dir:/srv/../root":              {KindDir, "/root"},
	} {
		got, err := ParseSource(text)
		if err != nil || got != want {
			t.Errorf("ParseSource(%q) = %v, %v; want %v", text, got, err, want)
		}
		if again, err := ParseSource(got.String()); err != nil || again != got {
			t.Errorf("ParseSource(%q) = %v, %v; want %v", got.String(), again, err, got)
		}
	}
	for _, text := range []string{
		"", "debian:", "debian:--help", "debian:Bookworm", "debian:a/b", "dir:relative", "oci:", "docker-archive:x.tar",
		"UPPER/case", "docker://", "a b", "x\x00y", strings.Repeat("x", 5000), "dir:/x\x00",
	} {
		if got, err := ParseSource(text); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("ParseSource(%.40q) = %v, %v; want ErrInvalid", text, got, err)
		}
	}
}

func hex64() string { return strings.Repeat("0123456789abcdef", 4) }

func FuzzParseSource(f *testing.F) {
	for _, s := range []string{"debian:bookworm", "python:3", "dir:/x", "docker://a@sha256:" + hex64(), "oci:/a:b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		src, err := ParseSource(text)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Fatalf("ParseSource(%q): %v", text, err)
			}
			return
		}
		if again, err := ParseSource(src.String()); err != nil || again != src {
			t.Fatalf("ParseSource(%q) = %v, but of its string %v, %v", text, src, again, err)
		}
	})
}
