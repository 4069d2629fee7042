package store

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// masterKeyName is the file with the key that seals secrets. It stays out of etcd, so that a snapshot of the
	// database alone opens nothing.
	masterKeyName  = "master.key"
	masterKeyBytes = 32
	maxSecretBytes = 4096
	clusterIDBytes = 16
)

// sealed is a secret as it is stored: AES-256-GCM under the master key, with the secret's name as associated data.
type sealed struct {
	Nonce []byte `json:"nonce"`
	Box   []byte `json:"box"`
}

// sealer encrypts and decrypts secrets.
type sealer struct {
	aead cipher.AEAD
}

// openSealer reads the master key, or makes it for a new store. A store that exists and has lost its key must not get
// another one: everything sealed with the first would be lost without a word.
func openSealer(path string, create bool) (sealer, error) {
	key, err := readMasterKey(path)
	if errors.Is(err, os.ErrNotExist) && create {
		key, err = makeMasterKey(path)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return sealer{}, sandbox.Unavailablef("master key %s is missing and the store's secrets need it: restore the file", path)
	case err != nil:
		return sealer{}, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return sealer{}, fmt.Errorf("master key %s: %w", path, err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return sealer{}, fmt.Errorf("master key %s: %w", path, err)
	}
	return sealer{aead: aead}, nil
}

func readMasterKey(path string) ([]byte, error) {
	text, err := os.ReadFile(path) //nolint:gosec // the path is the operator's data directory
	if err != nil {
		return nil, fmt.Errorf("read master key: %w", err)
	}
	key := make([]byte, masterKeyBytes)
	if len(text) < 2*masterKeyBytes {
		return nil, sandbox.Invalidf("master key %s has %d bytes, want %d: restore the file", path, len(text), 2*masterKeyBytes)
	}
	if _, err := hex.Decode(key, text[:2*masterKeyBytes]); err != nil {
		return nil, fmt.Errorf("read master key %s: %w", path, err)
	}
	return key, nil
}

// makeMasterKey writes a fresh key such that the file has either all of it or does not exist.
func makeMasterKey(path string) ([]byte, error) {
	key := make([]byte, masterKeyBytes)
	_, _ = rand.Read(key) // never fails: crypto/rand ends the program first
	f, err := os.CreateTemp(filepath.Dir(path), masterKeyName+".*")
	if err != nil {
		return nil, fmt.Errorf("make master key: %w", err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already when the rename succeeded
	_, err = f.WriteString(hex.EncodeToString(key) + "\n")
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, fmt.Errorf("make master key: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return nil, fmt.Errorf("make master key: %w", err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("make master key: %w", err)
	}
	return key, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // the path is the operator's data directory
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (s sealer) seal(name string, plain []byte) sealed {
	nonce := make([]byte, s.aead.NonceSize())
	_, _ = rand.Read(nonce) // never fails: crypto/rand ends the program first
	return sealed{Nonce: nonce, Box: s.aead.Seal(nil, nonce, plain, []byte(name))}
}

func (s sealer) open(name string, box sealed) ([]byte, error) {
	if len(box.Nonce) != s.aead.NonceSize() {
		return nil, sandbox.Invalidf("secret %q is damaged: nonce of %d bytes", name, len(box.Nonce))
	}
	plain, err := s.aead.Open(nil, box.Nonce, box.Box, []byte(name))
	if err != nil {
		return nil, fmt.Errorf("open secret %q: the master key is not the one that sealed it: %w", name, err)
	}
	return plain, nil
}

// Secret returns the cluster's secret of that name and, where there is none, makes one of size random bytes; every
// caller on every server gets the same bytes. Errors: ErrInvalid when it exists with another size.
func (s *Store) Secret(ctx context.Context, name string, size int) ([]byte, error) {
	if err := checkName("secret", name); err != nil {
		return nil, err
	}
	if size < 1 || size > maxSecretBytes {
		return nil, sandbox.Invalidf("secret %q of %d bytes: want 1 to %d", name, size, maxSecretBytes)
	}
	for range maxRetries {
		r, err := s.secrets.get(ctx, name)
		if err == nil {
			return s.openSecret(name, r.Value, size)
		}
		if !errors.Is(err, sandbox.ErrNotFound) {
			return nil, err
		}
		plain := make([]byte, size)
		_, _ = rand.Read(plain) // never fails: crypto/rand ends the program first
		_, err = s.secrets.create(ctx, name, s.seal.seal(name, plain))
		if err == nil {
			return plain, nil
		}
		if !isConflict(err) {
			return nil, err
		}
	}
	return nil, s.secrets.changed(name)
}

func (s *Store) openSecret(name string, box sealed, size int) ([]byte, error) {
	plain, err := s.seal.open(name, box)
	if err != nil {
		return nil, err
	}
	if len(plain) != size {
		return nil, sandbox.Invalidf("secret %q has %d bytes, want %d", name, len(plain), size)
	}
	return plain, nil
}

// ClusterID returns the cluster's id: 32 hex characters, made on first use and the same for ever.
func (s *Store) ClusterID(ctx context.Context) (string, error) {
	raw, err := s.Secret(ctx, "cluster-id", clusterIDBytes)
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(raw), nil
}
