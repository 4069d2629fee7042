package auth

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// identityFile holds all of an identity, so that one rename replaces it.
const identityFile = "identity.json"

// Certificates are renewed when between these parts of their life have passed, each member at a moment of its own.
const (
	renewFrom = 0.50
	renewTo   = 0.67
)

// Grant is what a server gives to a member.
type Grant struct {
	// CertPEM is the member's certificate and that of the authority that signed it.
	CertPEM []byte
	// AuthorityPEM is what the member trusts from now on.
	AuthorityPEM []byte
	// Servers are the HOST:PORT of every server.
	Servers []string
}

// Request asks for a certificate.
type Request struct {
	// DER is a PKCS #10 request.
	DER []byte
	key crypto.Signer
}

// Identity is who a machine is in the cluster, and how it proves that. It is safe for concurrent use; Denied is set before.
type Identity struct {
	// Denied, where it is set, says whether a member with a good certificate is refused all the same: one that was removed. It is
	// asked in every handshake and must read memory only.
	Denied func(m sandbox.Member, serial string) bool

	dir    string
	member sandbox.Member

	mu   sync.RWMutex
	held holding
}

// holding is what an identity has at a time. Without a certificate the machine has not joined yet.
type holding struct {
	key  crypto.Signer
	cert *tls.Certificate
	pool *x509.CertPool
	kept kept
}

// kept is the file of an identity.
type kept struct {
	Role      sandbox.Role `json:"role"`
	ID        string       `json:"id"`
	KeyPEM    string       `json:"key"`
	CertPEM   string       `json:"certificate,omitempty"`
	Authority string       `json:"authority,omitempty"`
	Servers   []string     `json:"servers,omitempty"`
	// ReceivedAt is when the certificate came, by the clock of this machine.
	ReceivedAt time.Time `json:"received_at,omitzero"`
}

// NewIdentity makes a key for a member that is about to join, and keeps it in dir, so that a join that was cut off goes on
// with the same key; with an empty dir it is kept nowhere. Errors: ErrConflict where dir has an identity.
func NewIdentity(dir string, m sandbox.Member) (*Identity, error) {
	if err := sandbox.CheckMember(m); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of %s: %w", m, err)
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	i := &Identity{dir: dir, member: m, held: holding{key: key, kept: kept{Role: m.Role, ID: m.ID, KeyPEM: string(text)}}}
	if dir == "" {
		return i, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of the identity: %w", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, identityFile)); !errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(sandbox.Conflictf("%s has an identity already", dir), err)
	}
	return i, i.write(i.held.kept)
}

// OpenIdentity reads the identity in dir. Errors: ErrNotFound where there is none, ErrInvalid where it is damaged.
func OpenIdentity(dir string) (*Identity, error) {
	path := filepath.Join(dir, identityFile)
	text, err := os.ReadFile(path) //nolint:gosec // the path is the operator's data directory
	if errors.Is(err, os.ErrNotExist) {
		return nil, sandbox.NotFoundf("%s has no identity: this machine has not joined a cluster", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("read identity: %w", err)
	}
	var k kept
	if err := json.Unmarshal(text, &k); err != nil {
		return nil, sandbox.Invalidf("identity %s is damaged: %v; leave and join again", path, err)
	}
	i := &Identity{dir: dir, member: sandbox.Member{Role: k.Role, ID: k.ID}}
	if err := sandbox.CheckMember(i.member); err != nil {
		return nil, fmt.Errorf("identity %s: %w", path, err)
	}
	if i.held, err = hold(k, i.member); err != nil {
		return nil, fmt.Errorf("identity %s: %w", path, err)
	}
	return i, nil
}

// hold makes what is used of what is kept.
func hold(k kept, m sandbox.Member) (holding, error) {
	key, err := parseKey([]byte(k.KeyPEM))
	if err != nil {
		return holding{}, err
	}
	h := holding{key: key, kept: k}
	if k.CertPEM == "" {
		return h, nil
	}
	pair, err := tls.X509KeyPair([]byte(k.CertPEM), []byte(k.KeyPEM))
	if err != nil {
		return holding{}, sandbox.Invalidf("certificate of %s: %v", m, err)
	}
	roots, err := parseCerts([]byte(k.Authority))
	if err != nil {
		return holding{}, fmt.Errorf("authority of %s: %w", m, err)
	}
	h.cert, h.pool = &pair, x509.NewCertPool()
	for _, c := range roots {
		h.pool.AddCert(c)
	}
	if _, got, err := memberOf(pair.Leaf); err != nil || got != m {
		return holding{}, errors.Join(sandbox.Invalidf("a certificate of %s for %s", got, m), err)
	}
	return h, nil
}

// Issue makes an identity that the authority has signed itself, as a server does for its own. It is kept nowhere.
func (a *Authority) Issue(m sandbox.Member, life time.Duration, servers []string) (*Identity, error) {
	i, err := NewIdentity("", m)
	if err != nil {
		return nil, err
	}
	return i, a.Reissue(i, life, servers)
}

// Reissue gives an identity a new key and certificate.
func (a *Authority) Reissue(i *Identity, life time.Duration, servers []string) error {
	r, err := i.NewRequest()
	if err != nil {
		return err
	}
	chain, _, err := a.Sign(r.DER, i.member, life)
	if err != nil {
		return err
	}
	return i.Save(r, Grant{CertPEM: chain, AuthorityPEM: a.trusted, Servers: servers})
}

// NewRequest returns a request for a certificate: with the kept key for a machine that has not joined yet, with a new one for a member.
func (i *Identity) NewRequest() (Request, error) {
	i.mu.RLock()
	key, joined := i.held.key, i.held.cert != nil
	i.mu.RUnlock()
	if joined {
		fresh, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return Request{}, fmt.Errorf("make key of %s: %w", i.member, err)
		}
		key = fresh
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return Request{}, fmt.Errorf("make certificate request of %s: %w", i.member, err)
	}
	return Request{DER: der, key: key}, nil
}

