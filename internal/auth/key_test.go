package auth

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestNewKey(t *testing.T) {
	form := regexp.MustCompile(`^e2b_[0-9a-f]{40}$`)
	seen := map[string]bool{}
	for range 100 {
		k, err := NewKey()
		if err != nil {
			t.Fatal(err)
		}
		if !form.MatchString(k.Secret) || seen[k.Secret] {
			t.Fatalf("key %q is not of the form, or came twice", k.Secret)
		}
		seen[k.Secret] = true
		if k.Hash != Hash(k.Secret) || len(k.Hash) != 64 {
			t.Errorf("hash %q of %q", k.Hash, k.Secret)
		}
		if want := k.Secret[:8] + "…" + k.Secret[40:]; k.Hint != want {
			t.Errorf("hint %q, want %q", k.Hint, want)
		}
		if out := fmt.Sprintf("%v %+v %#v %s", k, k, k, k); strings.Contains(out, k.Secret) {
			t.Errorf("formatting shows the secret: %s", out)
		}
	}
}

func TestHash(t *testing.T) {
	const want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // FIPS 180-4, example of "abc"
	if got := Hash("abc"); got != want {
		t.Errorf("Hash(abc) = %s, want %s", got, want)
	}
}

func TestFromRequest(t *testing.T) {
	tests := map[string]struct {
		header http.Header
		want   string // empty means refused
	}{
		"api key":               {http.Header{"X-Api-Key": {"e2b_1"}}, "e2b_1"},
		"bearer":                {http.Header{"Authorization": {"Bearer e2b_1"}}, "e2b_1"},
		"bearer, other case":    {http.Header{"Authorization": {"bEARER  e2b_1 "}}, "e2b_1"},
		"api key goes first":    {http.Header{"X-Api-Key": {"a"}, "Authorization": {"Bearer b"}}, "a"},
		"empty api key":         {http.Header{"X-Api-Key": {""}, "Authorization": {"Bearer b"}}, "b"},
		"none":                  {http.Header{}, ""},
		"basic":                 {http.Header{"Authorization": {"Basic dXNlcjo="}}, ""},
		"bearer of nothing":     {http.Header{"Authorization": {"Bearer "}}, ""},
		"two api keys":          {http.Header{"X-Api-Key": {"a", "b"}}, ""},
		"two authorizations":    {http.Header{"Authorization": {"Bearer a", "Bearer b"}}, ""},
		"spaces":                {http.Header{"X-Api-Key": {"  "}}, ""},
		"space within":          {http.Header{"X-Api-Key": {"a b"}}, ""},
		"control":               {http.Header{"X-Api-Key": {"a\x00"}}, ""},
		"not ASCII":             {http.Header{"X-Api-Key": {"ключ"}}, ""},
		"too long":              {http.Header{"X-Api-Key": {strings.Repeat("a", maxSecret+1)}}, ""},
		"as long as it may be":  {http.Header{"X-Api-Key": {strings.Repeat("a", maxSecret)}}, strings.Repeat("a", maxSecret)},
		"bad key, good bearer":  {http.Header{"X-Api-Key": {"a b"}, "Authorization": {"Bearer b"}}, ""},
		"spaces around a value": {http.Header{"X-Api-Key": {" e2b_1 "}}, "e2b_1"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := FromRequest(tt.header)
			if got != tt.want || (tt.want == "") != errors.Is(err, sandbox.ErrDenied) {
				t.Errorf("FromRequest = %q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

func FuzzFromRequest(f *testing.F) {
	f.Add("e2b_0123", "Bearer x")
	f.Add("", "bearer\te2b_1")
	f.Add("a\x00b", "Basic dTpw")
	f.Fuzz(func(t *testing.T, key, authorization string) {
		h := http.Header{}
		h.Set("X-API-KEY", key)
		h.Set("Authorization", authorization)
		got, err := FromRequest(h)
		if err != nil {
			if got != "" || !errors.Is(err, sandbox.ErrDenied) {
				t.Errorf("a refusal with %q, %v", got, err)
			}
			for _, secret := range []string{key, authorization} {
				if len(secret) > 40 && strings.Contains(err.Error(), secret) {
					t.Errorf("the refusal repeats what was sent: %v", err)
				}
			}
			return
		}
		if got == "" || len(got) > maxSecret || strings.ContainsAny(got, " \t\r\n\x00") {
			t.Errorf("accepted %q", got)
		}
		if !strings.Contains(key, got) && !strings.Contains(authorization, got) {
			t.Errorf("%q was not sent", got)
		}
	})
}

func BenchmarkHash(b *testing.B) {
	k, err := NewKey()
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		Hash(k.Secret)
	}
}
