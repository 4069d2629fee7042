package config_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/cloister-dev/cloister/internal/config"
)

var update = flag.Bool("update", false, "write the reference page")

func load(t *testing.T, environ []string, args ...string) (*config.Config, error) {
	t.Helper()
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	config.Flags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return config.Load(fs, environ)
}

func write(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "cloister.yaml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestPrecedence(t *testing.T) {
	file := write(t, "pool-max: 5\npool-min: 1\nbase-sources: [dir:/a, dir:/b]\nsandbox-memory: 1GiB\nmax-timeout: 2h\n")
	c, err := load(t, []string{"CLOISTER_POOL_MAX=6", "CLOISTER_POOL_MIN=2", "CLOISTER_CONFIG=" + file}, "--pool-max", "7", "--resolvers", "192.0.2.1,192.0.2.2")
	if err != nil {
		t.Fatal(err)
	}
	type values struct {
		Max, Min  int
		Sources   []string
		Memory    config.Size
		Timeout   time.Duration
		Resolvers []string
		Level     string
	}
	got := values{c.PoolMax, c.PoolMin, c.BaseSources, c.SandboxMemory, c.MaxTimeout, c.Resolvers, c.LogLevel}
	want := values{7, 2, []string{"dir:/a", "dir:/b"}, 1 << 30, 2 * time.Hour, []string{"192.0.2.1", "192.0.2.2"}, "info"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("settings (-want +got):\n%s", diff)
	}
}

func TestDefaultsAreValid(t *testing.T) {
	c, err := load(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.CacheDir != "/var/lib/cloister/cache" || c.PublicAPIURL != "http://127.0.0.1:3000" {
		t.Errorf("derived settings: cache-dir %q, public-api-url %q", c.CacheDir, c.PublicAPIURL)
	}
}

func TestErrorsNameValueAndRemedy(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		file string
		want []string
	}{
		{"open without TLS", []string{"--api-addr", "0.0.0.0:3000"}, "", []string{"0.0.0.0:3000", "tls-cert", "insecure-listen"}},
		{"debug beyond loopback", []string{"--debug-addr", "10.0.0.1:6060"}, "", []string{"10.0.0.1:6060", "loopback"}},
		{"range", []string{"--network-range", "8.8.0.0/16"}, "", []string{"8.8.0.0/16", "private"}},
		{"range that leaves the private ones", []string{"--network-range", "192.168.0.0/12"}, "", []string{"192.168.0.0/12", "private"}},
		{"range too wide", []string{"--network-range", "10.0.0.0/8"}, "", []string{"/12 to /24"}},
		{"denied range", []string{"--network-deny", "fd00::/8"}, "", []string{"fd00::/8", "192.168.0.0/16"}},
		{"one of two TLS files", []string{"--tls-cert", "a.pem"}, "", []string{"both or neither"}},
		{"level", []string{"--log-level", "loud"}, "", []string{"loud", "debug"}},
		{"pool", []string{"--pool-min", "9", "--pool-max", "3"}, "", []string{"pool-max 3"}},
		{"resolver", []string{"--resolvers", "127.0.0.53"}, "", []string{"127.0.0.53"}},
		{"cluster port", []string{"--cluster-addr", "3003"}, "", []string{`"3003"`, ":3003"}},
		{"advertised without a host", []string{"--cluster-advertise", ":3003"}, "", []string{"cluster-advertise", "HOST:PORT"}},
		{"address of a node that does not listen", []string{"--node-addr", "", "--node-address", "192.0.2.7"}, "", []string{"192.0.2.7", "node-addr"}},
		{"address of a node", []string{"--node-address", "a b"}, "", []string{`"a b"`, "192.0.2.7"}},
		{"label", []string{"--node-labels", "rack"}, "", []string{"rack", "KEY=VALUE"}},
		{"own label", []string{"--node-labels", "cloister.dev/x=1"}, "", []string{"cloister.dev/", "choose another"}},
		{"certificate grace", []string{"--certificate-grace", "-1s"}, "", []string{"certificate-grace -1s", "0s"}},
		{"certificate life", []string{"--certificate-life", "1s"}, "", []string{"certificate-life 1s", "10s"}},
		{"replicas", []string{"--snapshot-replicas", "0"}, "", []string{"snapshot-replicas 0", "1 to"}},
		{"placement", []string{"--template-placement", "some"}, "", []string{"some", "on_demand"}},
		{"bucket without endpoint", []string{"--s3-bucket", "b", "--s3-access-key", "a"}, "", []string{"s3-endpoint", "s3-secret-key"}},
		{"endpoint without bucket", []string{"--s3-endpoint", "http://h"}, "", []string{"s3-bucket is not"}},
		{"unknown key", nil, "data-dirr: /x\n", []string{"line 1", "data-dirr"}},
		{"bad size", nil, "sandbox-memory: lots\n", []string{"lots", "512MiB"}},
		{"nested", nil, "pool-max: {a: 1}\n", []string{"plain value"}},
		{"no YAML", nil, ":\n  - [", []string{"yaml"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			args := tc.args
			if tc.file != "" {
				args = append(args, "--config", write(t, tc.file))
			}
			_, err := load(t, nil, args...)
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
		})
	}
}

func TestPlacementCount(t *testing.T) {
	for text, want := range map[string]int{"on_demand": 0, "all": -1, "3": 3} {
		c, err := load(t, nil, "--template-placement", text)
		if err != nil || c.PlacementCount() != want {
			t.Errorf("template-placement %s: %v, %v; want %d", text, c, err, want)
		}
	}
}

func TestRedacted(t *testing.T) {
	c, err := load(t, nil, "--registry-password", "hush")
	if err != nil {
		t.Fatal(err)
	}
	if text := c.Redacted(); strings.Contains(text, "hush") || !strings.Contains(text, "pool-max: 32") {
		t.Errorf("redacted settings: %s", text)
	}
}

func TestReferencePage(t *testing.T) {
	page := filepath.Join("..", "..", "docs", "reference", "config.md")
	if *update {
		if err := os.MkdirAll(filepath.Dir(page), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(page, []byte(config.Reference()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(text), config.Reference()); diff != "" {
		t.Errorf("the page is out of date; `go test ./internal/config -update` writes it (-page +code):\n%s", diff)
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]config.Size{"512MiB": 512 << 20, "1.5g": 3 << 29, "4096": 4096, "0": 0, " 2 KB ": 2048} {
		if got, err := config.ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "-1", "1x", "NaN", "9999999999TiB", "Inf"} {
		if got, err := config.ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", text, got)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"512MiB", "1e3g", "-0", "0x1p4", "+Inf"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n, err := config.ParseSize(text)
		if err != nil {
			return
		}
		if n < 0 {
			t.Fatalf("ParseSize(%q) = %d", text, n)
		}
		if again, err := config.ParseSize(n.String()); err != nil || again != n {
			t.Fatalf("ParseSize(%q) = %d, written as %s, read as %d, %v", text, n, n.String(), again, err)
		}
	})
}

func FuzzFile(f *testing.F) {
	f.Add("pool-max: 5\n")
	f.Add("base-sources: [a, b]\n")
	f.Add("a: &x [*x]\n")
	f.Fuzz(func(t *testing.T, text string) {
		_, _ = load(t, nil, "--config", write(t, text)) // any error will do, a panic will not
	})
}
