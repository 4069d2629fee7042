package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// stallTimeout is how long a registry may send nothing in the middle of an answer.
const stallTimeout = time.Minute

func (b *build) fromRegistry(ctx context.Context) error {
	ref, err := name.ParseReference(b.source.Ref)
	if err != nil {
		return sandbox.Invalidf("image reference %q: %v", b.source.Ref, err)
	}
	ctx, watch := newWatch(ctx, ref.Context().RegistryStr(), b.store.cfg.AnswerTimeout)
	defer watch.stop()
	b.report(Progress{Step: "pull", Message: "asking " + ref.Context().RegistryStr()})
	img, err := remote.Image(ref, remoteOptions(ctx, watch, b.req.Username, b.req.Password)...)
	if err != nil {
		return registryError(ctx, "pull", err)
	}
	if digest, err := img.Digest(); err == nil {
		b.image.Resolved = ref.Context().Name() + "@" + digest.String()
	}
	c, err := fromV1(img)
	if err != nil {
		return registryError(ctx, "pull", err)
	}
	return registryError(ctx, "pull", b.unpack(ctx, c))
}

func remoteOptions(ctx context.Context, watch *watch, username, password string) []remote.Option {
	auth := remote.WithAuthFromKeychain(authn.DefaultKeychain)
	if username != "" || password != "" {
		auth = remote.WithAuth(authn.FromConfig(authn.AuthConfig{Username: username, Password: password}))
	}
	return []remote.Option{
		remote.WithContext(ctx), auth, remote.WithTransport(watch), remote.WithUserAgent("cloister"),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}),
		remote.WithRetryBackoff(remote.Backoff{Duration: 200 * time.Millisecond, Factor: 3, Jitter: 0.1, Steps: 3}),
	}
}

func fromV1(img v1.Image) (*container, error) {
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	c := &container{config: config}
	for _, l := range layers {
		size, err := l.Size()
		if err != nil {
			return nil, err
		}
		c.layers = append(c.layers, layer{size: size, open: l.Compressed})
	}
	return c, nil
}

// registryError gives what a registry said its kind. verb is what was asked of it, "pull" or "push".
func registryError(ctx context.Context, verb string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var answer *transport.Error
	var network net.Error
	switch {
	case errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden):
		return sandbox.Deniedf("the registry refused: %v; give a user name and password that may %s", err, verb)
	case errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound && verb == "push":
		return sandbox.NotFoundf("the registry has no such repository: %v", err)
	case errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound:
		return sandbox.NotFoundf("the registry has no such image: %v", err)
	case errors.As(err, &answer), errors.As(err, &network):
		return sandbox.Unavailablef("the registry cannot serve: %v", err)
	}
	return err
}

// watch is a transport that ends a conversation whose first answer does not come in time, or that stalls.
type watch struct {
	inner    http.RoundTripper
	cancel   context.CancelCauseFunc
	first    *time.Timer
	answered atomic.Bool
	idle     *http.Transport
}

func newWatch(ctx context.Context, registry string, timeout time.Duration) (context.Context, *watch) {
	ctx, cancel := context.WithCancelCause(ctx)
	t := &http.Transport{
		Proxy:       http.ProxyFromEnvironment,
		DialContext: (&net.Dialer{Timeout: timeout}).DialContext, TLSHandshakeTimeout: timeout,
		ResponseHeaderTimeout: stallTimeout, ForceAttemptHTTP2: true, IdleConnTimeout: stallTimeout,
	}
	return ctx, &watch{inner: t, idle: t, cancel: cancel, first: time.AfterFunc(timeout, func() {
		cancel(sandbox.Unavailablef("registry %s gave no answer within %s", registry, timeout))
	})}
}

func (w *watch) stop() {
	w.first.Stop()
	w.cancel(nil)
	w.idle.CloseIdleConnections()
}

// RoundTrip implements http.RoundTripper.
func (w *watch) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil && req.Body != http.NoBody {
		req = req.Clone(req.Context())
		req.Body = w.watchSent(req)
	}
	resp, err := w.inner.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if !w.answered.Swap(true) {
		w.first.Stop()
	}
	host := req.URL.Host
	resp.Body = &watchedBody{ReadCloser: resp.Body, timer: time.AfterFunc(stallTimeout, func() {
		w.cancel(sandbox.Unavailablef("registry host %s sent nothing for %s", host, stallTimeout))
	})}
	resp.Body.(*watchedBody).timer.Stop() //nolint:forcetypeassert,errcheck // made above
	return resp, nil
}

// watchSent ends the conversation when the registry stops taking what is sent.
func (w *watch) watchSent(req *http.Request) io.ReadCloser {
	host := req.URL.Host
	timer := time.AfterFunc(stallTimeout, func() {
		w.cancel(sandbox.Unavailablef("registry host %s took nothing for %s", host, stallTimeout))
	})
	timer.Stop()
	return &sentBody{ReadCloser: req.Body, timer: timer}
}

// sentBody runs its timer between reads: while the network has the bytes.
type sentBody struct {
	io.ReadCloser
	timer *time.Timer
}

func (b *sentBody) Read(p []byte) (int, error) {
	b.timer.Stop()
	n, err := b.ReadCloser.Read(p)
	if err == nil {
		b.timer.Reset(stallTimeout)
	}
	return n, err
}

func (b *sentBody) Close() error {
	b.timer.Stop()
	return b.ReadCloser.Close()
}

// watchedBody runs its timer only while a read waits.
type watchedBody struct {
	io.ReadCloser
	timer *time.Timer
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.timer.Reset(stallTimeout)
	defer b.timer.Stop()
	n, err := b.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("read from the registry: %w", err)
	}
	return n, err
}
