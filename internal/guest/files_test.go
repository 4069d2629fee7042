package guest

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func zipped(t *testing.T, text string) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write([]byte(text))
	must(t, err)
	must(t, z.Close())
	return &b
}

// form builds a multipart body from pairs of Content-Disposition and content.
func form(t *testing.T, pairs ...string) (body io.Reader, contentType string) {
	t.Helper()
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	for i := 0; i < len(pairs); i += 2 {
		w, err := m.CreatePart(textproto.MIMEHeader{"Content-Disposition": {pairs[i]}, "Content-Type": {"application/octet-stream"}})
		must(t, err)
		_, err = w.Write([]byte(pairs[i+1]))
		must(t, err)
	}
	must(t, m.Close())
	return &b, m.FormDataContentType()
}

func (a *agent) put(t *testing.T, path, text string, headers ...string) (int, string) {
	t.Helper()
	status, body, _ := a.do(t, http.MethodPost, "/files?path="+url.QueryEscape(path), strings.NewReader(text), append([]string{"Content-Type", "application/octet-stream"}, headers...)...)
	return status, body
}

func (a *agent) content(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(a.home, path))
	must(t, err)
	return string(text)
}

func TestUpload(t *testing.T) {
	a := newAgent(t)
	status, body := a.put(t, "deep/er/x.txt", "one")
	want := `[{"path":"` + a.home + `/deep/er/x.txt","name":"x.txt","type":"file"}]` + "\n"
	if diff := cmp.Diff(want, body); status != http.StatusOK || diff != "" {
		t.Errorf("status %d, body (-want +got):\n%s", status, diff)
	}
	must(t, os.Chmod(filepath.Join(a.home, "deep/er/x.txt"), 0o750))
	a.put(t, "~/deep/er/x.txt", "2")
	if info, err := os.Stat(filepath.Join(a.home, "deep/er/x.txt")); err != nil || info.Mode().Perm() != 0o750 || a.content(t, "deep/er/x.txt") != "2" {
		t.Errorf("overwriting: %v, %v", info.Mode(), err)
	}
	if status, body, _ := a.do(t, http.MethodPost, "/files?path=z", zipped(t, "unzipped"), "Content-Type", "application/octet-stream", "Content-Encoding", "gzip"); status != http.StatusOK || a.content(t, "z") != "unzipped" {
		t.Errorf("gzip: status %d, %s", status, body)
	}
	a.put(t, "empty", "")
	if got := a.content(t, "empty"); got != "" {
		t.Errorf("empty file: %q", got)
	}
}

func TestUploadForms(t *testing.T) {
	a := newAgent(t)
	outside := t.TempDir()
	body, kind := form(t,
		`form-data; name="file"; filename="rel/a.txt"`, "A",
		`form-data; name="other"; filename="ignored"`, "ignored",
		`form-data; name="file"; filename="`+outside+`/sub/b.txt"`, "B",
		`form-data; name="file"; filename="q%22uote %C3 ü.txt"`, strings.Repeat("C\r\n--", 100_000))
	status, text, _ := a.do(t, http.MethodPost, "/files", body, "Content-Type", kind)
	var got []written
	must(t, json.Unmarshal([]byte(text), &got))
	want := []written{
		{Path: a.home + "/rel/a.txt", Name: "a.txt", Type: "file"},
		{Path: outside + "/sub/b.txt", Name: "b.txt", Type: "file"},
		{Path: a.home + `/q"uote %C3 ü.txt`, Name: `q"uote %C3 ü.txt`, Type: "file"},
	}
	if diff := cmp.Diff(want, got); status != http.StatusOK || diff != "" {
		t.Fatalf("status %d (-want +got):\n%s", status, diff)
	}
	if a.content(t, "rel/a.txt") != "A" || a.content(t, `q"uote %C3 ü.txt`) != strings.Repeat("C\r\n--", 100_000) {
		t.Error("wrong content")
	}
	body, kind = form(t, `form-data; name="file"; filename="elsewhere"`, "X")
	if status, text, _ := a.do(t, http.MethodPost, "/files?path=here", body, "Content-Type", kind); status != http.StatusOK || a.content(t, "here") != "X" {
		t.Errorf("path parameter: status %d, %s", status, text)
	}
}

