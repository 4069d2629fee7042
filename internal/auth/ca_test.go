package auth

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func openCA(t *testing.T, dir string) *CA {
	t.Helper()
	ca, err := OpenCA(dir, "test")
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func TestOpenCAKeepsItsKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	first, second := openCA(t, dir), openCA(t, dir)
	if first.Fingerprint() != second.Fingerprint() || len(first.Fingerprint()) != 64 {
		t.Errorf("fingerprints %s and %s", first.Fingerprint(), second.Fingerprint())
	}
	if diff := cmp.Diff(string(first.CertPEM()), string(second.CertPEM())); diff != "" {
		t.Error(diff)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("%d files in the authority's directory (%v), want 2", len(entries), err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v (%v), want 0600", e.Name(), info.Mode(), err)
		}
	}
}

func TestOpenCARefusals(t *testing.T) {
	tests := map[string]struct {
		change func(dir string) error
		want   error
	}{
		"key lost": {func(dir string) error { return os.Remove(filepath.Join(dir, caKeyFile)) }, sandbox.ErrUnavailable},
		"certificate damaged": {
			func(dir string) error { return os.WriteFile(filepath.Join(dir, caCertFile), []byte("junk"), 0o600) }, sandbox.ErrInvalid,
		},
		"key damaged": {
			func(dir string) error { return os.WriteFile(filepath.Join(dir, caKeyFile), []byte("junk"), 0o600) }, sandbox.ErrInvalid,
		},
		"another's key": {func(dir string) error {
			other := filepath.Join(dir, "other")
			if _, err := OpenCA(other, "other"); err != nil {
				return err
			}
			return os.Rename(filepath.Join(other, caKeyFile), filepath.Join(dir, caKeyFile))
		}, sandbox.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			openCA(t, dir)
			if err := tt.change(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := OpenCA(dir, "test"); !errors.Is(err, tt.want) {
				t.Errorf("OpenCA: %v, want %v", err, tt.want)
			}
		})
	}
}

// TestServe uses an issued certificate in a real TLS server, below one of its domains.
func TestServe(t *testing.T) {
	ca := openCA(t, t.TempDir())
	leaf, err := ca.IssueServer([]string{"Sandboxes.Example.com.", "*.other.test"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"sandboxes.example.com", "*.sandboxes.example.com", "other.test", "*.other.test", "localhost", "127.0.0.1", "::1",
	}
	if diff := cmp.Diff(want, leaf.Names); diff != "" {
		t.Error(diff)
	}
	certPath, keyPath, err := leaf.Write(t.TempDir(), "server")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(certPath, keyPath)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	srv.StartTLS()
	defer srv.Close()

	for name, ok := range map[string]bool{
		"49983-abc.sandboxes.example.com": true, "sandboxes.example.com": true, "localhost": true, "127.0.0.1": true,
		"a.b.other.test": false, "example.com": false,
	} {
		err := dial(srv.Listener.Addr().String(), &tls.Config{RootCAs: ca.Pool(), ServerName: name, MinVersion: tls.VersionTLS12})
		if (err == nil) != ok {
			t.Errorf("connect as %s: %v, want success %v", name, err, ok)
		}
	}
	if err := dial(srv.Listener.Addr().String(), &tls.Config{ServerName: "localhost", MinVersion: tls.VersionTLS12}); err == nil {
		t.Error("a client that does not trust the authority was content")
	}
}

func dial(addr string, cfg *tls.Config) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr, cfg)
	if err != nil {
		return err
	}
	return conn.Close()
}

func TestLeafIsNoAuthority(t *testing.T) {
	ca := openCA(t, t.TempDir())
	leaf, err := ca.IssueServer([]string{"example.com"})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := parseCert(leaf.CertPEM)
	if err != nil {
		t.Fatal(err)
	}
	if cert.IsCA || !ca.cert.MaxPathLenZero || cert.KeyUsage&x509.KeyUsageCertSign != 0 {
		t.Error("a leaf could sign other certificates")
	}
	if life := cert.NotAfter.Sub(cert.NotBefore); life > 398*24*time.Hour {
		t.Errorf("a leaf holds for %s: browsers refuse more than 398 days", life)
	}
}

func TestIssueServerRefusals(t *testing.T) {
	ca := openCA(t, t.TempDir())
	for _, d := range []string{
		"", "localhost", "a b.example.com", "*.*.example.com", "-a.example.com", "10.0.0.1", "a..b", "a/b.c",
		strings.Repeat("a.", 130) + "com", strings.Repeat("a", 64) + ".com", "exämple.com",
	} {
		if _, err := ca.IssueServer([]string{d}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("IssueServer(%q): %v, want ErrInvalid", d, err)
		}
	}
	if _, err := ca.IssueServer(nil); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("no domains: %v, want ErrInvalid", err)
	}
	if _, err := ca.IssueServer([]string{strings.Repeat("a", 60) + "." + strings.Repeat("b", 60) + ".com"}); err != nil {
		t.Errorf("a domain longer than a common name: %v", err)
	}
}

func TestWriteRefusesPaths(t *testing.T) {
	for _, name := range []string{"", "..", "../x", "a/b", ".hidden"} {
		if _, _, err := (Leaf{}).Write(t.TempDir(), name); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("Write(%q): %v, want ErrInvalid", name, err)
		}
	}
}

func TestTrustInstructions(t *testing.T) {
	got := TrustInstructions("/var/lib/cloister/ca/ca.pem")
	for _, want := range []string{
		"update-ca-certificates", "update-ca-trust", "add-trusted-cert", "NODE_EXTRA_CA_CERTS=/var/lib/cloister/ca/ca.pem\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the instructions lack %q", want)
		}
	}
	if strings.Contains(got, "{ca}") {
		t.Error("a placeholder is left")
	}
	if got := TrustInstructions("/a b/it's.pem"); !strings.Contains(got, `'/a b/it'\''s.pem'`) {
		t.Errorf("a path with a space is not quoted:\n%s", got)
	}
}

func FuzzServerNames(f *testing.F) {
	f.Add("sandboxes.example.com")
	f.Add("*.a.b")
	f.Add("..")
	f.Fuzz(func(t *testing.T, domain string) {
		names, err := serverNames([]string{domain})
		if err != nil {
			return
		}
		if len(names) != 3 || names[1] != "*."+names[0] || len(names[1]) > maxNameSize || strings.Count(names[0], ".") == 0 ||
			strings.Trim(names[0], "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
			t.Errorf("serverNames(%q) = %q", domain, names)
		}
	})
}
