package e2b

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestParseMetadata(t *testing.T) {
	tests := []struct {
		in   string
		want map[string]string
	}{
		{"", nil},
		{"k%2520a=v%25261", map[string]string{"k a": "v&1"}},
		{"user=abc&app=prod", map[string]string{"user": "abc", "app": "prod"}},
		{"a=", map[string]string{"a": ""}},
		{"a=%252B", map[string]string{"a": "+"}},
		{"a=%2B", map[string]string{"a": "+"}},
	}
	for _, tt := range tests {
		got, err := parseMetadata(tt.in)
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("%q: %v\n%s", tt.in, err, diff)
		}
	}
	for _, in := range []string{"%", "a=%25", "a=b;c=d", "a=1&a=2"} {
		if got, err := parseMetadata(in); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q was read as %v, %v", in, got, err)
		}
	}
}

// What a client encodes must come out as it was.
func FuzzMetadata(f *testing.F) {
	f.Add("k a", "v&1", "user=abc")
	f.Add("%", "+;=", "%zz")
	f.Fuzz(func(t *testing.T, key, value, raw string) {
		if got, err := parseMetadata(raw); err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Fatalf("%q: %v, %v", raw, got, err)
		}
		inner := url.Values{url.PathEscape(key): {url.PathEscape(value)}}
		got, err := parseMetadata(inner.Encode())
		if err != nil || got[key] != value {
			t.Fatalf("%q=%q came out as %v, %v", key, value, got, err)
		}
	})
}

func FuzzListQuery(f *testing.F) {
	f.Add("metadata=k%252520a%3Dv%2525261&state=running,paused&limit=5&nextToken=AQ&order=asc&startedAfter=2025-01-01T00:00:00.000Z&template=base")
	f.Add("state=,,&limit=+1")
	f.Fuzz(func(t *testing.T, query string) {
		r := httptest.NewRequest(http.MethodGet, "/v2/sandboxes", nil)
		r.URL.RawQuery = query
		q, err := listQuery(r)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Fatalf("%q: %v", query, err)
			}
			return
		}
		if q.Limit < 1 || q.Limit > maxPage || len(q.Metadata) > maxFilters || len(q.States) == 0 {
			t.Fatalf("%q was read as %+v", query, q)
		}
	})
}
