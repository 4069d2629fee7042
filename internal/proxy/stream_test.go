package proxy

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// sum reads r to its end.
func sum(tb testing.TB, r io.Reader) ([sha256.Size]byte, int64) {
	tb.Helper()
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		tb.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil)), n
}

func TestLargeBodies(t *testing.T) {
	r := newRig(t, nil)
	blob := make([]byte, 24<<20+17)
	_, _ = rand.Read(blob)
	want := sha256.Sum256(blob)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method == http.MethodGet {
			if q.URL.Query().Has("length") {
				w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
			}
			_, _ = w.Write(blob)
			return
		}
		h := sha256.New()
		n, err := io.Copy(h, q.Body)
		_, _ = fmt.Fprintf(w, "%d %v %x %d", n, err, h.Sum(nil), q.ContentLength)
	}))
	clients := map[string]*http.Client{"h1": client(t), "h2c": h2cClient(t)}
	for name, c := range clients {
		for _, path := range []string{"/?length", "/"} {
			res, err := c.Do(r.request(t, http.MethodGet, path, nil, toGuest("8000")...))
			if err != nil {
				t.Fatal(err)
			}
			if got, n := sum(t, res.Body); got != want {
				t.Errorf("%s: download %s: %d bytes, want %d of the same hash", name, path, n, len(blob))
			}
			_ = res.Body.Close()
		}
		for _, length := range []int64{-1, int64(len(blob))} {
			req := r.request(t, http.MethodPost, "/", io.NopCloser(bytes.NewReader(blob)), toGuest("8000")...)
			req.ContentLength = length
			_, body := do(t, c, req)
			if wantBody := fmt.Sprintf("%d <nil> %x %d", len(blob), want, length); body != wantBody {
				t.Errorf("%s: upload: %s, want %s", name, body, wantBody)
			}
		}
	}
	if got := testutil.ToFloat64(r.proxy.metrics.in); got != 4*float64(len(blob)) {
		t.Errorf("bytes in: %v, want %d", got, 4*len(blob))
	}
}

func h2cClient(tb testing.TB) *http.Client {
	tb.Helper()
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &p, DisableCompression: true}
	tb.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestStreamIsFlushed(t *testing.T) {
	for _, name := range []string{"h1", "h2c"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			next := make(chan struct{})
			r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				for i := range 3 {
					_, _ = fmt.Fprintf(w, "data: %d\n\n", i)
					_ = http.NewResponseController(w).Flush()
					<-next
				}
			}))
			c := client(t)
			if name == "h2c" {
				c = h2cClient(t)
			}
			res, err := c.Do(r.request(t, http.MethodGet, "/", nil, toGuest("8000")...))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = res.Body.Close() }()
			lines := bufio.NewScanner(res.Body)
			for i := range 3 {
				if !lines.Scan() || lines.Text() != fmt.Sprintf("data: %d", i) {
					t.Fatalf("event %d: %q %v", i, lines.Text(), lines.Err())
				}
				lines.Scan()
				next <- struct{}{} // the guest goes on only now
			}
			if lines.Scan() || lines.Err() != nil {
				t.Errorf("after the end: %q %v", lines.Text(), lines.Err())
			}
		})
	}
}

// TestFullDuplex sends pieces of an upload and reads the echo of each before the next.
func TestFullDuplex(t *testing.T) {
	for _, name := range []string{"h1", "h2c"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				rc := http.NewResponseController(w)
				_ = rc.EnableFullDuplex()
				_ = rc.Flush()
				buf := make([]byte, 100)
				for {
					n, err := q.Body.Read(buf)
					_, _ = w.Write(bytes.ToUpper(buf[:n]))
					_ = rc.Flush()
					if err != nil {
						return
					}
				}
			}))
			c := client(t)
			if name == "h2c" {
				c = h2cClient(t)
			}
			pr, pw := io.Pipe()
			defer func() { _ = pw.Close() }()
			res, err := c.Do(r.request(t, http.MethodPost, "/", pr, toGuest("8000")...))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = res.Body.Close() }()
			for _, word := range []string{"one", "two", "three"} {
				_, _ = io.WriteString(pw, word)
				got := make([]byte, len(word))
				if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != strings.ToUpper(word) {
					t.Fatalf("echo of %q: %q %v", word, got, err)
				}
			}
			_ = pw.Close()
			if rest, err := io.ReadAll(res.Body); len(rest) != 0 || err != nil {
				t.Errorf("after the end: %q %v", rest, err)
			}
		})
	}
}

