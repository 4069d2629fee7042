package auth

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"regexp"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// memberDomain ends the names of all members. It is reserved for private use, so that nobody else has a certificate for one.
	memberDomain = "cloister.internal"
	// spiffeScheme begins the URI that says who a member is (SPIFFE-ID, section 2).
	spiffeScheme = "spiffe"
	// maxRequest bounds a certificate request, in bytes; one with a P-256 key has about 300.
	maxRequest = 4096
	// maxChain bounds the certificates that a member shows of itself, in bytes; two have about 1500.
	maxChain = 16 << 10
	// memberBackdate allows for clocks that are behind, which machines without a time server have by hours.
	memberBackdate = 24 * time.Hour
)

var clusterIDForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// Authority is what all members of one cluster trust: an ECDSA P-256 key that signs their certificates, and the
// certificates of those authorities that are trusted beside it. It is immutable.
type Authority struct {
	clusterID string
	cert      *x509.Certificate
	key       crypto.Signer
	// trusted is the PEM of the own certificate and those that follow it.
	trusted []byte
}

// NewAuthority makes an authority for the cluster. Its certificate holds for 10 years and for names of members alone.
// Errors: ErrInvalid for what is no cluster id.
func NewAuthority(clusterID string) (*Authority, error) {
	if !clusterIDForm.MatchString(clusterID) {
		return nil, sandbox.Invalidf("cluster id %.80q: want 1 to 63 characters of a-z, 0-9 and -", clusterID)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of the authority: %w", err)
	}
	template, err := newTemplate(pkix.Name{Organization: []string{"Cloister"}, CommonName: "cluster " + clusterID[:min(len(clusterID), 40)]}, caLife)
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign
	template.URIs = []*url.URL{{Scheme: spiffeScheme, Host: clusterID}}
	template.PermittedDNSDomainsCritical, template.PermittedDNSDomains = true, []string{memberDomain}
	template.PermittedURIDomains = []string{clusterID}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of the authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate of the authority: %w", err)
	}
	return &Authority{clusterID: clusterID, cert: cert, key: key, trusted: encodeCert(der)}, nil
}

// LoadAuthority reads what CertPEM and KeyPEM wrote. Errors: ErrInvalid.
func LoadAuthority(certPEM, keyPEM []byte) (*Authority, error) {
	certs, err := parseCerts(certPEM)
	if err != nil {
		return nil, fmt.Errorf("certificates of the cluster's authority: %w", err)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("key of the cluster's authority: %w", err)
	}
	cert := certs[0]
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || !public.Equal(cert.PublicKey) {
		return nil, sandbox.Invalidf("the cluster's authority: key and certificate do not belong together")
	}
	for _, c := range certs {
		if !c.IsCA || len(c.URIs) != 1 || c.URIs[0].Host != cert.URIs[0].Host || !clusterIDForm.MatchString(c.URIs[0].Host) {
			return nil, sandbox.Invalidf("the cluster's authority: a certificate is not that of an authority of this cluster")
		}
	}
	return &Authority{clusterID: cert.URIs[0].Host, cert: cert, key: key, trusted: bytes.Clone(certPEM)}, nil
}

// ClusterID returns the cluster that the authority is for.
func (a *Authority) ClusterID() string { return a.clusterID }

// CertPEM returns all certificates that members trust, the authority's own first.
func (a *Authority) CertPEM() []byte { return bytes.Clone(a.trusted) }

// KeyPEM returns the authority's key: whoever has it can be any member.
func (a *Authority) KeyPEM() ([]byte, error) { return encodeKey(a.key) }

// Fingerprint returns the hex SHA-256 of the authority's public key, by which join tokens name it.
func (a *Authority) Fingerprint() string { return fingerprint(a.cert.RawSubjectPublicKeyInfo) }

// Trusting returns the authority with those of another's certificates that it did not trust yet. An authority is replaced in three steps:
// the old one trusting the new, the new one trusting the old, the new one alone; each waits until every member has renewed.
// Errors: ErrInvalid where the other is of another cluster.
func (a *Authority) Trusting(other *Authority) (*Authority, error) {
	if other.clusterID != a.clusterID {
		return nil, sandbox.Invalidf("an authority of cluster %s for cluster %s", other.clusterID, a.clusterID)
	}
	next := *a
	certs, err := parseCerts(other.trusted)
	if err != nil {
		return nil, err
	}
	for _, c := range certs {
		if one := encodeCert(c.Raw); !bytes.Contains(next.trusted, one) {
			next.trusted = append(bytes.Clone(next.trusted), one...)
		}
	}
	return &next, nil
}

