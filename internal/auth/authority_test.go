package auth

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/url"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const testCluster = "0123456789abcdef0123456789abcdef"

var (
	serverMember = sandbox.Member{Role: sandbox.RoleServer, ID: "srv001"}
	nodeMember   = sandbox.Member{Role: sandbox.RoleNode, ID: "abc123"}
)

func newAuthority(t *testing.T) *Authority {
	t.Helper()
	a, err := NewAuthority(testCluster)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func request(t *testing.T, names *x509.CertificateRequest) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, names, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestAuthorityIsKept(t *testing.T) {
	a := newAuthority(t)
	key, err := a.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	b, err := LoadAuthority(a.CertPEM(), key)
	if err != nil {
		t.Fatal(err)
	}
	if a.Fingerprint() != b.Fingerprint() || len(a.Fingerprint()) != 64 || b.ClusterID() != testCluster {
		t.Errorf("fingerprints %s and %s, cluster %s", a.Fingerprint(), b.Fingerprint(), b.ClusterID())
	}
}

func TestAuthorityRefusals(t *testing.T) {
	a := newAuthority(t)
	other := newAuthority(t)
	key, err := a.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	otherKey, err := other.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	web := openCA(t, t.TempDir())
	webKey, err := encodeKey(web.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, pair := range map[string][2][]byte{
		"no certificate":         {nil, key},
		"another's key":          {a.CertPEM(), otherKey},
		"no key":                 {a.CertPEM(), []byte("junk")},
		"authority of websites":  {web.CertPEM(), webKey},
		"one of websites beside": {append(a.CertPEM(), web.CertPEM()...), key},
		"a key as certificate":   {key, key},
	} {
		if _, err := LoadAuthority(pair[0], pair[1]); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	for _, id := range []string{"", "A", "a/b", "a.b", "-a"} {
		if _, err := NewAuthority(id); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("cluster %q: %v, want ErrInvalid", id, err)
		}
	}
}

func TestSign(t *testing.T) {
	a := newAuthority(t)
	der := request(t, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "server/boss00"}, DNSNames: []string{"boss00.server.cloister.internal"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)},
		URIs: []*url.URL{{Scheme: "spiffe", Host: testCluster, Path: "/server/boss00"}},
	})
	chain, expires, err := a.Sign(der, nodeMember, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := parseCerts(chain)
	if err != nil || len(certs) != 2 {
		t.Fatalf("%d certificates, %v", len(certs), err)
	}
	leaf := certs[0]
	if diff := cmp.Diff([]string{"node.cloister.internal", "abc123.node.cloister.internal"}, leaf.DNSNames); diff != "" {
		t.Error(diff)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://"+testCluster+"/node/abc123" || len(leaf.IPAddresses) != 0 {
		t.Errorf("URIs %v, addresses %v: a request's names count for nothing", leaf.URIs, leaf.IPAddresses)
	}
	if leaf.IsCA || leaf.KeyUsage&x509.KeyUsageCertSign != 0 || !certs[1].MaxPathLenZero {
		t.Error("a leaf could sign other certificates")
	}
	if !expires.Equal(leaf.NotAfter) || time.Until(expires) > time.Hour || time.Since(leaf.NotBefore) < memberBackdate {
		t.Errorf("valid from %s to %s, said to end at %s", leaf.NotBefore, leaf.NotAfter, expires)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	for name, ok := range map[string]bool{
		"node.cloister.internal": true, "abc123.node.cloister.internal": true, "server.cloister.internal": false, "boss00.server.cloister.internal": false,
	} {
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); (err == nil) != ok {
			t.Errorf("as %s: %v, want success %v", name, err, ok)
		}
	}
}

func TestSignRefusals(t *testing.T) {
	a := newAuthority(t)
	good := request(t, &x509.CertificateRequest{})
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	odd, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, edwards)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		der  []byte
		m    sandbox.Member
		life time.Duration
	}{
		"nothing":         {nil, nodeMember, time.Hour},
		"no request":      {[]byte("junk"), nodeMember, time.Hour},
		"much":            {make([]byte, maxRequest+1), nodeMember, time.Hour},
		"forged":          {forged, nodeMember, time.Hour},
		"another curve":   {odd, nodeMember, time.Hour},
		"no role":         {good, sandbox.Member{Role: "king", ID: "abc123"}, time.Hour},
		"no id":           {good, sandbox.Member{Role: sandbox.RoleNode}, time.Hour},
		"id of two parts": {good, sandbox.Member{Role: sandbox.RoleNode, ID: "a/b123"}, time.Hour},
		"no life":         {good, nodeMember, 0},
	} {
		if _, _, err := a.Sign(tt.der, tt.m, tt.life); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
}

// The authority's certificate is good for members' names alone, also if somebody got hold of its key's signature.
func TestAuthorityIsConstrained(t *testing.T) {
	a := newAuthority(t)
	leaf, err := newTemplate(pkix.Name{CommonName: "example.com"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	leaf.DNSNames = []string{"example.com"}
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.cert, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots}); err == nil {
		t.Error("a certificate for example.com is good")
	}
}

// An authority whose clock is behind what it was when the authority was made, by less than what certificates allow for, still
// gives certificates that are taken.
func TestSignBeforeTheAuthority(t *testing.T) {
	a := newAuthority(t)
	made := *a.cert
	made.NotBefore = time.Now().Add(-time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, &made, &made, a.cert.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.trusted = encodeCert(der)
	i, err := a.Issue(nodeMember, time.Hour, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !i.Joined() {
		t.Error("it has no certificate")
	}
}
