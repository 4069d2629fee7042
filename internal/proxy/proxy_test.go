package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// seen answers with what the guest saw of a request.
func seen(port string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "%s %s %s", port, r.Host, r.RequestURI)
	})
}

func TestRouting(t *testing.T) {
	r := newRig(t, func(c *Config) { c.PublicHosts = []string{"box.example:3002"} })
	r.listen(t, testID, 8000, seen("8000"))
	r.listen(t, testID, GuestAgentPort, seen("49983"))
	r.signed[signedURL{"/a b", "read", "root", "v1_x", "17"}] = testID
	r.signed[signedURL{"f", "write", "", "v1_y", ""}] = testID
	id := string(testID)

	tests := []struct {
		name, method, path string
		header             []string
		want               string
	}{
		{"host", "GET", "/x?y=1", []string{"Host", "8000-" + id + ".sbx.test"}, "8000 8000-" + id + ".sbx.test /x?y=1"},
		{"host with port and third part", "GET", "/", []string{"Host", "49983-" + id + "-00000000.sbx.test:8443"}, "49983 49983-" + id + "-00000000.sbx.test:8443 /"},
		{"host in upper case", "GET", "/", []string{"Host", strings.ToUpper("8000-" + id + ".sbx.test")}, "8000 " + strings.ToUpper("8000-"+id+".sbx.test") + " /"},
		{"host wins over headers", "GET", "/", []string{"Host", "8000-" + id + ".t", headerSandboxID, "other", headerSandboxPort, "1"}, "8000 8000-" + id + ".t /"},
		{"header on an address", "GET", "/", toGuest("8000"), "8000 ADDR /"},
		{"header without port", "GET", "/", []string{headerSandboxID, id}, "49983 ADDR /"},
		{"header with client id", "GET", "/", []string{headerSandboxID, id + "-6532622b"}, "49983 ADDR /"},
		{"header on localhost", "GET", "/", append(toGuest("8000"), "Host", "localhost:3002"), "8000 localhost:3002 /"},
		{"header on IPv6", "GET", "/", append(toGuest("8000"), "Host", "[::1]:3002"), "8000 [::1]:3002 /"},
		{"header on sandbox.", "GET", "/", append(toGuest("8000"), "Host", "sandbox.sbx.test"), "8000 sandbox.sbx.test /"},
		{"header on a public host", "GET", "/", append(toGuest("8000"), "Host", "box.example"), "8000 box.example /"},
		{"path", "GET", "/sandbox/" + id + "/8000/a%2Fb/../c?q=%zz;1", nil, "8000 ADDR /a%2Fb/../c?q=%zz;1"},
		{"path without rest", "POST", "/sandbox/" + id + "/8000", nil, "8000 ADDR /"},
		{"path on another host", "GET", "/sandbox/" + id + "/8000//x", []string{"Host", "gateway"}, "8000 gateway //x"},
		{"signature", "GET", "/files?path=%2Fa+b&username=root&signature=v1_x&signature_expiration=17", nil, "49983 ADDR /files?path=%2Fa+b&username=root&signature=v1_x&signature_expiration=17"},
		{"signature for writing", "POST", "/files?path=f&signature=v1_y", nil, "49983 ADDR /files?path=f&signature=v1_y"},
		{"odd characters", "GET", `/a%22b%20c/%e2%82%ac;v=1?x=a|b`, toGuest("8000"), `8000 ADDR /a%22b%20c/%e2%82%ac;v=1?x=a|b`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res, body := do(t, client(t), r.request(t, tt.method, tt.path, nil, tt.header...))
			want := strings.ReplaceAll(tt.want, "ADDR", r.addr)
			if res.StatusCode != http.StatusOK || body != want {
				t.Errorf("%d %q, want %q", res.StatusCode, body, want)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Domain, c.WaitTimeout = "sbx.test:8443", time.Millisecond })
	r.listen(t, testID, GuestAgentPort, seen("49983"))
	id := string(testID)
	for state, reason := range map[sandbox.State]string{
		sandbox.StateFailed: "out of memory: limit 512 MiB", sandbox.StateLost: "", sandbox.StatePaused: "", sandbox.StateCreating: "",
		sandbox.StatePausing: "", sandbox.StateResuming: "", sandbox.StateMigrating: "", sandbox.StateStopping: "", sandbox.StateStopped: "",
		sandbox.StateDeleted: "timeout", "unheard": "",
	} {
		r.set(sandbox.ID(state), sandbox.Route{State: state, Reason: reason})
	}
	tests := []struct {
		name, path string
		header     []string
		want       wireFailure
	}{
		{"unknown", "/", []string{headerSandboxID, "gone"}, wireFailure{"gone", "The sandbox was not found", 0, 502}},
		{"port closed", "/", toGuest("8000"), wireFailure{id, "The sandbox is running but port is not open", 8000, 502}},
		{"failed", "/", []string{headerSandboxID, "failed"}, wireFailure{"failed", "The sandbox failed: out of memory: limit 512 MiB", 0, 502}},
		{"lost", "/", []string{headerSandboxID, "lost"}, wireFailure{"lost", "The sandbox was lost", 0, 502}},
		{"paused", "/", []string{headerSandboxID, "paused"}, wireFailure{"paused", "The sandbox is paused", 0, 502}},
		{"stopping", "/", []string{headerSandboxID, "stopping"}, wireFailure{"stopping", "The sandbox is stopping", 0, 502}},
		{"stopped", "/", []string{headerSandboxID, "stopped"}, wireFailure{"stopped", "The sandbox is stopped", 0, 502}},
		{"deleted", "/", []string{headerSandboxID, "deleted"}, wireFailure{"deleted", "The sandbox was not found", 0, 502}},
		{"creating", "/", []string{headerSandboxID, "creating"}, wireFailure{"creating", "The sandbox is still creating. Try again in a moment.", 0, 503}},
		{"pausing", "/", []string{headerSandboxID, "pausing"}, wireFailure{"pausing", "The sandbox is still pausing. Try again in a moment.", 0, 503}},
		{"resuming", "/", []string{headerSandboxID, "resuming"}, wireFailure{"resuming", "The sandbox is still resuming. Try again in a moment.", 0, 503}},
		{"migrating", "/", []string{headerSandboxID, "migrating"}, wireFailure{"migrating", "The sandbox is still migrating. Try again in a moment.", 0, 503}},
		{"state of the future", "/", []string{headerSandboxID, "unheard"}, wireFailure{"unheard", "The sandbox cannot be reached now. Try again in a moment.", 0, 503}},
		{"unknown signature", "/files?signature=v1_z&path=f", nil, wireFailure{"", "The signature matches no running sandbox", 0, 401}},
		{"internal route", "/init", []string{headerSandboxID, id}, wireFailure{id, "This route is internal to the cluster and cannot be reached through the proxy", 0, 404}},
		{"internal route by host", "/%69nit/", []string{"Host", "49983-" + id + ".sbx.test"}, wireFailure{id, "This route is internal to the cluster and cannot be reached through the proxy", 0, 404}},
		{"internal route by path", "/sandbox/" + id + "/49983//logs", nil, wireFailure{id, "This route is internal to the cluster and cannot be reached through the proxy", 0, 404}},
		{"bad id", "/", []string{headerSandboxID, "../etc"}, wireFailure{"", `sandbox id "../etc": want 1 to 64 characters of a-z and 0-9`, 0, 400}},
		{"bad client id", "/", []string{headerSandboxID, "abc-D/"}, wireFailure{"", `sandbox id "abc-D/": want characters of a-z and 0-9`, 0, 400}},
		{"upper case id", "/", []string{headerSandboxID, "ABC"}, wireFailure{"", `sandbox id "ABC": want 1 to 64 characters of a-z and 0-9`, 0, 400}},
		{"bad port", "/", []string{headerSandboxID, id, headerSandboxPort, "65536"}, wireFailure{"", `port "65536": want a number from 1 to 65535`, 0, 400}},
		{"signed port", "/", []string{headerSandboxID, id, headerSandboxPort, "+80"}, wireFailure{"", `port "+80": want a number from 1 to 65535`, 0, 400}},
		{"port zero in host", "/", []string{"Host", "0-" + id + ".sbx.test"}, wireFailure{"", `port "0": want a number from 1 to 65535`, 0, 400}},
		{"two ids", "/", []string{headerSandboxID, id, headerSandboxID, "other"}, wireFailure{"", "header E2b-Sandbox-Id is sent 2 times: want once", 0, 400}},
		{"port alone", "/", []string{headerSandboxPort, "80"}, wireFailure{"", "header E2b-Sandbox-Id is missing beside E2b-Sandbox-Port", 0, 400}},
		{"nothing", "/", nil, wireFailure{"", "the request names no sandbox: send E2b-Sandbox-Id and E2b-Sandbox-Port, or use the path /sandbox/<sandbox id>/<port>/", 0, 400}},
		{"another domain", "/", []string{"Host", "49983-" + id + ".evil.test"}, wireFailure{"", `host "49983-` + id + `.evil.test" names no sandbox: want <port>-<sandbox id>.sbx.test, or the path /sandbox/<sandbox id>/<port>/`, 0, 400}},
		{"headers on another host", "/", append(toGuest("49983"), "Host", "evil.test"), wireFailure{"", `host "evil.test" names no sandbox: want <port>-<sandbox id>.sbx.test, or the path /sandbox/<sandbox id>/<port>/`, 0, 400}},
		{"unsigned files", "/files?path=x", nil, wireFailure{"", "/files without a sandbox: send E2b-Sandbox-Id, or a signed URL, whose signature tells the sandbox", 0, 400}},
		{"bad path", "/sandbox/" + id + "%2f80/", nil, wireFailure{"", `sandbox id "` + id + `%2f80": want 1 to 64 characters of a-z and 0-9`, 0, 400}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res, body := r.get(t, tt.path, tt.header...)
			if diff := cmp.Diff(tt.want, failureOf(t, body)); diff != "" || res.StatusCode != tt.want.Code {
				t.Errorf("status %d, body:\n%s", res.StatusCode, diff)
			}
			if got := res.Header.Get("Access-Control-Allow-Origin"); got != "*" {
				t.Errorf("Access-Control-Allow-Origin %q, want *", got)
			}
			if got := res.Header.Get("Content-Type"); got != "application/json; charset=utf-8" {
				t.Errorf("Content-Type %q", got)
			}
			if again := res.Header.Get("Retry-After") != ""; again != (tt.want.Code == 409 || tt.want.Code == 503) {
				t.Errorf("Retry-After %q with status %d", res.Header.Get("Retry-After"), tt.want.Code)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	r := newRig(t, func(c *Config) { c.WaitTimeout = time.Millisecond })
	tests := []struct {
		name            string
		route, dial     error
		status          int
		message, metric string
	}{
		{"router is away", sandbox.Unavailablef("no server"), nil, 503, "The sandbox cannot be reached now. Try again in a moment.", "unreachable"},
		{"node is away", nil, errors.New("no route to host"), 503, "The sandbox cannot be reached now. Try again in a moment.", "unreachable"},
		{"node does not know it", nil, sandbox.NotFoundf("sandbox"), 502, "The sandbox was not found", "not_found"},
		{"node pauses it", nil, sandbox.Conflictf("sandbox is pausing"), 503, "The sandbox is still pausing. Try again in a moment.", "transitioning"},
		{"connecting takes too long", nil, context.DeadlineExceeded, 504, "The sandbox did not accept the connection in time", "timeout"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r.mu.Lock()
			r.routeErr, r.dialErr = tt.route, tt.dial
			r.mu.Unlock()
			before := testutil.ToFloat64(r.proxy.metrics.failures.WithLabelValues(tt.metric))
			res, body := r.get(t, "/", toGuest("8000")...)
			if f := failureOf(t, body); res.StatusCode != tt.status || f.Message != tt.message || f.Port != 0 {
				t.Errorf("%d %+v", res.StatusCode, f)
			}
			if got := testutil.ToFloat64(r.proxy.metrics.failures.WithLabelValues(tt.metric)); got != before+1 {
				t.Errorf("failures{cause=%q} grew by %v", tt.metric, got-before)
			}
		})
	}
}

func TestFailurePages(t *testing.T) {
	r := newRig(t, nil)
	const browser = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/91.0.4472.124 Safari/537.36"
	tests := []struct {
		name   string
		header []string
		html   bool
	}{
		{"navigation", []string{"User-Agent", browser, "Sec-Fetch-Mode", "navigate", "Accept", "text/html,*/*;q=0.8"}, true},
		{"old browser", []string{"User-Agent", browser, "Accept", "text/html,*/*;q=0.8"}, true},
		{"a program by a browser's name", []string{"User-Agent", browser, "Accept", "*/*", "Sec-Fetch-Mode", "cors"}, true},
		{"a page's script", []string{"User-Agent", browser, "Accept", "*/*", "Sec-Fetch-Mode", "cors", "Sec-Fetch-Site", "cross-site", "Origin", "https://a.test"}, false},
		{"an SDK in a browser", []string{"User-Agent", browser, "Accept", "*/*", "X-Access-Token", "t"}, false},
		{"curl", []string{"User-Agent", "curl/8", "Accept", "*/*"}, false},
		{"the SDK", []string{"User-Agent", "e2b-js-sdk/2.51.0", "Sec-Fetch-Mode", "cors"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res, body := r.get(t, "/", append(toGuest("8000"), tt.header...)...)
			if res.StatusCode != http.StatusBadGateway {
				t.Errorf("status %d", res.StatusCode)
			}
			if html := strings.Contains(body, "<title>Closed Port Error</title>"); html != tt.html {
				t.Errorf("html %v, want %v: %s", html, tt.html, body)
			}
		})
	}
	t.Run("escaping", func(t *testing.T) {
		_, body := r.get(t, "/", "Accept", "text/html", headerSandboxID, "<script>alert(1)</script>")
		if strings.Contains(body, "<script>") {
			t.Error(body)
		}
	})
}

func TestPreflightForFailures(t *testing.T) {
	r := newRig(t, nil)
	req := r.request(t, http.MethodOptions, "/process.Process/Start", nil, "Origin", "https://a.test",
		"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "e2b-sandbox-id,x-access-token")
	res, body := do(t, client(t), req)
	want := map[string]string{"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "*", "Access-Control-Allow-Headers": "e2b-sandbox-id,x-access-token"}
	for k, v := range want {
		if got := res.Header.Get(k); got != v {
			t.Errorf("%s: %q, want %q", k, got, v)
		}
	}
	if res.StatusCode != http.StatusNoContent || body != "" {
		t.Errorf("%d %q", res.StatusCode, body)
	}
}

func TestPreflightReachesGuest(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Access-Control-Allow-Origin", "https://only.test")
	}))
	req := r.request(t, http.MethodOptions, "/", nil, append(toGuest("8000"), "Access-Control-Request-Method", "POST")...)
	res, _ := do(t, client(t), req)
	if got := res.Header.Get("Access-Control-Allow-Origin"); got != "https://only.test" {
		t.Errorf("Access-Control-Allow-Origin %q is not the guest's", got)
	}
}

func TestHealth(t *testing.T) {
	var ready atomic.Bool
	r := newRig(t, func(cfg *Config) { cfg.Ready = ready.Load })
	expect := func(path, want string, status int) {
		t.Helper()
		if res, body := r.get(t, path); res.StatusCode != status || failureOf(t, body).Message != want {
			t.Errorf("%s: %d %s; want %d %q", path, res.StatusCode, body, status, want)
		}
	}
	expect("/healthz", "ok", http.StatusOK)
	expect("/readyz", "not ready", http.StatusServiceUnavailable)
	ready.Store(true)
	expect("/readyz", "ok", http.StatusOK)
	r.listen(t, testID, 8000, seen("8000"))
	for _, path := range []string{"/healthz", "/readyz"} {
		if _, body := r.get(t, path, toGuest("8000")...); !strings.HasPrefix(body, "8000 ") {
			t.Errorf("a guest's own %s was answered by the proxy: %s", path, body)
		}
	}
}

func TestForwardedHeaders(t *testing.T) {
	r := newRig(t, nil)
	got := make(chan http.Header, 1)
	r.listen(t, testID, 8000, http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) { got <- q.Header.Clone() }))
	path := "/sandbox/" + string(testID) + "/8000/"
	r.get(t, path, "X-Forwarded-For", "6.6.6.6", "X-Forwarded-Proto", "https", "X-Forwarded-Host", "evil", "Forwarded", "for=6.6.6.6",
		"X-Forwarded-Prefix", "/evil", "X-Real-Ip", "6.6.6.6", "Connection", "X-Hop, close", "X-Hop", "1", "Keep-Alive", "1", "Te", "gzip, trailers", "X-Kept", "1",
		"Proxy-Authorization", "x", "Upgrade", "h2c", "Http2-Settings", "AAMAAABkAAQ")
	h := <-got
	want := map[string]string{
		"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": r.addr, "X-Forwarded-Prefix": strings.TrimSuffix(path, "/"),
		"Forwarded": "", "X-Real-Ip": "", "X-Hop": "", "Keep-Alive": "", "Te": "trailers", "X-Kept": "1", "Proxy-Authorization": "",
		"Upgrade": "", "Http2-Settings": "", "Accept-Encoding": "",
	}
	for k, v := range want {
		if h.Get(k) != v {
			t.Errorf("%s: %q, want %q", k, h.Get(k), v)
		}
	}
}

