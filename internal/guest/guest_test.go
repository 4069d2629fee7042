package guest

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem/filesystemconnect"
	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
)

// asInit makes the test binary run as an agent instead; see TestReaperAsInit.
const asInit = "guest-as-init"

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == asInit {
		runAsInit(os.Args[2])
		return
	}
	goleak.VerifyTestMain(m)
}

// needRoot skips without root, and fails instead where the privileged tests are required.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // The switch of privileged tests.
		t.Fatal("this test needs root, and REQUIRE_HOSTS=1 forbids to skip it")
	}
	t.Skip("needs root")
}

// agent is a running agent with its own root directory, whose user "user" is whoever runs the test.
type agent struct {
	*Server
	url  string
	root string
	home string
	http *http.Client
	proc processconnect.ProcessClient
	fs   filesystemconnect.FilesystemClient
}

func newAgent(t *testing.T, change ...func(*Config)) *agent {
	t.Helper()
	root := t.TempDir()
	a := &agent{root: root, home: filepath.Join(root, "home/user")}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	must(t, os.MkdirAll(a.home, 0o755))
	must(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
	must(t, os.Chmod(filepath.Dir(root), 0o755)) // for tests that act as nobody
	passwd := fmt.Sprintf("user:x:%s:%s::%s:/bin/bash\nnobody:x:65534:65534::/nonexistent:/bin/sh\n", me.Uid, me.Gid, a.home)
	must(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(passwd), 0o644))
	must(t, os.WriteFile(filepath.Join(root, "etc/group"), []byte("user:x:"+me.Gid+":\nnogroup:x:65534:\nextra:x:4711:nobody,user\n"), 0o644))
	cfg := Config{Root: root, Env: []string{"PATH=" + defaultPath, "FROM_IMAGE=1"}}
	for _, c := range change {
		c(&cfg)
	}
	a.Server = New(cfg)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- a.Serve(ctx, ln) }()
	a.url = "http://" + ln.Addr().String()
	transport := &http.Transport{DisableCompression: true}
	a.http = &http.Client{Transport: transport}
	a.proc, a.fs = a.clients(a.http)
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return a
}

func (a *agent) clients(c connect.HTTPClient, options ...connect.ClientOption) (processconnect.ProcessClient, filesystemconnect.FilesystemClient) {
	return processconnect.NewProcessClient(c, a.url, options...), filesystemconnect.NewFilesystemClient(c, a.url, options...)
}

// h2c returns a client that speaks HTTP/2 without encryption.
func h2c(t *testing.T) *http.Client {
	t.Helper()
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// as returns a context whose calls act as a user.
func as(t *testing.T, name string) context.Context {
	t.Helper()
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(name+":")))
	return ctx
}

// do sends a request and returns status and body; headers come in pairs.
func (a *agent) do(t *testing.T, method, path string, body io.Reader, headers ...string) (int, string, http.Header) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, a.url+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for pair := range slices.Chunk(headers, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	res, err := a.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close() //nolint:errcheck // It was only read.
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(text), res.Header
}

// initialize posts a body to /init and wants it taken.
func (a *agent) initialize(t *testing.T, body string, headers ...string) {
	t.Helper()
	if status, text, _ := a.do(t, http.MethodPost, "/init", strings.NewReader(body), headers...); status != http.StatusNoContent {
		t.Fatalf("init %s: status %d, %s", body, status, text)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t *testing.T, err error, code connect.Code, text string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %v with %q", err, code, text)
	}
}

func wantError(t *testing.T, status int, body string, code int, message string) {
	t.Helper()
	var got struct {
		Code    int
		Message string
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil || status != code || got.Code != code || !strings.Contains(got.Message, message) {
		t.Errorf("status %d, body %s; want %d and a message with %q", status, body, code, message)
	}
}

func TestHealth(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, `{"accessToken":"secret"}`)
	if status, body, _ := a.do(t, http.MethodGet, "/health", nil); status != http.StatusNoContent || body != "" {
		t.Errorf("status %d, body %q; want an empty 204", status, body)
	}
	res, err := h2c(t).Get(a.url + "/health")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close() //nolint:errcheck // It was only read.
	if res.StatusCode != http.StatusNoContent || res.ProtoMajor != 2 {
		t.Errorf("over HTTP/2: status %d, %s", res.StatusCode, res.Proto)
	}
}

