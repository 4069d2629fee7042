package proxy

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

var (
	specHost   = regexp.MustCompile(`^([0-9]+)-([^.-]*)(?:-[^.]*)?\.(.+)$`)
	specPath   = regexp.MustCompile(`^/sandbox/([^/]*)(?:/([^/]*)((?:/.*)?))?$`)
	specID     = regexp.MustCompile(`^[a-z0-9]{1,64}$`)
	specLongID = regexp.MustCompile(`^([a-z0-9]{1,64})(?:-[a-z0-9]{1,64})?$`)
	specPort   = regexp.MustCompile(`^[0-9]{1,5}$`)
)

func specPortOf(s string) (uint16, bool) {
	n, err := strconv.Atoi(s)
	return uint16(n), err == nil && specPort.MatchString(s) && n >= 1 && n <= 65535
}

func FuzzHost(f *testing.F) {
	for _, s := range []string{
		"49983-abc.sbx.test", "49983-abc-00000000.sbx.test:8443", "0-abc.d", "65536-abc.d", "80-.d", "80-a_b.d", "80-abc", "-abc.d", "80.d", "80-abc..",
		"080-abc.d.", "[::1]:80", "127.0.0.1", "localhost", "sandbox.d", "80-ABC.D", "80-abc.sbx.test.", "1-2.3", "+1-a.d", "٣-a.d", "80-a:b.d", "a:80-b.c:1",
	} {
		f.Add(s, "")
		f.Add(s, "sbx.test")
	}
	f.Fuzz(func(t *testing.T, host, domain string) {
		got, err := newRules(domain, nil).parse(head{host: host, path: "/"})
		name := hostname(host)
		m := specHost.FindStringSubmatch(name)
		_, notIP := netip.ParseAddr(name)
		shared := name == "localhost" || notIP == nil || (strings.HasPrefix(name, "sandbox.") && len(name) > len("sandbox."))
		want := hostname(domain)
		if shared || m == nil || (want != "" && m[3] != want) {
			if err == nil {
				t.Fatalf("host %q, domain %q: %+v, want an error", host, domain, got)
			}
			return
		}
		port, okPort := specPortOf(m[1])
		if !okPort || !specID.MatchString(m[2]) {
			if err == nil {
				t.Fatalf("host %q: %+v, want an error", host, got)
			}
			return
		}
		if err != nil || got.id != sandbox.ID(m[2]) || got.port != port || got.form != formHost {
			t.Fatalf("host %q: %+v %v, want %s port %d", host, got, err, m[2], port)
		}
	})
}

func FuzzHeaders(f *testing.F) {
	f.Add("abc", "80", false)
	f.Add("abc-6532", "", false)
	f.Add("abc-", "65536", true)
	f.Add("../x", "-1", false)
	f.Add("", "080", false)
	f.Add("abc", "+80", false)
	f.Add(strings.Repeat("a", 65), "1", false)
	f.Fuzz(func(t *testing.T, id, port string, twice bool) {
		h := head{host: "localhost:3002", path: "/", ids: []string{id}, ports: []string{port}}
		if twice {
			h.ids = append(h.ids, id)
		}
		got, err := newRules("", nil).parse(h)
		m := specLongID.FindStringSubmatch(id)
		want, ok := specPortOf(port)
		if port == "" {
			want, ok = GuestAgentPort, true
		}
		if m == nil || !ok || twice {
			if err == nil {
				t.Fatalf("id %q, port %q, twice %v: %+v, want an error", id, port, twice, got)
			}
			return
		}
		if err != nil || got.id != sandbox.ID(m[1]) || got.port != want || got.form != formHeader || got.path != "/" {
			t.Fatalf("id %q, port %q: %+v %v, want %s port %d", id, port, got, err, m[1], want)
		}
		other, err := newRules("", nil).parse(head{host: "evil.test", path: "/", ids: h.ids, ports: h.ports})
		if err == nil {
			t.Fatalf("headers counted on a host that is not shared: %+v", other)
		}
	})
}

// FuzzPath goes all the way from a request's target to the one that the guest would see.
func FuzzPath(f *testing.F) {
	for _, s := range []string{
		"/sandbox/abc/80/x", "/sandbox/abc/80", "/sandbox/abc/80//../../def/90/", "/sandbox/abc%2f80/x", "/sandbox//80/", "/sandbox/abc", "/%73andbox/abc/80/",
		"/sandbox/../sandbox/abc/80/x", "/sandbox/abc/80/%2e%2e/%2f%00", "/sandbox/abc-12/80/?q=%zz", "/sandbox/ABC/80/", "/sandbox/abc/0/", "/sandbox/abc/80/a b",
		"/sandbox/abc/49983/%69nit", "/sandbox/abc/80/;x", "//sandbox/abc/80/", "/sandbox/abc/80/é",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || !strings.HasPrefix(target, "/") {
			return
		}
		h, err := headOf(&http.Request{Method: http.MethodGet, Host: "localhost", URL: u})
		if err != nil {
			t.Fatalf("%q: %v", target, err)
		}
		got, err := newRules("", nil).parse(h)
		m := specPath.FindStringSubmatch(h.path)
		if m == nil {
			if err == nil && got.form != formOwn && got.form != formSignature {
				t.Fatalf("%q: %+v, want an error", target, got)
			}
			return
		}
		id := specLongID.FindStringSubmatch(m[1])
		port, ok := specPortOf(m[2])
		if id == nil || !ok {
			if err == nil {
				t.Fatalf("%q: %+v, want an error", target, got)
			}
			return
		}
		rest := m[3]
		if rest == "" {
			rest = "/"
		}
		if err != nil || got.id != sandbox.ID(id[1]) || got.port != port || got.path != rest || got.prefix+m[3] != h.path {
			t.Fatalf("%q: %+v %v, want %s port %d path %q", target, got, err, id[1], port, rest)
		}
		out := guestURL(got, u)
		if out.EscapedPath() != rest || out.RawQuery != u.RawQuery || out.Host != id[1]+":"+m[2] && out.Host != guestAddr(got) {
			t.Fatalf("%q: the guest would see %q", target, out)
		}
	})
}

// FuzzInternalRoute compares with what Go's own mux would do with the path, with and without its cleaning.
func FuzzInternalRoute(f *testing.F) {
	for _, s := range []string{"/init", "//init", "/%69nit", "/x/../init", "/%2569nit", "/init/", "/files", "/%2finit", "/./logs", `/\init`, "/INIT", "/a%2f..%2finit", "/init%00"} {
		f.Add(s)
	}
	reached := false
	mux := http.NewServeMux()
	for _, p := range []string{"/init", "/init/{rest...}", "/logs", "/loopback", "/copy", "/accounts", "/freeze"} {
		mux.HandleFunc(p, func(http.ResponseWriter, *http.Request) { reached = true })
	}
	f.Fuzz(func(t *testing.T, target string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || !strings.HasPrefix(target, "/") {
			return
		}
		reached = false
		for _, p := range []string{u.Path, path.Clean(u.Path), strings.ToLower(u.Path), strings.TrimRight(u.Path, "/")} {
			v := &url.URL{Path: p}
			if p == u.Path {
				v.RawPath = u.RawPath
			}
			mux.ServeHTTP(httptest.NewRecorder(), &http.Request{Method: http.MethodPost, Host: "x", URL: v, RequestURI: v.RequestURI()})
		}
		if reached && !internalRoute(u.EscapedPath()) {
			t.Fatalf("%q reaches an internal route", target)
		}
	})
}
