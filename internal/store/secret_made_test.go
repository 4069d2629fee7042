package store

import (
	"bytes"
	"errors"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMadeSecretIsMadeOnce(t *testing.T) {
	s := fresh(t)
	made := 0
	once := func() ([]byte, error) { made++; return []byte("it"), nil }
	for range 2 {
		got, err := s.MadeSecret(t.Context(), "authority", once)
		if err != nil || !bytes.Equal(got, []byte("it")) {
			t.Fatalf("secret: %q, %v", got, err)
		}
	}
	if made != 1 {
		t.Errorf("made %d times", made)
	}
	empty := func() ([]byte, error) { return nil, nil }
	if _, err := s.MadeSecret(t.Context(), "other", empty); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("an empty secret: %v", err)
	}
}