func TestUploadErrors(t *testing.T) {
	a := newAgent(t)
	must(t, os.Mkdir(filepath.Join(a.home, "dir"), 0o755))
	must(t, os.WriteFile(filepath.Join(a.home, "file"), []byte("kept"), 0o644))
	must(t, syscall.Mkfifo(filepath.Join(a.home, "pipe"), 0o644))
	two, twoKind := form(t, `form-data; name="file"; filename="a"`, "1", `form-data; name="file"; filename="b"`, "2")
	none, noneKind := form(t, `form-data; name="else"; filename="a"`, "1")
	nameless, namelessKind := form(t, `form-data; name="file"`, "1")
	const octets = "application/octet-stream"
	for name, test := range map[string]struct {
		query, kind string
		body        io.Reader
		headers     []string
		status      int
		message     string
	}{
		"no path":          {"", octets, nil, nil, 400, "path parameter"},
		"directory":        {"path=dir", octets, nil, nil, 400, "is a directory"},
		"below a file":     {"path=file/x", octets, nil, nil, 400, "not a directory"},
		"named pipe":       {"path=pipe", octets, nil, nil, 400, ""},
		"unknown user":     {"path=x&username=x", octets, nil, nil, 401, "error looking up user 'x': user: unknown user x"},
		"content type":     {"path=x", "text/plain", nil, nil, 400, "text/plain"},
		"no content type":  {"path=x", "", nil, nil, 400, "Content-Type"},
		"encoding":         {"path=x", octets, nil, []string{"Content-Encoding", "br"}, 400, "unsupported Content-Encoding: br, supported: [gzip]"},
		"not gzip":         {"path=x", octets, strings.NewReader("plain"), []string{"Content-Encoding", "gzip"}, 400, "not gzip"},
		"broken gzip":      {"path=half", octets, io.LimitReader(zipped(t, strings.Repeat("x", 1<<20)), 100), []string{"Content-Encoding", "gzip"}, 400, "read the upload"},
		"two for one path": {"path=x", twoKind, two, nil, 400, "more than one file"},
		"no file part":     {"", noneKind, none, nil, 400, "no part named file"},
		"no file name":     {"", namelessKind, nameless, nil, 400, "no path"},
		"no boundary":      {"", "multipart/form-data", strings.NewReader("--"), nil, 400, "boundary"},
		"broken form":      {"", twoKind, strings.NewReader("--"), nil, 400, "error parsing multipart form"},
		"metadata value":   {"path=x", octets, nil, []string{"X-Metadata-A", "ü"}, 400, "ASCII"},
		"metadata key":     {"path=x", octets, nil, []string{"X-Metadata-" + strings.Repeat("k", 300), "v"}, 400, "bytes"},
		"metadata size":    {"path=x", octets, nil, []string{"X-Metadata-A", strings.Repeat("v", 4096)}, 400, "4096"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, _ := a.do(t, http.MethodPost, "/files?"+test.query, test.body, append(test.headers, "Content-Type", test.kind)...)
			wantError(t, status, body, test.status, test.message)
		})
	}
	if a.content(t, "file") != "kept" {
		t.Error("a refused upload changed a file")
	}
	if _, err := os.Stat(filepath.Join(a.home, "half")); err == nil {
		t.Error("a broken upload left half a file")
	}
}

