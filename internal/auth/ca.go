package auth

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The files of an authority, and how long certificates hold.
const (
	caCertFile = "ca.pem"
	caKeyFile  = "ca-key.pem"
	caLife     = 10 * 365 * 24 * time.Hour
	// serverLife stays below the 398 days that browsers and Apple's systems accept.
	serverLife = 397 * 24 * time.Hour
	// backdate allows for clocks that are behind.
	backdate    = time.Hour
	serialBits  = 127
	maxDomains  = 64
	certBlock   = "CERTIFICATE"
	keyBlock    = "PRIVATE KEY"
	maxNameSize = 253
)

// CA is the cluster's certificate authority: an ECDSA P-256 key and its certificate, which signs leaves only.
type CA struct {
	// CertPath is the file of the certificate, to be trusted by clients.
	CertPath string

	cert *x509.Certificate
	pem  []byte
	key  crypto.Signer
}

// OpenCA loads the authority in dir, or makes it where there is none. name is shown, before "CA", to people who
// are asked to trust the authority. The key's file has mode 0600.
func OpenCA(dir, name string) (*CA, error) {
	ca, err := loadCA(dir)
	if errors.Is(err, os.ErrNotExist) {
		if err := makeCA(dir, name); err != nil {
			return nil, fmt.Errorf("make certificate authority: %w", err)
		}
		ca, err = loadCA(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("load certificate authority in %s: %w", dir, err)
	}
	return ca, nil
}

// loadCA reads the two files. The certificate is written last, so one without a key has lost it.
func loadCA(dir string) (*CA, error) {
	certPath, keyPath := filepath.Join(dir, caCertFile), filepath.Join(dir, caKeyFile)
	certPEM, err := os.ReadFile(certPath) //nolint:gosec // the path is the operator's data directory
	if err != nil {
		return nil, err
	}
	keyPEM, err := os.ReadFile(keyPath) //nolint:gosec // as above
	if errors.Is(err, os.ErrNotExist) {
		return nil, sandbox.Unavailablef("%s is there and its key %s is missing: restore the key, or remove the "+
			"certificate to make a new authority that clients must trust anew", certPath, keyPath)
	}
	if err != nil {
		return nil, err
	}
	cert, err := parseCert(certPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", certPath, err)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyPath, err)
	}
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || !public.Equal(cert.PublicKey) || !cert.IsCA {
		return nil, sandbox.Invalidf("%s and %s do not belong together: restore both from one backup", certPath, keyPath)
	}
	if time.Now().After(cert.NotAfter) {
		return nil, sandbox.Invalidf("%s expired on %s: remove both files to make a new authority", certPath, cert.NotAfter.Format(time.DateOnly))
	}
	return &CA{CertPath: certPath, cert: cert, pem: certPEM, key: key}, nil
}

func parseCert(text []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != certBlock {
		return nil, sandbox.Invalidf("want a PEM block of type %s", certBlock)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse certificate: %w", err)
	}
	return cert, nil
}

func parseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != keyBlock {
		return nil, sandbox.Invalidf("want a PEM block of type %s", keyBlock)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, sandbox.Invalidf("a key of type %T cannot sign", key)
	}
	return signer, nil
}

func makeCA(dir, name string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"Cloister"}, CommonName: name + " CA"},
		NotBefore:    now.Add(-backdate), NotAfter: now.Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	return writePair(dir, caKeyFile, keyPEM, caCertFile, encodeCert(der))
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), serialBits))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return serial, nil
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: certBlock, Bytes: der})
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der}), nil
}

// CertPEM returns the authority's certificate.
func (ca *CA) CertPEM() []byte { return ca.pem }

// Pool returns a pool that trusts this authority alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// Fingerprint returns the hex SHA-256 of the authority's public key, by which others recognise it.
func (ca *CA) Fingerprint() string {
	sum := sha256.Sum256(ca.cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// Leaf is a certificate that the authority has signed, and its key.
type Leaf struct {
	// CertPEM is the chain that a server sends.
	CertPEM []byte
	KeyPEM  []byte
	// Names are the DNS names and addresses that it holds for.
	Names     []string
	ExpiresAt time.Time
}

// IssueServer returns a certificate for TLS servers that holds for each domain, everything one label below it, and the
// machine's loopback names and addresses. It is valid for 397 days, or as long as the authority.
// Errors: ErrInvalid for what is no domain, or one of a single label, below which clients accept no wildcard.
func (ca *CA) IssueServer(domains []string) (Leaf, error) {
	names, err := serverNames(domains)
	if err != nil {
		return Leaf{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Leaf{}, fmt.Errorf("make key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return Leaf{}, err
	}
	now := time.Now()
	end := now.Add(serverLife)
	if end.After(ca.cert.NotAfter) {
		end = ca.cert.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"Cloister"}, CommonName: commonName(names)},
		NotBefore:    now.Add(-backdate), NotAfter: end,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    names,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return Leaf{}, fmt.Errorf("sign certificate for %s: %w", strings.Join(domains, ", "), err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return Leaf{}, err
	}
	all := append(append([]string{}, names...), "127.0.0.1", "::1")
	return Leaf{CertPEM: append(encodeCert(der), ca.pem...), KeyPEM: keyPEM, Names: all, ExpiresAt: end}, nil
}

// commonName returns the first name that fits the 64 characters of a common name; names are in the list anyway.
func commonName(names []string) string {
	const most = 64
	for _, n := range names {
		if len(n) <= most {
			return n
		}
	}
	return "cloister"
}

// serverNames returns each domain and its wildcard, and localhost.
func serverNames(domains []string) ([]string, error) {
	if len(domains) == 0 || len(domains) > maxDomains {
		return nil, sandbox.Invalidf("%d domains: want 1 to %d", len(domains), maxDomains)
	}
	label := regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	var names []string
	for _, d := range domains {
		d = strings.TrimSuffix(strings.TrimPrefix(strings.ToLower(strings.TrimSpace(d)), "*."), ".")
		labels := strings.Split(d, ".")
		for _, l := range labels {
			if !label.MatchString(l) || len(d) > maxNameSize-2 || net.ParseIP(d) != nil {
				return nil, sandbox.Invalidf("domain %.80q: want a host name such as sandboxes.example.com", d)
			}
		}
		if len(labels) == 1 {
			return nil, sandbox.Invalidf("domain %q: clients accept no wildcard below a single label, use one such as sandboxes.%s", d, d)
		}
		names = append(names, d, "*."+d)
	}
	return append(names, "localhost"), nil
}

// Write stores the leaf as <name>.pem and <name>-key.pem in dir, replacing what is there, and returns the two paths.
func (l Leaf) Write(dir, name string) (certPath, keyPath string, err error) {
	if name == "" || name != filepath.Base(name) || strings.HasPrefix(name, ".") {
		return "", "", sandbox.Invalidf("certificate name %.80q: want a plain file name", name)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", "", fmt.Errorf("write certificate: %w", err)
	}
	certPath, keyPath = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+"-key.pem")
	if err := writePair(dir, filepath.Base(keyPath), l.KeyPEM, filepath.Base(certPath), l.CertPEM); err != nil {
		return "", "", fmt.Errorf("write certificate: %w", err)
	}
	return certPath, keyPath, nil
}

// writePair writes a key and then its certificate, each whole or not at all, both readable by their owner alone.
func writePair(dir, keyName string, key []byte, certName string, cert []byte) error {
	if err := writeFile(filepath.Join(dir, keyName), key); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, certName), cert)
}

func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // made with mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already when the rename succeeded
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