// ReadmitRequest returns the last certificate of a member and a request by its key, for when that certificate has ended.
// Errors: ErrConflict before the machine has joined.
func (i *Identity) ReadmitRequest() (certPEM []byte, r Request, err error) {
	h := i.now()
	if h.cert == nil {
		return nil, Request{}, sandbox.Conflictf("%s has no certificate yet: join first", i.member)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, h.key)
	if err != nil {
		return nil, Request{}, fmt.Errorf("make certificate request of %s: %w", i.member, err)
	}
	return []byte(h.kept.CertPEM), Request{DER: der, key: h.key}, nil
}

// Save takes what a server answered to the request: it is written, whole or not at all, and in force for the next handshake.
// Errors: ErrInvalid where it is not for this member, not for the request's key, or not by the authority that comes with it.
func (i *Identity) Save(r Request, g Grant) error {
	keyPEM, err := encodeKey(r.key)
	if err != nil {
		return err
	}
	k := kept{
		Role: i.member.Role, ID: i.member.ID, KeyPEM: string(keyPEM), CertPEM: string(g.CertPEM), Authority: string(g.AuthorityPEM),
		Servers: slices.Clone(g.Servers), ReceivedAt: time.Now().UTC(),
	}
	h, err := hold(k, i.member)
	if err != nil {
		return err
	}
	if h.cert == nil {
		return sandbox.Invalidf("the server answered no certificate for %s", i.member)
	}
	// At its end the authority holds as well, at its begin perhaps not: that allows for clocks that are behind.
	opts := x509.VerifyOptions{Roots: h.pool, CurrentTime: h.cert.Leaf.NotAfter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	if _, err := h.cert.Leaf.Verify(opts); err != nil {
		return sandbox.Invalidf("certificate of %s: %v", i.member, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock() // across the write, which is rare: what is in force is what is kept
	if err := i.write(k); err != nil {
		return err
	}
	i.held = h
	return nil
}

// write replaces the file.
func (i *Identity) write(k kept) error {
	if i.dir == "" {
		return nil
	}
	text, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return fmt.Errorf("encode identity: %w", err)
	}
	if err := writeFile(filepath.Join(i.dir, identityFile), append(text, '\n')); err != nil {
		return fmt.Errorf("write identity: %w", err)
	}
	return nil
}

// Remove deletes the files of an identity in dir, for a machine that left; there being none is fine.
func Remove(dir string) error {
	err := os.Remove(filepath.Join(dir, identityFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove identity: %w", err)
	}
	return nil
}

func (i *Identity) now() holding {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.held
}

// Member returns who the machine is.
func (i *Identity) Member() sandbox.Member { return i.member }

// Joined reports whether the machine has a certificate, be it expired.
func (i *Identity) Joined() bool { return i.now().cert != nil }

// ClusterID returns the id of the cluster; empty before the machine has joined.
func (i *Identity) ClusterID() string {
	h := i.now()
	if h.cert == nil {
		return ""
	}
	return h.cert.Leaf.URIs[0].Host
}

// Servers returns the HOST:PORT of every server that was known when the certificate came.
func (i *Identity) Servers() []string { return slices.Clone(i.now().kept.Servers) }

// Expires returns when the certificate ends; the zero time before the machine has joined.
func (i *Identity) Expires() time.Time {
	h := i.now()
	if h.cert == nil {
		return time.Time{}
	}
	return h.cert.Leaf.NotAfter
}

// Serial returns the certificate's serial number as Denied is asked with it; empty before the machine has joined.
func (i *Identity) Serial() string {
	h := i.now()
	if h.cert == nil {
		return ""
	}
	return SerialText(h.cert.Leaf.SerialNumber)
}

// RenewAt returns when to renew: after 50 to 67 % of the certificate's life, counted on this machine's clock from when it came; random, from 0 up to 1,
// says where in between. It is never before now.
func (i *Identity) RenewAt(now time.Time, random float64) time.Time {
	h := i.now()
	if h.cert == nil {
		return now
	}
	life := h.cert.Leaf.NotAfter.Sub(h.cert.Leaf.NotBefore.Add(memberBackdate))
	at := h.kept.ReceivedAt.Add(time.Duration(float64(life) * (renewFrom + (renewTo-renewFrom)*random)))
	if at.Before(now) {
		return now
	}
	return at
}