func TestUploadOwner(t *testing.T) {
	needRoot(t)
	a := newAgent(t)
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	status, body, _ := a.do(t, http.MethodPost, "/files?username=nobody&path="+dir+"/new/f", strings.NewReader("x"), "Content-Type", "application/octet-stream")
	if status != http.StatusOK {
		t.Fatal(status, body)
	}
	for _, name := range []string{"new", "new/f"} {
		var st unix.Stat_t
		must(t, unix.Stat(filepath.Join(dir, name), &st))
		if st.Uid != 65534 || st.Gid != 65534 {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
}

func TestDiskFull(t *testing.T) {
	needRoot(t)
	a := newAgent(t)
	dir := filepath.Join(a.home, "tiny")
	must(t, os.Mkdir(dir, 0o755))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	big := strings.Repeat("x", 2<<20)
	status, body := a.put(t, "tiny/known", big)
	wantError(t, status, body, http.StatusInsufficientStorage, "not enough disk space available")
	form, kind := form(t, `form-data; name="file"; filename="tiny/unknown"`, big)
	status, body, _ = a.do(t, http.MethodPost, "/files", form, "Content-Type", kind)
	wantError(t, status, body, http.StatusInsufficientStorage, "not enough disk space available")
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestMetadata(t *testing.T) {
	a := newAgent(t)
	path := filepath.Join(a.home, "m")
	must(t, os.WriteFile(path, nil, 0o644))
	if err := unix.Setxattr(path, "user.other", []byte("kept"), 0); err != nil {
		t.Skipf("the file system keeps no attributes: %v", err)
	}
	status, body := a.put(t, "m", "x", "X-Metadata-Author", "me", "x-metadata-PURPOSE", "test")
	if status != http.StatusOK || !strings.Contains(body, `"metadata":{"author":"me","purpose":"test"}`) {
		t.Errorf("status %d, %s", status, body)
	}
	if diff := cmp.Diff(map[string]string{"author": "me", "purpose": "test"}, readMetadata(path)); diff != "" {
		t.Errorf("stored (-want +got):\n%s", diff)
	}
	a.put(t, "m", "x", "X-Metadata-Author", "you")
	if diff := cmp.Diff(map[string]string{"author": "you"}, readMetadata(path)); diff != "" {
		t.Errorf("replaced (-want +got):\n%s", diff)
	}
	if _, body := a.put(t, "m", "x"); strings.Contains(body, "metadata") || readMetadata(path) != nil {
		t.Errorf("not cleared: %s, %v", body, readMetadata(path))
	}
	if n, err := unix.Getxattr(path, "user.other", make([]byte, 10)); err != nil || n != 4 {
		t.Error("an attribute of somebody else is gone")
	}
}

func TestDownload(t *testing.T) {
	a := newAgent(t)
	text := strings.Repeat("0123456789", 1000)
	must(t, os.WriteFile(filepath.Join(a.home, "f ü"), []byte(text), 0o644))
	must(t, os.WriteFile(filepath.Join(a.home, "empty"), nil, 0o644))
	get := "/files?path=" + url.QueryEscape("f ü")
	status, body, h := a.do(t, http.MethodGet, get, nil)
	if status != http.StatusOK || body != text || h.Get("Content-Length") != strconv.Itoa(len(text)) || h.Get("Content-Type") != "application/octet-stream" || h.Get("Content-Encoding") != "" {
		t.Errorf("status %d, %d bytes, %v", status, len(body), h)
	}
	status, body, h = a.do(t, http.MethodGet, get, nil, "Range", "bytes=5-8")
	if status != http.StatusPartialContent || body != "5678" || h.Get("Content-Range") != "bytes 5-8/10000" {
		t.Errorf("range: status %d, %q, %v", status, body, h)
	}
	if status, _, _ := a.do(t, http.MethodGet, get, nil, "Range", "bytes=99999-"); status != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("range beyond the end: status %d", status)
	}
	status, body, h = a.do(t, http.MethodGet, get, nil, "Accept-Encoding", "gzip")
	z, err := gzip.NewReader(strings.NewReader(body))
	must(t, err)
	plain, err := io.ReadAll(z)
	if status != http.StatusOK || err != nil || string(plain) != text || h.Get("Content-Encoding") != "gzip" || len(body) > len(text)/10 {
		t.Errorf("gzip: status %d, %v, %d bytes, %v", status, err, len(body), h)
	}
	if _, body, h := a.do(t, http.MethodGet, "/files?path=empty", nil, "Accept-Encoding", "gzip"); body != "" || h.Get("Content-Length") != "0" {
		t.Errorf("empty: %q, %v", body, h)
	}
	if status, body, h := a.do(t, http.MethodHead, get, nil); status != http.StatusOK || body != "" || h.Get("Content-Length") != "10000" {
		t.Errorf("head: status %d, %q, %v", status, body, h)
	}
}

func TestDownloadErrors(t *testing.T) {
	a := newAgent(t)
	must(t, os.Mkdir(filepath.Join(a.home, "dir"), 0o755))
	must(t, os.WriteFile(filepath.Join(a.home, "file"), nil, 0o644))
	must(t, syscall.Mkfifo(filepath.Join(a.home, "pipe"), 0o644))
	for query, want := range map[string]string{
		"path=missing":            "404 path '" + a.home + "/missing' does not exist",
		"path=dir":                "400 path '" + a.home + "/dir' is a directory",
		"":                        "400 path '" + a.home + "' is a directory",
		"path=pipe":               "400 path '" + a.home + "/pipe' is not a regular file",
		"path=file/x":             "400 not a directory",
		"path=%7Eother/x":         "400 ~",
		"path=a%00b":              "400 zero byte",
		"path=file&username=none": "401 error looking up user 'none': user: unknown user none",
	} {
		status, body, _ := a.do(t, http.MethodGet, "/files?"+query, nil)
		code, message, _ := strings.Cut(want, " ")
		n, _ := strconv.Atoi(code)
		wantError(t, status, body, n, message)
	}
	status, body, _ := a.do(t, http.MethodGet, "/files?path=file", nil, "Accept-Encoding", "br, identity;q=0")
	wantError(t, status, body, http.StatusNotAcceptable, "no acceptable encoding found, supported: [identity, gzip]")
}

func TestResponseEncoding(t *testing.T) {
	for header, want := range map[string]string{
		"": "identity", "gzip": "gzip", "GZIP ; q=0.5": "gzip", "gzip;q=0": "identity", "identity": "identity", "*": "identity", "br": "identity", "deflate, br": "identity",
		"gzip, deflate": "identity", "gzip, deflate, br": "identity", "gzip;q=1, identity;q=0.5": "gzip", "gzip;q=0.5, identity;q=1": "identity",
		"gzip, identity;q=0": "gzip", "*, identity;q=0": "gzip", "gzip;q=0, br": "identity", "br, identity;q=0": "", "*;q=0": "", "gzip, *;q=0": "gzip", "gzip;q=x": "gzip",
	} {
		if got, err := responseEncoding(header); got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v; want %q", header, got, err, want)
		}
	}
}

func TestSignatures(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, `{"accessToken":"secret"}`)
	must(t, os.WriteFile(filepath.Join(a.home, "f"), []byte("text"), 0o644))
	later, earlier := strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10), strconv.FormatInt(time.Now().Add(-time.Hour).Unix(), 10)
	get := func(query url.Values, headers ...string) (int, string) {
		status, body, _ := a.do(t, http.MethodGet, "/files?"+query.Encode(), nil, headers...)
		return status, body
	}
	signed := func(path, op, user, expiration string) url.Values {
		q := url.Values{"path": {path}, "signature": {sign(path, op, user, "secret", expiration)}}
		if user != "" {
			q.Set("username", user)
		}
		if expiration != "" {
			q.Set("signature_expiration", expiration)
		}
		return q
	}
	for _, q := range []url.Values{signed("f", "read", "", ""), signed("f", "read", "user", ""), signed("f", "read", "user", later)} {
		if status, body := get(q); status != http.StatusOK || body != "text" {
			t.Errorf("%v: status %d, %s", q, status, body)
		}
	}
	if status, _ := get(url.Values{"path": {"f"}}, tokenHeader, "secret"); status != http.StatusOK {
		t.Errorf("with the token: status %d", status)
	}
	status, body := get(signed("f", "read", "user", earlier))
	if status != http.StatusUnauthorized || body != `{"code":401,"message":"signature is already expired"}`+"\n" {
		t.Errorf("expired: status %d, %s", status, body)
	}
	changed := signed("f", "read", "user", "")
	changed.Set("signature_expiration", earlier)
	other := signed("g", "read", "", "")
	other.Set("path", "f")
	for _, q := range []url.Values{changed, other, signed("f", "write", "", ""), {"path": {"f"}, "signature": {"v1_x"}}} {
		if status, body := get(q); status != http.StatusUnauthorized || body != `{"code":401,"message":"invalid signature"}`+"\n" {
			t.Errorf("%v: status %d, %s", q, status, body)
		}
	}
	status, body = get(url.Values{"path": {"f"}})
	wantError(t, status, body, http.StatusUnauthorized, "missing signature query parameter")
	status, body = get(signed("f", "read", "", ""), tokenHeader, "wrong")
	wantError(t, status, body, http.StatusUnauthorized, "access token present in header but does not match")
	status, body = get(url.Values{"path": {"f"}, "signature": {"x"}, "signature_expiration": {"soon"}})
	wantError(t, status, body, http.StatusBadRequest, "soon")
	form, kind := form(t, `form-data; name="file"; filename="up/loaded"`, "x")
	if status, body, _ := a.do(t, http.MethodPost, "/files?"+signed("", "write", "", later).Encode(), form, "Content-Type", kind); status != http.StatusOK {
		t.Errorf("signed upload: status %d, %s", status, body)
	}
	status, body, _ = a.do(t, http.MethodPost, "/files?"+signed("x", "read", "", "").Encode(), strings.NewReader("x"), "Content-Type", "application/octet-stream")
	wantError(t, status, body, http.StatusUnauthorized, "invalid signature")
}

