package auth

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestJoinToken(t *testing.T) {
	a := newAuthority(t)
	made, err := NewJoinToken(a.Fingerprint())
	if err != nil {
		t.Fatal(err)
	}
	read, err := ParseJoinToken("  " + made.Text + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(made, read); diff != "" {
		t.Error(diff)
	}
	secret := made.Text[strings.LastIndexByte(made.Text, '.')+1:]
	if made.Hash != Hash(secret) || made.Fingerprint != a.Fingerprint() {
		t.Errorf("hash %s, fingerprint %s", made.Hash, made.Fingerprint)
	}
	if out := fmt.Sprintf("%v %+v %#v %s", made, made, made, made); strings.Contains(out, secret) {
		t.Errorf("formatting shows the secret: %s", out)
	}
	id, hash, err := a.ReadToken(made.Text)
	if err != nil || id != made.ID || hash != made.Hash {
		t.Errorf("%s, %s, %v", id, hash, err)
	}
	if _, _, err := newAuthority(t).ReadToken(made.Text); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "of another cluster") {
		t.Errorf("another cluster: %v", err)
	}
}

func TestParseJoinTokenRefusals(t *testing.T) {
	f, id, secret := strings.Repeat("a", 64), strings.Repeat("b", 12), strings.Repeat("c", 40)
	for text, want := range map[string]string{
		"":                                  "empty",
		"e2b_1234":                          "API key",
		"v2." + f + "." + id + "." + secret: `begins with "v2"`,
		"v1." + f + "." + id:                "3 parts",
		"v1." + f + "." + id + "." + secret + ".x":           "5 parts",
		"v1." + f[1:] + "." + id + "." + secret:              "fingerprint has 63",
		"v1." + f + ".." + secret:                            "id has 0",
		"v1." + f + "." + id + "." + secret[:20]:             "secret has 20",
		"v1." + f + "." + id + "." + strings.ToUpper(secret): "0-9 and a-f",
	} {
		_, err := ParseJoinToken(text)
		if !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want ErrInvalid with %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), secret[:20]) {
			t.Errorf("%q: the error shows the secret: %v", text, err)
		}
	}
}

func FuzzParseJoinToken(f *testing.F) {
	f.Add("v1." + strings.Repeat("a", 64) + "." + strings.Repeat("b", 12) + "." + strings.Repeat("c", 40))
	f.Add("v1...")
	f.Add("e2b_")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseJoinToken(text)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		again, err := ParseJoinToken(got.Text)
		if err != nil || again != got || len(got.Text) != 2+1+64+1+12+1+40 {
			t.Errorf("%q: %v, %v", text, again, err)
		}
	})
}