// Sign returns a certificate for the member with the key of the PKCS #10 request, followed by the authority's, and when it ends.
// What the request asks for beside its key counts for nothing. Errors: ErrInvalid.
func (a *Authority) Sign(request []byte, m sandbox.Member, life time.Duration) (chain []byte, expires time.Time, err error) {
	public, err := requestKey(request)
	if err != nil {
		return nil, time.Time{}, err
	}
	if err := sandbox.CheckMember(m); err != nil {
		return nil, time.Time{}, err
	}
	if life <= 0 {
		return nil, time.Time{}, sandbox.Invalidf("a certificate for %s: want a life above 0", life)
	}
	leaf, err := newTemplate(pkix.Name{Organization: []string{"Cloister"}, CommonName: m.String()}, life)
	if err != nil {
		return nil, time.Time{}, err
	}
	if leaf.NotAfter.After(a.cert.NotAfter) {
		leaf.NotAfter = a.cert.NotAfter
	}
	leaf.KeyUsage = x509.KeyUsageDigitalSignature
	leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	leaf.BasicConstraintsValid = true
	leaf.URIs = []*url.URL{{Scheme: spiffeScheme, Host: a.clusterID, Path: "/" + m.String()}}
	leaf.DNSNames = []string{roleName(m.Role), m.ID + "." + roleName(m.Role)}
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.cert, public, a.key)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("sign certificate of %s: %w", m, err)
	}
	return append(encodeCert(der), encodeCert(a.cert.Raw)...), leaf.NotAfter, nil
}

// ReadPast reads the last certificate of a member, which may have ended, and a PKCS #10 request by the same key: who has both is the
// member, unless that was removed. Errors: ErrInvalid, and ErrDenied where the certificate is not by this authority, not for the
// request's key, or ended longer than grace ago.
func (a *Authority) ReadPast(certPEM, request []byte, grace time.Duration, now time.Time) (sandbox.PastCertificate, error) {
	if len(certPEM) > maxChain {
		return sandbox.PastCertificate{}, sandbox.Invalidf("a certificate of %d bytes: want at most %d", len(certPEM), maxChain)
	}
	key, err := requestKey(request)
	if err != nil {
		return sandbox.PastCertificate{}, err
	}
	certs, err := parseCerts(certPEM)
	if err != nil {
		return sandbox.PastCertificate{}, err
	}
	trusted, err := parseCerts(a.trusted)
	if err != nil {
		return sandbox.PastCertificate{}, err
	}
	leaf, roots := certs[0], x509.NewCertPool()
	for _, c := range trusted {
		roots.AddCert(c)
	}
	opts := x509.VerifyOptions{Roots: roots, CurrentTime: leaf.NotAfter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := leaf.Verify(opts); err != nil || leaf.IsCA {
		return sandbox.PastCertificate{}, sandbox.Deniedf("the certificate is none of a member of this cluster: %v", err)
	}
	cluster, m, err := memberOf(leaf)
	if err != nil {
		return sandbox.PastCertificate{}, err
	}
	if own, ok := leaf.PublicKey.(*ecdsa.PublicKey); cluster != a.clusterID || !ok || !own.Equal(key) {
		return sandbox.PastCertificate{}, sandbox.Deniedf("the request is not by the key of the certificate of %s", m)
	}
	if ago := now.Sub(leaf.NotAfter); ago > grace {
		return sandbox.PastCertificate{}, sandbox.Deniedf("the certificate of %s ended %s ago, more than %s: join again with a new token", m, ago.Round(time.Second), grace)
	}
	return sandbox.PastCertificate{Member: m, Serial: SerialText(leaf.SerialNumber), IssuedAt: leaf.NotBefore.Add(memberBackdate), ExpiresAt: leaf.NotAfter}, nil
}

// requestKey returns the key of a request that proves to have been made with it.
func requestKey(request []byte) (*ecdsa.PublicKey, error) {
	if len(request) == 0 || len(request) > maxRequest {
		return nil, sandbox.Invalidf("certificate request of %d bytes: want 1 to %d", len(request), maxRequest)
	}
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return nil, sandbox.Invalidf("certificate request: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, sandbox.Invalidf("certificate request: its signature is not by its key: %v", err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, sandbox.Invalidf("certificate request: a key of type %s: want ECDSA with P-256", csr.PublicKeyAlgorithm)
	}
	return key, nil
}

// newTemplate returns what all certificates for members and authorities have. Times are whole seconds, as X.509 keeps them.
func newTemplate(name pkix.Name, life time.Duration) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC().Truncate(time.Second)
	return &x509.Certificate{SerialNumber: serial, Subject: name, NotBefore: now.Add(-memberBackdate), NotAfter: now.Add(life)}, nil
}

// roleName is the DNS name that every member of a role has.
func roleName(r sandbox.Role) string { return string(r) + "." + memberDomain }

// serverName is the DNS name that the expected member has, or, with an empty ID, every member of the role.
func serverName(expect sandbox.Member) string {
	if expect.ID == "" {
		return roleName(expect.Role)
	}
	return expect.ID + "." + roleName(expect.Role)
}

func fingerprint(publicKey []byte) string {
	sum := sha256.Sum256(publicKey)
	return hex.EncodeToString(sum[:])
}

// SerialText is how a certificate's serial number is written: lower-case hex.
func SerialText(serial *big.Int) string { return serial.Text(16) }

// parseCerts reads one certificate or more.
func parseCerts(text []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != certBlock {
			return nil, sandbox.Invalidf("a PEM block of type %.40q: want %s", block.Type, certBlock)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, sandbox.Invalidf("parse certificate: %v", err)
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, sandbox.Invalidf("want a PEM block of type %s", certBlock)
	}
	return out, nil
}