func TestCompose(t *testing.T) {
	a := newAgent(t)
	for _, name := range []string{"1", "2", "3"} {
		must(t, os.WriteFile(filepath.Join(a.home, name), []byte(name+name), 0o600))
	}
	must(t, os.Mkdir(filepath.Join(a.home, "dir"), 0o755))
	post := func(body string) (int, string) {
		status, text, _ := a.do(t, http.MethodPost, "/files/compose", strings.NewReader(body))
		return status, text
	}
	for body, want := range map[string]int{
		`{"source_paths":[],"destination":"d"}`:        400,
		`{"source_paths":["1"]}`:                       400,
		`{"source_paths":["1","2"],"destination":"2"}`: 400,
		`{"source_paths":["dir"],"destination":"d"}`:   400,
		`{"source_paths":["1","9"],"destination":"d"}`: 404,
		`{`: 400,
		`{"source_paths":["1"],"destination":"d","username":"x"}`: 401,
	} {
		status, text := post(body)
		wantError(t, status, text, want, "")
	}
	status, text := post(`{"source_paths":["1","~/2","` + a.home + `/3"],"destination":"new/d","username":"user"}`)
	if status != http.StatusOK || text != `{"path":"`+a.home+`/new/d","name":"d","type":"file"}`+"\n" || a.content(t, "new/d") != "112233" {
		t.Errorf("status %d, %s, %q", status, text, a.content(t, "new/d"))
	}
	left, _ := os.ReadDir(filepath.Join(a.home, "new"))
	if _, err := os.Stat(filepath.Join(a.home, "1")); err == nil || len(left) != 1 {
		t.Errorf("sources or temporary files are left: %v", left)
	}
}

