package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/proxy/h1"
)

// reads is a guest that notes each request as a reader of its own sees it.
type reads struct {
	mu  sync.Mutex
	got []string
}

func (g *reads) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, err := io.ReadAll(q.Body)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		return // cut short, and seen to be
	}
	g.got = append(g.got, fmt.Sprintf("%s %s %s", q.Method, q.RequestURI, body))
	_, _ = io.WriteString(w, "ok")
}

func (g *reads) take() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	got := g.got
	g.got = nil
	return got
}

// TestSmuggling sends bytes that hide a request from one reader or the other. Each of it is refused, or the guest sees
// exactly the requests that the client sent.
func TestSmuggling(t *testing.T) {
	if dataPath != HTTP1Fast {
		t.Log("net/http has tests of its own")
		return
	}
	r := newRig(t, nil)
	guest := new(reads)
	r.listen(t, testID, 8000, guest)
	routing := "Host: localhost\r\nE2b-Sandbox-Id: " + string(testID) + "\r\nE2b-Sandbox-Port: 8000\r\n"
	hidden := "GET /hidden HTTP/1.1\r\n" + routing + "\r\n"
	last := "GET /last HTTP/1.1\r\n" + routing + "Connection: close\r\n\r\n"
	chunked := "POST /a HTTP/1.1\r\n" + routing + "Transfer-Encoding: chunked\r\n\r\n"
	sized := func(n int, field string) string {
		return fmt.Sprintf("POST /a HTTP/1.1\r\n%sContent-Length: %d\r\n%s\r\n", routing, n, field)
	}
	tests := []struct {
		name, bytes string
		status      []int
		guest       []string
	}{
		{"CL.TE", sized(6, "Transfer-Encoding: chunked\r\n") + "0\r\n\r\nG" + last, []int{400}, nil},
		{"TE.CL", "POST /a HTTP/1.1\r\n" + routing + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n" + hidden + "0\r\n\r\n", []int{400}, nil},
		{"TE.TE", "POST /a HTTP/1.1\r\n" + routing + "Transfer-Encoding: chunked\r\nTransfer-encoding: cow\r\n\r\n0\r\n\r\n" + hidden, []int{501}, nil},
		{"TE with a space before the colon", sized(5, "Transfer-Encoding : chunked\r\n") + "0\r\n\r\n" + hidden, []int{400}, nil},
		{"TE folded", sized(5, "X: a\r\n Transfer-Encoding: chunked\r\n") + "0\r\n\r\n" + hidden, []int{400}, nil},
		{"TE after a bare LF", sized(5, "X: a\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + hidden, []int{400}, nil},
		{"TE after a bare CR", sized(5, "X: a\rTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + hidden, []int{400}, nil},
		{"TE that Connection takes away", "POST /a HTTP/1.1\r\n" + routing + "Connection: Transfer-Encoding, close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", []int{200}, []string{"POST /a x"}},
		{"CL that Connection takes away", sized(1, "Connection: Content-Length, close\r\n") + "x", []int{200}, []string{"POST /a x"}},
		{"CL.CL", sized(0, "Content-Length: 5\r\n") + "hello" + hidden, []int{400}, nil},
		{"CL signed", "POST /a HTTP/1.1\r\n" + routing + "Content-Length: +0\r\n\r\n" + hidden, []int{400}, nil},
		{"CL of a GET", "GET /a HTTP/1.1\r\n" + routing + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(hidden)) + hidden + last, []int{200, 200}, []string{"GET /a " + hidden, "GET /last "}},
		{"CL.0", sized(0, "") + last, []int{200, 200}, []string{"POST /a ", "GET /last "}},
		{"chunks with a request as data", chunked + fmt.Sprintf("%x\r\n", len(hidden)) + hidden + "\r\n0\r\n\r\n" + last, []int{200, 200}, []string{"POST /a " + hidden, "GET /last "}},
		{"chunk size with LF alone", chunked + "1\nx\r\n0\r\n\r\n" + hidden, []int{400}, nil},
		{"chunk whose data is longer", chunked + "1\r\nxx\r\n0\r\n\r\n" + hidden, []int{400}, nil},
		{"chunk extension with LF", chunked + "1;a\nx\r\n0\r\n\r\n" + hidden, []int{400}, nil},
		{"chunk size that overflows", chunked + "10000000000000001\r\nx\r\n0\r\n\r\n" + hidden, []int{400}, nil},
		{"trailers that say where to", chunked + "1\r\nx\r\n0\r\nE2b-Sandbox-Id: other\r\nContent-Length: 50\r\nHost: b\r\n\r\n" + last, []int{200, 200}, []string{"POST /a x", "GET /last "}},
		{"trailer with LF alone", chunked + "0\r\nX: y\n\r\n" + hidden, []int{400}, nil},
		{"two requests", "GET /a HTTP/1.1\r\n" + routing + "\r\n" + last, []int{200, 200}, []string{"GET /a ", "GET /last "}},
		{"an empty line between", "POST /a HTTP/1.1\r\n" + routing + "Content-Length: 1\r\n\r\nx\r\n" + last, []int{200, 200}, []string{"POST /a x", "GET /last "}},
		{"request after close", "GET /a HTTP/1.1\r\n" + routing + "Connection: close\r\n\r\n" + hidden, []int{200}, []string{"GET /a "}},
		{"request line with a second one", "GET /a HTTP/1.1\r\nX: GET /hidden HTTP/1.1\r\n" + routing + "Connection: close\r\n\r\n", []int{200}, []string{"GET /a "}},
		{"target with a line", "GET /a%0d%0aX:%20y HTTP/1.1\r\n" + routing + "Connection: close\r\n\r\n", []int{200}, []string{"GET /a%0d%0aX:%20y "}},
		{"HTTP/0.9", "GET /a\r\n" + hidden, []int{400}, nil},
		{"HTTP/1.0 with TE", "POST /a HTTP/1.0\r\n" + routing + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden, []int{400}, nil},
		{"upgrade with a body", sized(len(hidden), "Connection: Upgrade\r\nUpgrade: websocket\r\n") + hidden + last, []int{200, 200}, []string{"POST /a " + hidden, "GET /last "}},
		{"upgrade to HTTP/2", "GET /a HTTP/1.1\r\n" + routing + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n" + last, []int{200, 200}, []string{"GET /a ", "GET /last "}},
		{"expectation that nobody knows", sized(1, "Expect: 200-ok\r\n") + "x" + hidden, []int{417}, nil},
	}
	for _, tt := range tests {
		for _, whole := range []bool{true, false} {
			t.Run(fmt.Sprint(tt.name, " whole ", whole), func(t *testing.T) {
				conn := r.dialRaw(t)
				go sendAll(conn, tt.bytes, whole)
				if got := statuses(t, conn); !slices.Equal(got, tt.status) {
					t.Errorf("answers %v, want %v", got, tt.status)
				}
				if diff := cmp.Diff(tt.guest, guest.take()); diff != "" {
					t.Errorf("the guest saw:\n%s", diff)
				}
			})
		}
	}
}

// sendAll writes at once, or byte by byte.
func sendAll(conn net.Conn, bytes string, whole bool) {
	if whole {
		_, _ = io.WriteString(conn, bytes)
		return
	}
	for i := range len(bytes) {
		if _, err := io.WriteString(conn, bytes[i:i+1]); err != nil {
			return
		}
	}
}

// statuses reads answers up to the end of the connection.
func statuses(t *testing.T, conn net.Conn) []int {
	t.Helper()
	var all []int
	for br := bufio.NewReader(conn); ; {
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			return all
		}
		if _, err := io.Copy(io.Discard, res.Body); err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		all = append(all, res.StatusCode)
	}
}

// FuzzTarget compares what the two data paths take a request's target for.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{"/", "/a%2Fb?c", "//x", "http://h/x?y", "http://h", "*", "/a\"b", "/%zz", "x", "http:x", "/é", "/a?b#c", "/a#b", "/[x]", "?", "http://u@h:1/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		in := "GET " + target + " HTTP/1.1\r\nHost: a\r\n\r\n"
		var h h1.Head
		if _, err := h.ParseRequest([]byte(in)); err != nil || string(h.Target) != target {
			return
		}
		theirs, theirErr := http.ReadRequest(bufio.NewReader(strings.NewReader(in)))
		ours, err := askOf(&h, &known{})
		if theirErr != nil {
			if err == nil {
				t.Fatalf("%q: taken, but not by net/http: %v", target, theirErr)
			}
			return
		}
		want, wantErr := headOf(theirs)
		if (err == nil) != (wantErr == nil) {
			if u, _ := url.ParseRequestURI(target); err == nil && u != nil && u.Path == "" && u.Host != "" {
				return // a target without a path has "/"
			}
			t.Fatalf("%q: %v, by net/http %v", target, err, wantErr)
		}
		if err == nil && (ours.path != want.path || ours.query != want.query || ours.host != want.host || ours.method != want.method) {
			t.Fatalf("%q: %+v, by net/http %+v", target, ours, want)
		}
	})
}
