package image

import (
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Kind is what a source is.
type Kind string

// The kinds of source. All but KindRegistry read this machine's files or run its programs: a caller that takes sources
// from users of the API must allow only KindRegistry.
const (
	KindRegistry      Kind = "registry"
	KindOCI           Kind = "oci"
	KindDockerArchive Kind = "docker-archive"
	KindDir           Kind = "dir"
	KindDebian        Kind = "debian"
)

const maxSource = 4096

// Source is one place that a root file system can come from.
type Source struct {
	Kind Kind
	// Ref is a registry reference, an absolute path or a suite.
	Ref string
}

// String is what ParseSource reads.
func (s Source) String() string {
	if s.Kind == KindRegistry {
		return "docker://" + s.Ref
	}
	return string(s.Kind) + ":" + s.Ref
}

// ParseSource reads a source: "oci:PATH" (a layout directory or a tar of one), "docker-archive:PATH" (what docker save
// writes), "dir:PATH", "debian:SUITE" (through debootstrap), else a registry reference such as "python:3.13" or
// "localhost:5000/base". Paths are absolute. "docker://" before a reference says that it is one: the image
// "debian:bookworm" is "docker://debian:bookworm", for without it that is the suite.
func ParseSource(text string) (Source, error) {
	if len(text) > maxSource || strings.ContainsRune(text, 0) {
		return Source{}, sandbox.Invalidf("image source %.64q... has %d bytes or a zero byte; at most %d bytes are allowed",
			text, len(text), maxSource)
	}
	kind, ref, _ := strings.Cut(text, ":")
	switch kind := Kind(kind); kind {
	case KindOCI, KindDockerArchive, KindDir:
		if !filepath.IsAbs(ref) {
			return Source{}, sandbox.Invalidf("image source %q: %q is not an absolute path", text, ref)
		}
		return Source{Kind: kind, Ref: filepath.Clean(ref)}, nil
	case KindDebian:
		if !isSuite(ref) {
			return Source{}, sandbox.Invalidf("image source %q: %q is not a Debian suite; \"debian:bookworm\" would be right",
				text, ref)
		}
		return Source{Kind: KindDebian, Ref: ref}, nil
	case KindRegistry: // no prefix of its own: the first part of a reference such as "registry:5000/base"
	}
	ref = strings.TrimPrefix(text, "docker://")
	if _, err := name.ParseReference(ref); err != nil {
		return Source{}, sandbox.Invalidf("image source %q is no image reference (%v), nor does it begin with oci:, "+
			"docker-archive:, dir: or debian:", text, err)
	}
	return Source{Kind: KindRegistry, Ref: ref}, nil
}

func isSuite(s string) bool {
	return regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`).MatchString(s)
}

func parseSources(texts []string) ([]Source, error) {
	if len(texts) == 0 {
		return nil, sandbox.Invalidf("an image needs at least one source")
	}
	sources := make([]Source, 0, len(texts))
	for _, text := range texts {
		s, err := ParseSource(text)
		if err != nil {
			return nil, err
		}
		sources = append(sources, s)
	}
	return sources, nil
}