func TestTrailers(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		w.Header().Set("Trailer", "X-Sum")
		_, _ = fmt.Fprintf(w, "%s %s", body, q.Trailer.Get("X-Asked"))
		w.Header().Set("X-Sum", "42")
		w.Header().Set(http.TrailerPrefix+"X-Late", "7")
	}))
	for name, c := range map[string]*http.Client{"h1": client(t), "h2c": h2cClient(t)} {
		req := r.request(t, http.MethodPost, "/", io.NopCloser(strings.NewReader("hi")), toGuest("8000")...)
		req.ContentLength = -1
		req.Trailer = http.Header{"X-Asked": {"yes"}}
		res, body := do(t, c, req)
		if body != "hi yes" || res.Trailer.Get("X-Sum") != "42" || res.Trailer.Get("X-Late") != "7" {
			t.Errorf("%s: body %q, trailers %v", name, body, res.Trailer)
		}
	}
}

func TestInformational(t *testing.T) {
	r := newRig(t, nil)
	r.listen(t, testID, 8000, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		if q.Header.Get("X-Refuse") != "" {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		body, _ := io.ReadAll(q.Body)
		_, _ = w.Write(body)
	}))
	for _, refuse := range []bool{false, true} {
		var hints, continued atomic.Bool
		req := r.request(t, http.MethodPost, "/", strings.NewReader("body"), append(toGuest("8000"), "Expect", "100-continue")...)
		if refuse {
			req.Header.Set("X-Refuse", "1")
		}
		req = req.WithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, _ textproto.MIMEHeader) error { hints.Store(hints.Load() || code == 103); return nil },
			Got100Continue: func() { continued.Store(true) },
		}))
		c := client(t)
		c.Transport.(*http.Transport).ExpectContinueTimeout = time.Minute //nolint:errcheck,forcetypeassert // made above
		res, body := do(t, c, req)
		if !hints.Load() {
			t.Error("103 did not pass")
		}
		if continued.Load() == refuse {
			t.Errorf("refuse %v: 100-continue seen %v", refuse, continued.Load())
		}
		if refuse && res.StatusCode != http.StatusRequestEntityTooLarge || !refuse && body != "body" {
			t.Errorf("refuse %v: %d %q", refuse, res.StatusCode, body)
		}
	}
}

func TestWebSocket(t *testing.T) {
	r := newRig(t, nil)
	echo := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		conn, err := websocket.Accept(w, q, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			return
		}
		defer func() { _ = conn.CloseNow() }()
		for {
			kind, data, err := conn.Read(q.Context())
			if err != nil {
				return
			}
			if conn.Write(q.Context(), kind, data) != nil {
				return
			}
		}
	})
	r.listen(t, testID, 8000, echo)
	r.listen(t, testID, GuestAgentPort, echo)
	dialWS := func(port string) (*websocket.Conn, error) {
		conn, _, err := websocket.Dial(t.Context(), "ws://"+r.addr+"/ws", &websocket.DialOptions{ //nolint:bodyclose // the library closes it
			HTTPClient: client(t), HTTPHeader: http.Header{headerSandboxID: {string(testID)}, headerSandboxPort: {port}},
		})
		return conn, err
	}
	conn, err := dialWS("8000")
	if err != nil {
		t.Fatal(err)
	}
	message := bytes.Repeat([]byte("x"), 20_000)
	for range 3 {
		if err := conn.Write(t.Context(), websocket.MessageBinary, message); err != nil {
			t.Fatal(err)
		}
		if _, got, err := conn.Read(t.Context()); err != nil || !bytes.Equal(got, message) {
			t.Fatalf("echo: %d bytes, %v", len(got), err)
		}
	}
	if err := conn.Close(websocket.StatusNormalClosure, "bye"); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err := dialWS("49983"); err == nil {
		t.Error("the agent's port was upgraded")
	}
	t.Run("sandbox ends", func(t *testing.T) {
		conn, err := dialWS("8000")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.CloseNow() }()
		r.end(testID, sandbox.StateDeleted, "")
		if _, _, err := conn.Read(t.Context()); err == nil {
			t.Error("the connection outlived its sandbox")
		}
	})
}