func TestLocation(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Location", q.URL.Query().Get("to"))
		w.WriteHeader(http.StatusFound)
	}))
	prefix := "/sandbox/" + string(testID) + "/8000"
	tests := map[string]string{
		"/login?x=1#f":               prefix + "/login?x=1#f",
		"/a%2Fb":                     prefix + "/a%2Fb",
		"login":                      "login",
		"//other.test/x":             "//other.test/x",
		"https://other.test/x":       "https://other.test/x",
		"http://" + r.addr + "/x":    "http://" + r.addr + prefix + "/x",
		prefix + "/already":          prefix + "/already",
		"/sandbox/another/80/":       prefix + "/sandbox/another/80/",
		"":                           "",
		"javascript:alert(1)":        "javascript:alert(1)",
		prefix + "0/not/ours/really": prefix + prefix + "0/not/ours/really",
	}
	for to, want := range tests {
		req := r.request(t, http.MethodGet, prefix+"/", nil)
		q := req.URL.Query()
		q.Set("to", to)
		req.URL.RawQuery = q.Encode()
		if res, _ := do(t, client(t), req); res.Header.Get("Location") != want {
			t.Errorf("Location %q became %q, want %q", to, res.Header.Get("Location"), want)
		}
		req = r.request(t, http.MethodGet, "/", nil, toGuest("8000")...)
		req.URL.RawQuery = q.Encode()
		if res, _ := do(t, client(t), req); res.Header.Get("Location") != to {
			t.Errorf("Location %q became %q without a prefix", to, res.Header.Get("Location"))
		}
	}
	t.Run("missing slash", func(t *testing.T) {
		res, _ := r.get(t, prefix+"?q=1", "Accept", "text/html")
		if res.StatusCode != http.StatusTemporaryRedirect || res.Header.Get("Location") != prefix+"/?q=1" {
			t.Errorf("%d %s", res.StatusCode, res.Header.Get("Location"))
		}
	})
}