func TestToken(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, `{"accessToken":"secret"}`)
	for _, route := range []string{"GET /envs", "GET /metrics", "GET /logs", "POST /files/compose", "POST /process.Process/List", "POST /filesystem.Filesystem/Stat", "GET /nowhere"} {
		method, path, _ := strings.Cut(route, " ")
		for _, token := range []string{"", "wrong"} {
			status, body, _ := a.do(t, method, path, strings.NewReader("{}"), "Content-Type", "application/json", tokenHeader, token)
			wantError(t, status, body, http.StatusUnauthorized, "unauthorized access")
		}
		if status, _, _ := a.do(t, method, path, strings.NewReader("{}"), "Content-Type", "application/json", tokenHeader, "secret"); status == http.StatusUnauthorized {
			t.Errorf("%s with the token: status %d", route, status)
		}
	}
	_, err := a.proc.List(t.Context(), nil)
	if err == nil || err.Error() != "unauthenticated: 401 Unauthorized" {
		t.Errorf("connect client without a token: %v", err)
	}
}

func TestOrigins(t *testing.T) {
	a := newAgent(t)
	status, _, h := a.do(t, http.MethodOptions, "/files", nil, "Origin", "https://example.org", "Access-Control-Request-Method", "POST")
	if status != http.StatusNoContent || h.Get("Access-Control-Allow-Origin") != "*" || !strings.Contains(h.Get("Access-Control-Allow-Methods"), "POST") {
		t.Errorf("preflight: status %d, %v", status, h)
	}
	if _, _, h := a.do(t, http.MethodGet, "/health", nil); h.Get("Access-Control-Allow-Origin") != "" {
		t.Error("a request without an origin was answered with one")
	}
}

func TestEnvsAndMetrics(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, `{"envVars":{"A":"1"},"sandboxId":"sbx","templateId":"tpl"}`)
	_, body, _ := a.do(t, http.MethodGet, "/envs", nil)
	var env map[string]string
	must(t, json.Unmarshal([]byte(body), &env))
	for name, want := range map[string]string{"A": "1", "E2B_SANDBOX": "true", "E2B_SANDBOX_ID": "sbx", "E2B_TEMPLATE_ID": "tpl"} {
		if env[name] != want {
			t.Errorf("%s is %q, want %q", name, env[name], want)
		}
	}
	_, body, _ = a.do(t, http.MethodGet, "/metrics", nil)
	var m metricsReport
	must(t, json.Unmarshal([]byte(body), &m))
	if m.CPUCount == 0 || m.MemTotal == 0 || m.MemUsed == 0 || m.MemUsed > m.MemTotal || m.DiskTotal == 0 || m.Timestamp == 0 || m.MemTotalMi != m.MemTotal>>20 {
		t.Errorf("metrics: %s", body)
	}
	if m.CPUUsedPct < 0 || m.CPUUsedPct > 100 {
		t.Errorf("cpu_used_pct is %v", m.CPUUsedPct)
	}
}

func TestProcessTicks(t *testing.T) {
	stat := "42 (a ) b) S 1 42 42 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 100"
	if got := processTicks(stat); got != 110 {
		t.Errorf("got %d ticks, want 110", got)
	}
	if pid, ok := inSession(stat, 42); pid != 42 || !ok {
		t.Errorf("in session: %d, %v", pid, ok)
	}
	if _, ok := inSession(stat, 1); ok {
		t.Error("in a session that is not its own")
	}
}

func TestLogs(t *testing.T) {
	var text bytes.Buffer
	r := &ring{next: slog.NewTextHandler(&text, nil)}
	log := slog.New(r).With(slog.String("sandbox", "s"))
	for i := range ringSize + 5 {
		log.LogAttrs(t.Context(), slog.LevelInfo, "n", slog.Int("i", i))
	}
	log.LogAttrs(t.Context(), slog.LevelDebug, "not kept")
	all := r.since(r.since(time.Time{})[0].Time)
	if got := len(r.since(time.Time{})); got != ringSize {
		t.Fatalf("%d entries, want %d", got, ringSize)
	}
	last := r.since(time.Time{})[ringSize-1]
	if last.Fields["i"] != strconv.Itoa(ringSize+4) || last.Fields["sandbox"] != "s" || last.Level != "info" {
		t.Errorf("last entry: %+v", last)
	}
	if len(all) >= ringSize || !strings.Contains(text.String(), "i=1004") {
		t.Errorf("%d entries after the first; text %d bytes", len(all), text.Len())
	}

	a := newAgent(t)
	if code, out, _ := a.run(t, "echo hi"); code != 0 || out != "hi\n" {
		t.Fatal(code, out)
	}
	status, body, _ := a.do(t, http.MethodGet, "/logs", nil)
	var entries []LogEntry
	must(t, json.Unmarshal([]byte(body), &entries))
	if status != http.StatusOK || !slices.ContainsFunc(entries, func(e LogEntry) bool {
		return e.Message == "process ended" && e.Fields["exit_code"] == "0"
	}) {
		t.Errorf("status %d, %s", status, body)
	}
	_, body, _ = a.do(t, http.MethodGet, "/logs?since="+entries[len(entries)-1].Time.Format("2006-01-02T15:04:05.999999999Z"), nil)
	if strings.TrimSpace(body) != "[]" {
		t.Errorf("nothing should be newer: %s", body)
	}
	status, body, _ = a.do(t, http.MethodGet, "/logs?since=yesterday", nil)
	wantError(t, status, body, http.StatusBadRequest, "yesterday")
}

