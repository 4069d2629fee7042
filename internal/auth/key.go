package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// keyPrefix begins every key: SDKs of E2B before 2.0, and those in Python, accept nothing else.
	keyPrefix = "e2b_"
	keyBytes  = 20
	// maxSecret bounds what is looked at as a key; ours have 44 characters.
	maxSecret = 512
	hintHead  = 8
	hintTail  = 4
)

// Key is a fresh API key.
type Key struct {
	// Secret is the key itself, "e2b_" and 40 hex characters. It is shown once and never stored.
	Secret string
	// Hash is what is stored to recognise the key by.
	Hash string
	// Hint is the secret's first and last characters, for people to tell keys apart.
	Hint string
}

// String hides the secret from logs and errors.
func (k Key) String() string { return k.Hint }

// GoString hides the secret from %#v.
func (k Key) GoString() string { return k.Hint }

// NewKey returns a fresh key with 160 random bits. The error tells of a machine without randomness.
func NewKey() (Key, error) {
	var raw [keyBytes]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return Key{}, fmt.Errorf("make key: %w", err)
	}
	secret := keyPrefix + hex.EncodeToString(raw[:])
	return Key{Secret: secret, Hash: Hash(secret), Hint: hint(secret)}, nil
}

// Hash returns the lower-case hex SHA-256 of a secret. A slow, salted hash would protect secrets that people choose and
// others can guess; 160 random bits cannot be guessed, and this hash is computed for every request. Looking it up in a
// map needs no constant time either: an attacker who times the lookup learns of hashes, and steering a hash towards a
// stored one means inverting SHA-256.
func Hash(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// hint returns what may be shown of a secret.
func hint(secret string) string { return secret[:hintHead] + "…" + secret[len(secret)-hintTail:] }

// FromRequest returns the secret that a request carries: X-API-KEY, else "Authorization: Bearer". It says nothing of
// whether the secret is any good. Errors: ErrDenied where there is none, or where it cannot be one.
func FromRequest(h http.Header) (string, error) {
	if v, given, err := one(h, "X-Api-Key"); given || err != nil {
		return checked("X-API-KEY", v, err)
	}
	v, given, err := one(h, "Authorization")
	if !given && err == nil {
		return "", sandbox.Deniedf("no API key: send the header X-API-KEY, or Authorization: Bearer")
	}
	scheme, token, _ := strings.Cut(strings.TrimSpace(v), " ")
	if err == nil && !strings.EqualFold(scheme, "Bearer") {
		return "", sandbox.Deniedf("header Authorization is not of the form `Bearer KEY`")
	}
	return checked("Authorization", token, err)
}

// one returns the header's only value and whether there is a value at all.
func one(h http.Header, name string) (value string, given bool, err error) {
	switch v := h[name]; len(v) {
	case 0:
		return "", false, nil
	case 1:
		return v[0], v[0] != "", nil
	default:
		return "", true, sandbox.Deniedf("header %s is there %d times: send it once", name, len(v))
	}
}

// checked returns a secret that has a secret's form: 1 to 512 visible ASCII characters. The text is never echoed.
func checked(header, secret string, err error) (string, error) {
	if err != nil {
		return "", err
	}
	secret = strings.TrimSpace(secret)
	if secret == "" || len(secret) > maxSecret {
		return "", sandbox.Deniedf("header %s: a key has 1 to %d characters, this one has %d", header, maxSecret, len(secret))
	}
	for i := range len(secret) {
		if secret[i] <= ' ' || secret[i] > '~' {
			return "", sandbox.Deniedf("header %s: a key has visible ASCII characters only", header)
		}
	}
	return secret, nil
}
