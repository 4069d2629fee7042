package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/proxy"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	guestID    = sandbox.ID("i0node0abcdefghijklm")
	guestPort  = 8000
	transfer   = 100 << 20
	smallBytes = 1 << 10
)

// guest is the one sandbox of these measurements: a server on loopback.
type guest struct{ addr string }

func (guest) Route(_ context.Context, id sandbox.ID) (sandbox.Route, error) {
	return sandbox.Route{ID: id, State: sandbox.StateRunning, Generation: 1}, nil
}

// Await waits for news, of which there is none.
func (guest) Await(ctx context.Context, _ sandbox.ID, _ sandbox.Route) (sandbox.Route, error) {
	<-ctx.Done()
	return sandbox.Route{}, ctx.Err()
}

// Wake has nothing to do.
func (g guest) Wake(ctx context.Context, id sandbox.ID) (sandbox.Route, error) {
	return g.Route(ctx, id)
}

func (g guest) DialGuest(ctx context.Context, _ sandbox.NodeID, _ sandbox.ID, _ uint16) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", g.addr)
}

// answer serves n bytes for a GET of /n and swallows what else it is sent.
func answer(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		buf := make([]byte, 256<<10)
		n, err := io.CopyBuffer(onlyWriter{io.Discard}, r.Body, buf)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		_, _ = fmt.Fprint(w, n)
		return
	}
	var n int64
	if _, err := fmt.Sscanf(r.URL.Path, "/%d", &n); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	piece := make([]byte, min(n, 256<<10))
	for ; n > 0; n -= int64(len(piece)) {
		_, _ = w.Write(piece[:min(n, int64(len(piece)))])
	}
}

type onlyWriter struct{ io.Writer }

// rig is a guest, with a proxy before it.
type rig struct{ direct, proxied string }

func newRig(b *testing.B) rig {
	b.Helper()
	srv := httptest.NewServer(http.HandlerFunc(answer))
	b.Cleanup(srv.Close)
	g := guest{addr: srv.Listener.Addr().String()}
	p, err := proxy.New(proxy.Config{Router: g, Dialer: g, DrainTimeout: time.Second})
	if err != nil {
		b.Fatal(err)
	}
	ln, err := (&net.ListenConfig{}).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx, ln, proxy.ServeOptions{}) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return rig{direct: srv.URL, proxied: "http://" + ln.Addr().String()}
}

// each runs a benchmark for each way to the guest: directly, and by HTTP/1.1 and HTTP/2 through the proxy.
func (r rig) each(b *testing.B, run func(*testing.B, *http.Client, string)) {
	b.Helper()
	for _, way := range []struct {
		name, url string
		h2        bool
	}{{"direct", r.direct, false}, {"proxy", r.proxied, false}, {"proxy-h2", r.proxied, true}} {
		b.Run("via="+way.name, func(b *testing.B) {
			var protocols http.Protocols
			protocols.SetHTTP1(!way.h2)
			protocols.SetUnencryptedHTTP2(way.h2)
			tr := &http.Transport{DisableCompression: true, Protocols: &protocols, ReadBufferSize: 256 << 10, WriteBufferSize: 256 << 10}
			defer tr.CloseIdleConnections()
			run(b, &http.Client{Transport: tr}, way.url)
		})
	}
}

func send(b *testing.B, c *http.Client, method, url string, body []byte) {
	b.Helper()
	var reader io.Reader
	if body != nil {
		reader = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(b.Context(), method, url, reader)
	if err != nil {
		b.Fatal(err)
	}
	req.Header.Set("E2b-Sandbox-Id", string(guestID))
	req.Header.Set("E2b-Sandbox-Port", strconv.Itoa(guestPort))
	res, err := c.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	buf := make([]byte, 256<<10)
	n, err := io.CopyBuffer(onlyWriter{io.Discard}, res.Body, buf)
	if err != nil || res.StatusCode != http.StatusOK {
		b.Fatalf("status %d, %d bytes, %v", res.StatusCode, n, err)
	}
}

// latency measures requests one at a time and reports percentiles.
func latency(b *testing.B, one func()) {
	b.Helper()
	for range 200 {
		one() // to warm the connection up
	}
	times := make([]time.Duration, 0, b.N)
	b.ResetTimer()
	for range b.N {
		start := time.Now()
		one()
		times = append(times, time.Since(start))
	}
	b.StopTimer()
	slices.Sort(times)
	at := func(q float64) float64 { return float64(times[int(q*float64(len(times)-1))].Nanoseconds()) }
	b.ReportMetric(at(.50), "p50-ns")
	b.ReportMetric(at(.99), "p99-ns")
}

// BenchmarkGet is a small answer.
func BenchmarkGet(b *testing.B) {
	newRig(b).each(b, func(b *testing.B, c *http.Client, url string) {
		b.Helper()
		latency(b, func() { send(b, c, http.MethodGet, fmt.Sprint(url, "/", smallBytes), nil) })
	})
}

// BenchmarkPost is a small request with a body, as each call of an SDK is.
func BenchmarkPost(b *testing.B) {
	body := make([]byte, smallBytes)
	newRig(b).each(b, func(b *testing.B, c *http.Client, url string) {
		b.Helper()
		latency(b, func() { send(b, c, http.MethodPost, url, body) })
	})
}

// BenchmarkDownload moves 100 MB from the guest.
func BenchmarkDownload(b *testing.B) {
	newRig(b).each(b, func(b *testing.B, c *http.Client, url string) {
		b.Helper()
		b.SetBytes(transfer)
		for b.Loop() {
			send(b, c, http.MethodGet, fmt.Sprint(url, "/", transfer), nil)
		}
	})
}

// BenchmarkUpload moves 100 MB to the guest.
func BenchmarkUpload(b *testing.B) {
	body := make([]byte, transfer)
	newRig(b).each(b, func(b *testing.B, c *http.Client, url string) {
		b.Helper()
		b.SetBytes(transfer)
		for b.Loop() {
			send(b, c, http.MethodPost, url, body)
		}
	})
}

// BenchmarkConcurrent is a small answer with 64 requests open at a time.
func BenchmarkConcurrent(b *testing.B) {
	newRig(b).each(b, func(b *testing.B, c *http.Client, url string) {
		b.Helper()
		if tr, ok := c.Transport.(*http.Transport); ok {
			tr.MaxIdleConnsPerHost = 64
		}
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				send(b, c, http.MethodGet, fmt.Sprint(url, "/", smallBytes), nil)
			}
		})
	})
}
