package control

import (
	"errors"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestParseName(t *testing.T) {
	tests := []struct{ in, want string }{
		{"base", "base"},
		{"Base", "base"},
		{"base:default", "base"},
		{"base:V1", "base:V1"},
		{"team/base", "team/base"},
		{"team/base:v1.2", "team/base:v1.2"},
		{"a", "a"},
		{"code-interpreter-v1", "code-interpreter-v1"},
		{"x_y.z", "x_y.z"},
	}
	for _, tt := range tests {
		if got, err := ParseName(tt.in); err != nil || got.String() != tt.want {
			t.Errorf("%q: %q, %v", tt.in, got, err)
		}
	}
	for _, in := range []string{"", ":", "a:", ":a", "/", "a/", "/a", "a/b/c", "a b", "-a", "a-", "a:b:c", "../a", "a/..", "ä", strings.Repeat("a", 129)} {
		if got, err := ParseName(in); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q was read as %q, %v", in, got, err)
		}
	}
}

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"base", "team/base:v1", "A/B:C", "a..b", "a/b/c", ":"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseName(s)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) || len(err.Error()) > 1000 {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		again, err := ParseName(n.String())
		if err != nil || again != n {
			t.Fatalf("%q is read as %+v and then as %+v, %v", s, n, again, err)
		}
	})
}

func FuzzNextToken(f *testing.F) {
	f.Add(formatNext(place{at: 1_763_640_000_000_000_000, id: "iaaaaaabbbbbbbbbbbbb"}))
	f.Add("AQ")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parseNext(s)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if again, err := parseNext(formatNext(p)); err != nil || again != p {
			t.Fatalf("%q is read as %+v and then as %+v, %v", s, p, again, err)
		}
	})
}