func TestGenerationRenewsConnections(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, seen("8000"))
	for range 3 {
		r.get(t, "/", toGuest("8000")...)
	}
	if n := r.dials.Load(); n != 1 {
		t.Fatalf("%d connections for three requests, want 1", n)
	}
	r.set(testID, sandbox.Route{State: sandbox.StateRunning, Generation: 2})
	r.get(t, "/", toGuest("8000")...)
	r.set(testID, sandbox.Route{State: sandbox.StateRunning, Generation: 1}) // old news
	r.get(t, "/", toGuest("8000")...)
	if n := r.dials.Load(); n != 2 {
		t.Errorf("%d connections after the generation grew, want 2", n)
	}
}

func TestTooManyRequests(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxRequestsPerSandbox = 1 })
	entered, leave := make(chan struct{}), make(chan struct{})
	r.listen(t, testID, 8000, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-leave
	}))
	done := make(chan int, 1)
	go func() {
		res, _ := r.get(t, "/", toGuest("8000")...)
		done <- res.StatusCode
	}()
	<-entered
	if res, body := r.get(t, "/", toGuest("8000")...); res.StatusCode != http.StatusTooManyRequests {
		t.Errorf("%d %s", res.StatusCode, body)
	}
	close(leave)
	if status := <-done; status != http.StatusOK {
		t.Errorf("the first request: %d", status)
	}
}

func TestNewRefusesIncompleteConfig(t *testing.T) {
	if _, err := New(Config{}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("error %v, want ErrInvalid", err)
	}
	reg := prometheus.NewRegistry()
	w := newWorld()
	for i := range 2 {
		_, err := New(Config{Router: w, Dialer: w, Registerer: reg})
		if (err != nil) != (i == 1) {
			t.Errorf("registration %d: %v", i, err)
		}
	}
}
