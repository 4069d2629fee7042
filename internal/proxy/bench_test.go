package proxy

import (
	"io"
	"log/slog"
	"net/http"
	"testing"
)

// BenchmarkKeepAlive asks for 1 KiB over one connection, directly and through the proxy.
func BenchmarkKeepAlive(b *testing.B) {
	quiet := func(c *Config) { c.Logger = slog.New(slog.DiscardHandler) }
	answer := make([]byte, 1024)
	r := newRig(b, quiet)
	guest := r.listen(b, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(answer) }))
	for name, url := range map[string]string{"direct": guest.URL, "proxy": "http://" + r.addr} {
		b.Run(name, func(b *testing.B) {
			c := client(b)
			req := r.request(b, http.MethodGet, "/", nil, toGuest("8000")...)
			u, err := req.URL.Parse(url)
			if err != nil {
				b.Fatal(err)
			}
			req.URL = u
			b.ReportAllocs()
			for b.Loop() {
				res, err := c.Do(req)
				if err != nil {
					b.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
		})
	}
}

// BenchmarkParse routes by each form.
func BenchmarkParse(b *testing.B) {
	ru := newRules("sbx.test", []string{"box.test"})
	heads := map[string]head{
		"host":   {host: "49983-" + string(testID) + ".sbx.test", path: "/x"},
		"header": {host: "127.0.0.1:3002", path: "/x", ids: []string{string(testID)}, ports: []string{"8000"}},
		"path":   {host: "127.0.0.1:3002", path: "/sandbox/" + string(testID) + "/8000/x"},
	}
	for name, h := range heads {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ru.parse(h); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