func FuzzSignature(f *testing.F) {
	f.Add("path=a&signature=v1_x&signature_expiration=5", "t")
	f.Add("signature="+sign("", "read", "", "t", ""), "t")
	f.Fuzz(func(t *testing.T, rawQuery, token string) {
		query, err := url.ParseQuery(rawQuery)
		if err != nil || token == "" {
			return
		}
		r := &http.Request{Header: http.Header{}}
		if authorizeFiles(r, query, opRead, token, time.Unix(100, 0)) == nil &&
			query.Get("signature") != sign(query.Get("path"), opRead, query.Get("username"), token, "") && !query.Has("signature_expiration") {
			t.Errorf("%s was let in", rawQuery)
		}
	})
}

func FuzzFileName(f *testing.F) {
	f.Add(`form-data; name="file"; filename="/a/b%22.txt"`)
	f.Add(`form-data; name=file; filename*=utf-8''a%2fb`)
	f.Fuzz(func(t *testing.T, header string) {
		_, name := disposition(header)
		path, err := resolvePath(name, &account{home: "/home/user"}, "")
		if err == nil && (!filepath.IsAbs(path) || path != filepath.Clean(path) || strings.ContainsRune(path, 0)) {
			t.Errorf("%q became %q", header, path)
		}
	})
}

