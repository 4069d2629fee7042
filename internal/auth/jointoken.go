package auth

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	tokenVersion     = "v1"
	tokenParts       = 4
	tokenIDBytes     = 6
	tokenSecretBytes = 20
	fingerprintBytes = 32
)

// JoinToken lets a machine into the cluster, and tells the machine which cluster that is.
type JoinToken struct {
	// ID names the token in lists: 12 hex characters.
	ID string
	// Fingerprint is that of the authority that the server's certificate must come from.
	Fingerprint string
	// Text is the token itself, v1.FINGERPRINT.ID.SECRET. It is shown once and never stored.
	Text string
	// Hash is what is stored to recognise the secret by.
	Hash string
}

// String hides the secret from logs and errors.
func (t JoinToken) String() string { return t.ID }

// GoString hides the secret from %#v.
func (t JoinToken) GoString() string { return t.ID }

// NewJoinToken returns a fresh token, with 160 random bits as its secret, for the authority with the fingerprint.
func NewJoinToken(fingerprint string) (JoinToken, error) {
	var raw [tokenIDBytes + tokenSecretBytes]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return JoinToken{}, fmt.Errorf("make join token: %w", err)
	}
	id, secret := hex.EncodeToString(raw[:tokenIDBytes]), hex.EncodeToString(raw[tokenIDBytes:])
	return ParseJoinToken(strings.Join([]string{tokenVersion, fingerprint, id, secret}, "."))
}

// ParseJoinToken reads a token's text; space around it does no harm. The errors are ErrInvalid and never show the secret.
func ParseJoinToken(text string) (JoinToken, error) {
	text = strings.TrimSpace(text)
	parts := strings.Split(text, ".")
	switch {
	case text == "":
		return JoinToken{}, sandbox.Invalidf("join token is empty: `cloister token create` on a server makes one")
	case strings.HasPrefix(text, keyPrefix):
		return JoinToken{}, sandbox.Invalidf("join token: this is an API key; `cloister token create` on a server makes a join token")
	case parts[0] != tokenVersion:
		return JoinToken{}, sandbox.Invalidf("join token begins with %.8q: want %s., as in v1.FINGERPRINT.ID.SECRET", parts[0], tokenVersion)
	case len(parts) != tokenParts:
		return JoinToken{}, sandbox.Invalidf("join token has %d parts between dots: want %d, as in v1.FINGERPRINT.ID.SECRET; was it cut when it was copied?", len(parts), tokenParts)
	}
	for i, part := range []struct {
		name  string
		bytes int
	}{{"fingerprint", fingerprintBytes}, {"id", tokenIDBytes}, {"secret", tokenSecretBytes}} {
		if got := parts[i+1]; !isHex(got) || len(got) != 2*part.bytes {
			return JoinToken{}, sandbox.Invalidf("join token: its %s has %d characters: want %d of 0-9 and a-f; was it cut when it was copied?",
				part.name, len(got), 2*part.bytes)
		}
	}
	return JoinToken{ID: parts[2], Fingerprint: parts[1], Text: text, Hash: Hash(parts[3])}, nil
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// MintToken returns the text of a fresh join token for this cluster.
func (a *Authority) MintToken() (string, error) {
	t, err := NewJoinToken(a.Fingerprint())
	return t.Text, err
}

// ReadToken returns the id of a join token, and the hash of its secret. It says nothing of whether the token is any good.
// Errors: ErrInvalid for what is no token, ErrDenied for one of another cluster.
func (a *Authority) ReadToken(text string) (id, hash string, err error) {
	t, err := ParseJoinToken(text)
	if err != nil {
		return "", "", err
	}
	certs, err := parseCerts(a.trusted)
	if err != nil {
		return "", "", err
	}
	for _, c := range certs {
		if fingerprint(c.RawSubjectPublicKeyInfo) == t.Fingerprint {
			return t.ID, t.Hash, nil
		}
	}
	return "", "", sandbox.Deniedf("join token %s is of another cluster, whose authority begins with %.8s; this one's begins with %.8s",
		t.ID, t.Fingerprint, a.Fingerprint())
}

// PinnedTLS returns the settings of a client that has nothing but a join token yet: it talks only to a server whose
// certificate comes from the authority with the fingerprint, which must be in the chain that it sends.
func PinnedTLS(fingerprint string) *tls.Config {
	name := roleName(sandbox.RoleServer)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: name, SessionTicketsDisabled: true,
		InsecureSkipVerify: true, //nolint:gosec // verified below: the root is known by its key alone
		VerifyConnection:   func(state tls.ConnectionState) error { return verifyPinned(state.PeerCertificates, fingerprint, name) },
	}
}

func verifyPinned(chain []*x509.Certificate, pinned, name string) error {
	if len(chain) == 0 {
		return sandbox.Deniedf("the server sent no certificate")
	}
	roots := x509.NewCertPool()
	found := false
	for _, c := range chain[1:] {
		if c.IsCA && fingerprint(c.RawSubjectPublicKeyInfo) == pinned {
			roots.AddCert(c)
			found = true
		}
	}
	if !found {
		return sandbox.Deniedf("the server at this address is not of the cluster that the join token is for: none of its certificates "+
			"has the authority's key %.8s…; check the address, and that nothing between intercepts TLS", pinned)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{DNSName: name, Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err != nil {
		return fmt.Errorf("%w: the certificate is of the right cluster, and not good for a server now: %w", sandbox.ErrDenied, err)
	}
	return nil
}