func TestInit(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, "")
	must(t, os.WriteFile(filepath.Join(a.root, "etc/hosts"), []byte("127.0.0.1 localhost\n10.9.9.9 mine\n"), 0o644))
	a.initialize(t, `{"accessToken":"one","envVars":{"A":"1"},"hostname":"box","resolvers":["10.0.0.1","fd00::1"],"hosts":{"db":"10.0.0.2"},
		"sandboxId":"sbx1","templateId":"tpl","defaultUser":"nobody","defaultWorkdir":"/tmp","timestamp":"2026-01-02T03:04:05.678Z","caBundle":"-----BEGIN-----\nX","unknown":[1],
		"volumeMounts":[{"path":"/mnt/vol","nfs_target":"x"}]}`)
	for name, want := range map[string]string{
		"etc/hostname": "box\n", "etc/resolv.conf": "nameserver 10.0.0.1\nnameserver fd00::1\n",
		"etc/hosts":            "127.0.0.1 localhost\n10.9.9.9 mine\n127.0.1.1\tbox\t" + hostsMark + "\n10.0.0.2\tdb\t" + hostsMark + "\n",
		"run/e2b/.E2B_SANDBOX": "true", "run/e2b/.E2B_SANDBOX_ID": "sbx1", "run/e2b/.E2B_TEMPLATE_ID": "tpl",
		"etc/ssl/certs/ca-certificates.crt": "-----BEGIN-----\nX\n",
	} {
		if got, err := os.ReadFile(filepath.Join(a.root, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	if info, err := os.Stat(filepath.Join(a.root, "mnt/vol")); err != nil || !info.IsDir() {
		t.Error("the volume's directory is missing")
	}
	got := a.settings.get()
	if got.token != "one" || got.user != "nobody" || got.workdir != "/tmp" {
		t.Errorf("settings: %+v", got)
	}
	// A second one, from a restored snapshot, replaces what the first one wrote, and adds the certificate once.
	a.initialize(t, `{"accessToken":"one","hostname":"box2","caBundle":"-----BEGIN-----\nX"}`)
	if got, _ := os.ReadFile(filepath.Join(a.root, "etc/hosts")); strings.Contains(string(got), "box\t") || !strings.Contains(string(got), "box2\t") {
		t.Errorf("hosts: %s", got)
	}
	if got, _ := os.ReadFile(filepath.Join(a.root, "etc/ssl/certs/ca-certificates.crt")); strings.Count(string(got), "BEGIN") != 1 {
		t.Errorf("certificates: %s", got)
	}
}

func TestInitToken(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, `{"accessToken":"one"}`)
	for _, test := range []struct {
		body, header string
		status       int
	}{
		{`{}`, "", http.StatusUnauthorized},
		{``, "wrong", http.StatusUnauthorized},
		{`{"accessToken":"two"}`, "", http.StatusUnauthorized},
		{`{"accessToken":"one"}`, "", http.StatusNoContent},
		{`{}`, "one", http.StatusNoContent},
		{`{"accessToken":""}`, "one", http.StatusNoContent},
		{`{"accessToken":"two"}`, "one", http.StatusNoContent},
		{`{"accessToken":"one"}`, "", http.StatusUnauthorized},
		{`{}`, "two", http.StatusNoContent},
		{`{"hostname":"a b"}`, "two", http.StatusBadRequest},
		{`{"resolvers":["x"]}`, "two", http.StatusBadRequest},
		{`{"hosts":{"a\nb":"1.1.1.1"}}`, "two", http.StatusBadRequest},
		{`{"envVars":{"A=B":""}}`, "two", http.StatusBadRequest},
		{`{"timestamp":"now"}`, "two", http.StatusBadRequest},
		{`[]`, "two", http.StatusBadRequest},
	} {
		status, body, _ := a.do(t, http.MethodPost, "/init", strings.NewReader(test.body), tokenHeader, test.header)
		if status != test.status {
			t.Errorf("init %s with header %q: status %d, %s; want %d", test.body, test.header, status, body, test.status)
		}
	}
}

func TestAccounts(t *testing.T) {
	table := parseAccounts("root:x:0:0::/root:/bin/sh\n# no\nbad line\nroot:x:7:7::/r:/\na:x:5:6::relative:/\nb:x:-1:0::/:/\n", "root:x:0:\nwheel:x:10:root,a,nobody\nz:x:x:\n")
	if r := table.byName["root"]; r == nil || r.uid != 0 || r.home != "/root" || !slices.Equal(r.groups, []uint32{0, 10}) {
		t.Errorf("root: %+v", r)
	}
	if a := table.byName["a"]; a == nil || a.home != "/" || !slices.Equal(a.groups, []uint32{6, 10}) {
		t.Errorf("a: %+v", a)
	}
	if len(table.byName) != 2 || table.groups[10] != "wheel" {
		t.Errorf("table: %+v", table)
	}
}

func TestUsersFollowTheFile(t *testing.T) {
	a := newAgent(t)
	if _, err := a.users.lookup("late"); err == nil {
		t.Fatal("found before it exists")
	}
	path := filepath.Join(a.root, "etc/passwd")
	text, _ := os.ReadFile(path)
	must(t, os.WriteFile(path, append(text, "late:x:77:77::/late:/bin/sh\n"...), 0o644))
	for _, name := range []string{"late", "77"} {
		if u, err := a.users.lookup(name); err != nil || u.home != "/late" {
			t.Errorf("lookup %s: %+v, %v", name, u, err)
		}
	}
}

func TestResolvePath(t *testing.T) {
	a := &account{name: "user", home: "/home/user"}
	for _, test := range []struct{ path, workdir, want string }{
		{"", "", "/home/user"},
		{"", "/app", "/app"},
		{"", "app", "/home/user/app"},
		{"", "~/app", "/home/user/app"},
		{"~", "/app", "/home/user"},
		{"~/x", "", "/home/user/x"},
		{"x/../y", "/app", "/home/user/y"},
		{"/a//b/../c", "", "/a/c"},
		{"/../..", "", "/"},
		{"../other", "", "/home/other"},
		{"~other", "", "error"},
		{"a\x00b", "", "error"},
		{strings.Repeat("a", 5000), "", "error"},
	} {
		got, err := resolvePath(test.path, a, test.workdir)
		if (err != nil) != (test.want == "error") || (err == nil && got != test.want) {
			t.Errorf("%.20q in %q: %q, %v; want %q", test.path, test.workdir, got, err, test.want)
		}
	}
}

func TestInitKeepsThePath(t *testing.T) {
	a := newAgent(t)
	name := filepath.Join(a.root, pathFile)
	a.initialize(t, `{"envVars":{"PATH":"`+defaultPath+`"}}`)
	if _, err := os.Stat(name); err == nil {
		t.Error("the usual path is written")
	}
	a.initialize(t, `{"envVars":{"PATH":"/opt/it's/bin:/bin"}}`)
	out, err := exec.Command("/bin/sh", "-c", ". "+name+`; echo "$PATH"`).Output()
	if err != nil || string(out) != "/opt/it's/bin:/bin\n" {
		t.Errorf("a shell has %q, %v", out, err)
	}
}

func TestInitOfACopy(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, `{"accessToken":"one","sandboxId":"sbx1","templateId":"tpl","envVars":{"A":"1","B":"1"}}`)
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set(tokenHeader, "one")
	ended := a.start(ctx, t, bash("true")).wait()
	talk := bash("read -r line; echo got $line")
	talk.Stdin = nil
	live := a.start(ctx, t, talk)
	again := func(header, body string) {
		t.Helper()
		if status, text, _ := a.do(t, http.MethodPost, "/init", strings.NewReader(body), tokenHeader, header); status != http.StatusNoContent {
			t.Fatalf("status %d: %s", status, text)
		}
	}
	again("one", `{"envVars":{"C":"1"}}`) // a resumed one is still itself
	if len(a.ring.since(time.Time{})) == 0 || a.procs.find(byPID(ended.pid), true) == nil {
		t.Error("a sandbox forgets its own past")
	}
	again("one", `{"accessToken":"two","sandboxId":"sbx2","templateId":"other","envVars":{"B":"2"}}`)
	got := a.settings.get()
	want := map[string]string{"A": "1", "B": "2", "C": "1", "E2B_SANDBOX": "true", "E2B_SANDBOX_ID": "sbx2", "E2B_TEMPLATE_ID": "other"}
	if diff := cmp.Diff(want, got.env); diff != "" || got.token != "two" {
		t.Errorf("token %q, environment (-want +got):\n%s", got.token, diff)
	}
	if log := a.ring.since(time.Time{}); len(log) != 0 || a.procs.find(byPID(ended.pid), true) != nil {
		t.Errorf("the past of another sandbox is kept: %v", log)
	}
	info.RequestHeader().Set(tokenHeader, "two")
	_, err := a.proc.SendInput(ctx, &process.SendInputRequest{Process: byPID(live.pid), Input: &process.ProcessInput{
		Input: &process.ProcessInput_Stdin{Stdin: []byte("it\n")},
	}})
	must(t, err)
	for live.stream.Receive() {
		live.add(live.stream.Msg().GetEvent())
	}
	if live.stdout.String() != "got it\n" {
		t.Errorf("what ran has written %q", live.stdout.String())
	}
}