func FuzzResolvePath(f *testing.F) {
	f.Add("~/../x", "/app")
	f.Add("", "~")
	f.Fuzz(func(t *testing.T, path, workdir string) {
		got, err := resolvePath(path, &account{home: "/home/user"}, workdir)
		if err == nil && (!filepath.IsAbs(got) || got != filepath.Clean(got)) {
			t.Errorf("%q in %q became %q", path, workdir, got)
		}
	})
}

func FuzzBasicUser(f *testing.F) {
	f.Add("Basic dXNlcjo=")
	f.Add("Bearer x")
	f.Fuzz(func(t *testing.T, header string) {
		if user, err := basicUser(header); err == nil && strings.ContainsRune(user, ':') {
			t.Errorf("%q names %q", header, user)
		}
	})
}

func FuzzAccounts(f *testing.F) {
	f.Add("user:x:1:1::/h:/bin/sh\n", "g:x:1:user,b\n")
	f.Fuzz(func(t *testing.T, passwd, group string) {
		for name, a := range parseAccounts(passwd, group).byName {
			if a.name != name || !filepath.IsAbs(a.home) || len(a.groups) == 0 {
				t.Errorf("%+v", a)
			}
		}
	})
}

func FuzzInit(f *testing.F) {
	f.Add(`{"accessToken":"a","envVars":{"A":"b"},"hostname":"h","resolvers":["1.1.1.1"],"hosts":{"a":"::1"},"timestamp":"2026-01-02T03:04:05Z"}`)
	f.Fuzz(func(t *testing.T, body string) {
		var q initRequest
		if json.Unmarshal([]byte(body), &q) != nil || q.validate() != nil {
			return
		}
		set := &settings{token: "secret", env: map[string]string{}}
		if err := q.apply(set, ""); err == nil && (q.AccessToken == nil || *q.AccessToken != "secret") {
			t.Error("let in without the token")
		}
		for line := range strings.Lines(hostsFile("", q.Hostname, q.Hosts)) {
			if !strings.HasSuffix(line, hostsMark+"\n") {
				t.Errorf("hosts has a line that is not ours: %q", line)
			}
		}
	})
}

func FuzzEncoding(f *testing.F) {
	f.Add("gzip;q=0.5, *;q=0, identity")
	f.Fuzz(func(t *testing.T, header string) {
		if got, err := responseEncoding(header); err == nil && got != encodingGzip && got != encodingIdentity {
			t.Errorf("%q gives %q", header, got)
		}
	})
}

// A client that goes away in the middle must not leave half a file that looks whole.
func TestUploadCutOff(t *testing.T) {
	a := newAgent(t)
	for _, head := range []string{
		"POST /files?path=cut HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nhalf",
		"POST /files?path=cut HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
		"POST /files?path=cut HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\nhalf",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
		must(t, err)
		_, err = conn.Write([]byte(head))
		must(t, err)
		tcp, _ := conn.(*net.TCPConn)
		must(t, tcp.CloseWrite())
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		must(t, err)
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("status %d for %.100q", res.StatusCode, head)
		}
		_ = res.Body.Close()
		_ = conn.Close()
		if _, err := os.Stat(filepath.Join(a.home, "cut")); err == nil {
			t.Errorf("half a file is left by %.100q", head)
		}
	}
}
