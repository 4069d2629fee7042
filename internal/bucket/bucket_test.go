package bucket

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const secret = "very-secret-key"

// open returns a bucket of a service on loopback.
func open(t *testing.T, change ...func(*Config)) *Bucket {
	t.Helper()
	backend := s3mem.New()
	if err := backend.CreateBucket("kept"); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(gofakes3.New(backend, gofakes3.WithLogger(gofakes3.DiscardLog())).Server())
	t.Cleanup(srv.Close)
	cfg := Config{
		Endpoint: srv.URL, Bucket: "kept", Prefix: "/some/cluster/", Region: "us-east-1", AccessKey: "key", SecretKey: secret,
		Transport: srv.Client().Transport,
	}
	for _, f := range change {
		f(&cfg)
	}
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func read(t *testing.T, b *Bucket, name string, from int64) string {
	t.Helper()
	body, err := b.Get(t.Context(), name, from)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(body)
	if err := errors.Join(err, body.Close()); err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestFiles(t *testing.T) {
	b := open(t)
	if err := b.Put(t.Context(), "a/one", strings.NewReader("0123456789"), 10); err != nil {
		t.Fatal(err)
	}
	long := bytes.Repeat([]byte("x"), partBytes+100)
	if err := b.Put(t.Context(), "a/two", io.MultiReader(bytes.NewReader(long)), -1); err != nil {
		t.Fatal(err)
	}
	if got := read(t, b, "a/one", 0) + " " + read(t, b, "a/one", 7); got != "0123456789 789" {
		t.Errorf("read %q", got)
	}
	if got := read(t, b, "a/two", 1); got != string(long[1:]) {
		t.Errorf("read %d bytes", len(got))
	}
	names, err := b.List(t.Context(), "a/")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a/one", "a/two"}, names); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	for range 2 {
		if err := b.Remove(t.Context(), "a/one"); err != nil {
			t.Error(err)
		}
	}
	if _, err := b.Get(t.Context(), "a/one", 0); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("read what is removed: %v", err)
	}
}

func TestWhatFails(t *testing.T) {
	b := open(t, func(c *Config) { c.Bucket = "absent" })
	err := b.Put(t.Context(), "a", strings.NewReader("1"), 1)
	if !errors.Is(err, sandbox.ErrNotFound) || strings.Contains(err.Error(), secret) {
		t.Errorf("write to a bucket that does not exist: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrNoProgress)
	if err := open(t).Put(ctx, "a", strings.NewReader("1"), 1); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("write while nobody waits: %v", err)
	}
}

func TestConfig(t *testing.T) {
	good := Config{Endpoint: "https://s3.test", Bucket: "b", AccessKey: "a", SecretKey: secret}
	if text := slog.AnyValue(good).String(); strings.Contains(text, secret) {
		t.Errorf("the configuration prints as %s", text)
	}
	for name, change := range map[string]func(*Config){
		"scheme":   func(c *Config) { c.Endpoint = "s3.test" },
		"path":     func(c *Config) { c.Endpoint = "https://s3.test/b" },
		"user":     func(c *Config) { c.Endpoint = "https://a:" + secret + "@s3.test" },
		"name":     func(c *Config) { c.Bucket = "" },
		"slash":    func(c *Config) { c.Bucket = "a/b" },
		"half key": func(c *Config) { c.AccessKey = "" },
		"prefix":   func(c *Config) { c.Prefix = "a/../b" },
	} {
		c := good
		change(&c)
		if _, err := New(c); !errors.Is(err, sandbox.ErrInvalid) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
}
