// Package bucket keeps files in an S3-compatible object store, for the case that a node is lost.
//
// It owns the connection to one bucket and the names below one prefix in it. It must not know what the files are, and never
// logs or returns the credentials. A Bucket is safe for concurrent use.
package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// partBytes is how much of a file whose size is not known ahead is in memory at a time. It bounds such a file at 10,000
// parts, 156 GiB.
const partBytes = 16 << 20

// Config says where the bucket is. All fields but Region, Prefix, AccessKey and SecretKey are required.
type Config struct {
	// Endpoint is the service's URL, "https://s3.example.com" or "http://10.0.0.1:9000".
	Endpoint string
	// Bucket is the bucket's name; it must exist.
	Bucket string
	// Prefix is put before each name, with a slash between; empty means none.
	Prefix string
	// Region is that of the bucket; empty asks the service.
	Region string
	// AccessKey and SecretKey are what requests are signed with. Both empty means unsigned requests.
	AccessKey, SecretKey string
	// Transport carries the requests. Default: the client library's.
	Transport http.RoundTripper
}

// String leaves the keys out.
func (c Config) String() string { return c.Endpoint + "/" + c.Bucket + "/" + c.Prefix }

// Bucket is the names below the prefix.
type Bucket struct {
	client *minio.Client
	name   string
	prefix string
}

// New returns the bucket of a configuration. It does not connect. Errors: ErrInvalid.
func New(cfg Config) (*Bucket, error) {
	u, err := url.Parse(cfg.Endpoint)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.Path != "" && u.Path != "/" || u.User != nil {
		return nil, sandbox.Invalidf("bucket endpoint %.200q: want https://HOST or http://HOST, and nothing behind it", redacted(cfg.Endpoint))
	}
	if (cfg.AccessKey == "") != (cfg.SecretKey == "") {
		return nil, sandbox.Invalidf("bucket %.80q: want both an access key and a secret key, or neither", cfg.Bucket)
	}
	prefix := strings.Trim(cfg.Prefix, "/")
	if prefix != "" && path.Clean(prefix) != prefix {
		return nil, sandbox.Invalidf("bucket prefix %.200q: want names with single slashes between them", cfg.Prefix)
	}
	opts := &minio.Options{Secure: u.Scheme == "https", Region: cfg.Region, Transport: cfg.Transport}
	if cfg.AccessKey != "" {
		opts.Creds = credentials.NewStaticV4(cfg.AccessKey, cfg.SecretKey, "")
	}
	client, err := minio.New(u.Host, opts)
	if err != nil {
		return nil, sandbox.Invalidf("bucket %.80q at %s: %v", cfg.Bucket, u.Host, err)
	}
	if cfg.Bucket == "" || strings.Contains(cfg.Bucket, "/") {
		return nil, sandbox.Invalidf("bucket name %.80q: want a plain name", cfg.Bucket)
	}
	return &Bucket{client: client, name: cfg.Bucket, prefix: prefix}, nil
}

// redacted takes a user and a password out of a URL that somebody put them into.
func redacted(endpoint string) string {
	if _, rest, ok := strings.Cut(endpoint, "@"); ok {
		return rest
	}
	return endpoint
}

// Put writes a file of that many bytes, or of unknown length where size is -1; it counts when Put returns without error.
func (b *Bucket) Put(ctx context.Context, name string, r io.Reader, size int64) error {
	// Parts carry a checksum of their own. Signing the contents as well takes a framing that not every service reads.
	opts := minio.PutObjectOptions{ContentType: "application/octet-stream", DisableContentSha256: true}
	if size < 0 {
		opts.PartSize = partBytes
	}
	if _, err := b.client.PutObject(ctx, b.name, b.key(name), r, size, opts); err != nil {
		return fmt.Errorf("write %s to bucket %s: %w", name, b.name, explain(ctx, err))
	}
	return nil
}

// Get returns a file from an offset on. ErrNotFound where there is none.
func (b *Bucket) Get(ctx context.Context, name string, from int64) (io.ReadCloser, error) {
	opts := minio.GetObjectOptions{}
	if from > 0 {
		if err := opts.SetRange(from, 0); err != nil {
			return nil, sandbox.Invalidf("read %s of bucket %s from %d: %v", name, b.name, from, err)
		}
	}
	core := minio.Core{Client: b.client}
	body, _, _, err := core.GetObject(ctx, b.name, b.key(name), opts)
	if err != nil {
		return nil, fmt.Errorf("read %s of bucket %s: %w", name, b.name, explain(ctx, err))
	}
	return body, nil
}

// List returns the names that begin with a prefix, in their order.
func (b *Bucket) List(ctx context.Context, prefix string) ([]string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	base := b.key("")
	var names []string
	for o := range b.client.ListObjects(ctx, b.name, minio.ListObjectsOptions{Prefix: base + prefix, Recursive: true}) {
		if o.Err != nil {
			return nil, fmt.Errorf("list %s in bucket %s: %w", prefix, b.name, explain(ctx, o.Err))
		}
		names = append(names, strings.TrimPrefix(o.Key, base))
	}
	return names, nil
}

// Remove deletes a file. What is not there is no error.
func (b *Bucket) Remove(ctx context.Context, name string) error {
	err := b.client.RemoveObject(ctx, b.name, b.key(name), minio.RemoveObjectOptions{})
	if err = explain(ctx, err); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return fmt.Errorf("remove %s from bucket %s: %w", name, b.name, err)
	}
	return nil
}

func (b *Bucket) key(name string) string {
	if b.prefix == "" {
		return name
	}
	return b.prefix + "/" + name
}

// explain gives an answer of the service its kind. What the service says is kept: it holds no credentials.
func explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	resp := minio.ToErrorResponse(err)
	switch resp.StatusCode {
	case http.StatusNotFound:
		return sandbox.NotFoundf("the bucket says: %v", err)
	case http.StatusForbidden, http.StatusUnauthorized:
		return sandbox.Deniedf("the bucket says: %v", err)
	case http.StatusBadRequest, http.StatusRequestedRangeNotSatisfiable:
		return sandbox.Invalidf("the bucket says: %v", err)
	}
	return sandbox.Unavailablef("the bucket does not answer: %v", err)
}
