package api_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/control"
)

func FuzzRequests(f *testing.F) {
	f.Add("POST", "/v2/sandboxes", `{"templateID":"base","timeout":5}`)
	f.Add("POST", "/v1/sandboxes", `{"resources":{"milli_cpu":1e3}}`)
	f.Add("GET", "/v2/sandboxes?metadata=k%252520a%3Dv%2525261&nextToken=AQ&state=running", "")
	f.Add("GET", "/v1/events?after=-1&since=x", "")
	f.Add("POST", "/sandboxes/x/timeout", `{"timeout":1e99}`)
	f.Add("DELETE", "/templates/team%2Fsnap%3Atag", "")
	cluster := apitest.NewCluster(f, nil)
	c := &caller{handler: cluster.Handler(), key: cluster.Key(f)}
	f.Fuzz(func(t *testing.T, method, target, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || !strings.HasPrefix(target, "/") || len(method) > 10 {
			return
		}
		r := &http.Request{
			Method: method, URL: u, RequestURI: target, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Host: "api.test",
			Header: http.Header{"X-Api-Key": {c.key}}, Body: io.NopCloser(strings.NewReader(body)), ContentLength: -1,
		}
		w := httptest.NewRecorder()
		c.handler.ServeHTTP(w, r.WithContext(t.Context()))
		if w.Code == http.StatusInternalServerError {
			t.Fatalf("%s %s %q: %s", method, target, body, w.Body)
		}
	})
}

func BenchmarkCreate(b *testing.B) {
	cluster := apitest.NewCluster(b, nil)
	c := &caller{handler: cluster.Handler(), key: cluster.Key(b)}
	b.ReportAllocs()
	for b.Loop() {
		if w := c.do("POST", "/v2/sandboxes", `{"templateID":"base","timeout":300,"metadata":{"user":"ann"},"envVars":{"A":"b"}}`); w.Code != 201 {
			b.Fatal(w.Body)
		}
	}
}

func BenchmarkList(b *testing.B) {
	cluster := apitest.NewCluster(b, nil)
	for range 10_000 {
		if _, err := cluster.Control.Create(b.Context(), control.CreateRequest{Timeout: time.Hour, Metadata: map[string]string{"a": "b"}}); err != nil {
			b.Fatal(err)
		}
	}
	c := &caller{handler: cluster.Handler(), key: cluster.Key(b)}
	for _, query := range []string{"limit=100", "limit=100&metadata=a%3Dc"} {
		b.Run(query, func(b *testing.B) {
			for b.Loop() {
				if w := c.do("GET", "/v2/sandboxes?"+query, ""); w.Code != 200 {
					b.Fatal(w.Body)
				}
			}
		})
	}
}
