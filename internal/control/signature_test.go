package control_test

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"testing"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// sign makes a signature as the clients do.
func sign(s control.Signed, token string) control.Signed {
	text := s.Path + ":" + s.Operation + ":" + s.User + ":" + token
	if s.Expiration != "" {
		text += ":" + s.Expiration
	}
	sum := sha256.Sum256([]byte(text))
	s.Signature = "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
	return s
}

func TestSandboxBySignature(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	secure := minute()
	secure.Secure = true
	var boxes []sandbox.Sandbox
	for range 300 {
		boxes = append(boxes, mustCreate(t, c, secure))
	}
	mustCreate(t, c, minute()) // open: it signs nothing
	signed := []control.Signed{
		{Path: "/home/user/a b", Operation: "read"},
		{Path: "x:y", Operation: "write", User: "root", Expiration: "1763640000"},
	}
	for _, i := range []int{0, 150, 299} {
		for _, s := range signed {
			s = sign(s, c.Control.AccessToken(boxes[i]))
			for range 2 { // the second time from memory
				if id, err := c.Control.SandboxBySignature(t.Context(), s); err != nil || id != boxes[i].ID {
					t.Errorf("found %s, %v; want %s", id, err, boxes[i].ID)
				}
			}
			s.Path += "x"
			if _, err := c.Control.SandboxBySignature(t.Context(), s); !errors.Is(err, sandbox.ErrNotFound) {
				t.Errorf("another path: %v", err)
			}
		}
	}
	s := sign(signed[0], c.Control.AccessToken(boxes[0]))
	if err := c.Control.Kill(t.Context(), boxes[0].ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Control.SandboxBySignature(t.Context(), s); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a sandbox that is gone: %v", err)
	}
	for _, bad := range []string{"", "v1_", "v2_" + s.Signature[3:], s.Signature + "A", s.Signature[:20]} {
		s.Signature = bad
		if _, err := c.Control.SandboxBySignature(t.Context(), s); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestSignatureSearchesAreBounded(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	refused := 0
	for range 200 {
		if _, err := c.Control.SandboxBySignature(t.Context(), sign(control.Signed{Path: "p"}, "wrong")); errors.Is(err, sandbox.ErrExhausted) {
			refused++
		}
	}
	if refused < 100 {
		t.Errorf("%d of 200 wrong signatures were refused without a search", refused)
	}
}

func BenchmarkSandboxBySignature(b *testing.B) {
	c := apitest.NewCluster(b, nil)
	req := minute()
	req.Secure = true
	var first sandbox.Sandbox
	for i := range 1000 {
		box, err := c.Control.Create(b.Context(), req)
		if err != nil {
			b.Fatal(err)
		}
		if i == 0 {
			first = box
		}
	}
	s := sign(control.Signed{Path: "/a", Operation: "read"}, c.Control.AccessToken(first))
	for b.Loop() {
		if _, err := c.Control.SandboxBySignature(b.Context(), s); err != nil {
			b.Fatal(err)
		}
	}
}
