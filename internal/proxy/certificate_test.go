package proxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// writeCertificate makes a self-signed certificate for *.sbx.test.
func writeCertificate(tb testing.TB, certFile, keyFile, name string) *x509.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		tb.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{"*.sbx.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	return cert
}

func TestTLS(t *testing.T) {
	certFile, keyFile := filepath.Join(t.TempDir(), "c.pem"), filepath.Join(t.TempDir(), "k.pem")
	root := writeCertificate(t, certFile, keyFile, "one")
	cert, err := LoadCertificate(certFile, keyFile, nil)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld()
	w.set(testID, sandbox.Route{State: "running"})
	protos := make(chan string, 1)
	w.listen(t, testID, 8000, http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) { protos <- q.Header.Get("X-Forwarded-Proto") }))
	p, err := New(Config{Router: w, Dialer: w, DrainTimeout: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx, ln, ServeOptions{TLS: cert.TLSConfig()}) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}()

	for proto, h2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		t.Run(proto, func(t *testing.T) {
			pool := x509.NewCertPool()
			pool.AddCert(root)
			name := "8000-" + string(testID) + ".sbx.test"
			tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: name}, ForceAttemptHTTP2: h2}
			defer tr.CloseIdleConnections()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+ln.Addr().String()+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = name
			res, _ := do(t, &http.Client{Transport: tr}, req)
			if res.Proto != proto || res.StatusCode != http.StatusOK {
				t.Errorf("%s %d, want %s 200", res.Proto, res.StatusCode, proto)
			}
			if got := <-protos; got != "https" {
				t.Errorf("X-Forwarded-Proto %q", got)
			}
		})
	}
}

func TestCertificateReload(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
	if _, err := LoadCertificate(certFile, keyFile, nil); err == nil {
		t.Fatal("missing files were loaded")
	}
	writeCertificate(t, certFile, keyFile, "one")
	c, err := LoadCertificate(certFile, keyFile, nil)
	if err != nil {
		t.Fatal(err)
	}
	name := func() string { return c.loaded.Load().pair.Leaf.Subject.CommonName }
	later := time.Now()
	check := func(want string) {
		t.Helper()
		later = later.Add(certificateCheck + time.Second)
		c.refresh(t.Context(), later)
		if got := name(); got != want {
			t.Errorf("certificate %q, want %q", got, want)
		}
	}
	check("one")

	writeCertificate(t, certFile, filepath.Join(dir, "other.pem"), "two") // its key has not arrived yet
	check("one")
	writeCertificate(t, certFile, keyFile, "three")
	c.refresh(t.Context(), time.Now()) // too early to look again
	check("three")

	if err := os.Remove(keyFile); err != nil {
		t.Fatal(err)
	}
	check("three")
	writeCertificate(t, certFile, keyFile, "four")
	if err := c.Reload(); err != nil || name() != "four" {
		t.Errorf("%v, certificate %q, want four", err, name())
	}
}
