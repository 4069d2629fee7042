package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/client"
)

// builder is a server that takes files and builds nothing: what it was asked for is what a test looks at.
type builder struct {
	mu       sync.Mutex
	files    map[string]*bytes.Buffer
	complete map[string]bool
	puts     int
	asked    client.CreateTemplate
	build    client.Build
	canceled chan string
	// followed, where it is there, is closed by the first GET of the build, which then waits until its client goes.
	followed chan struct{}
	// breaks lets so many parts arrive by half.
	breaks int
}

func newBuilder(t *testing.T) (*builder, *world) {
	t.Helper()
	b := &builder{
		files: map[string]*bytes.Buffer{}, complete: map[string]bool{}, canceled: make(chan string, 1),
		build: client.Build{ID: "b1", TemplateID: "t1", State: client.BuildReady, Result: &client.TemplateBuild{ImageBytes: 1 << 20}},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/files/{hash}", b.status)
	mux.HandleFunc("PUT /v1/files/{hash}", b.put)
	mux.HandleFunc("POST /v1/templates", func(w http.ResponseWriter, r *http.Request) {
		b.asked = client.CreateTemplate{}
		_ = json.NewDecoder(r.Body).Decode(&b.asked)
		_ = json.NewEncoder(w).Encode(client.StartedBuild{TemplateID: "t1", BuildID: "b1"})
	})
	mux.HandleFunc("GET /v1/builds/b1", func(w http.ResponseWriter, r *http.Request) {
		if b.followed != nil {
			close(b.followed)
			<-r.Context().Done()
			return
		}
		out := b.build
		if r.URL.Query().Get("offset") != "0" {
			out.Entries = nil
		}
		_ = json.NewEncoder(w).Encode(out)
	})
	mux.HandleFunc("DELETE /v1/builds/{id}", func(w http.ResponseWriter, r *http.Request) {
		b.canceled <- r.PathValue("id")
		w.WriteHeader(http.StatusNoContent)
	})
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	return b, &world{t: t, in: strings.NewReader(""), env: []string{"E2B_API_URL=" + srv.URL, "E2B_API_KEY=k", "CLOISTER_DATA_DIR=" + t.TempDir()}}
}

func (b *builder) status(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	hash := r.PathValue("hash")
	out := client.Upload{Hash: hash, Complete: b.complete[hash]}
	if f := b.files[hash]; f != nil {
		out.Bytes = int64(f.Len())
	}
	_ = json.NewEncoder(w).Encode(out)
}

func (b *builder) put(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.puts++
	hash := r.PathValue("hash")
	if b.files[hash] == nil {
		b.files[hash] = &bytes.Buffer{}
	}
	f := b.files[hash]
	if r.URL.Query().Get("offset") != strconv.Itoa(f.Len()) {
		http.Error(w, `{"code":409,"message":"another offset"}`, http.StatusConflict)
		return
	}
	if b.breaks > 0 {
		b.breaks--
		_, _ = io.CopyN(f, r.Body, r.ContentLength/2)
		panic(http.ErrAbortHandler)
	}
	_, _ = io.Copy(f, r.Body)
	b.complete[hash] = r.URL.Query().Get("complete") == "true"
	_ = json.NewEncoder(w).Encode(client.Upload{Hash: hash, Bytes: int64(f.Len()), Complete: b.complete[hash]})
}

// project is a directory with a Dockerfile and files.
func project(t *testing.T, dockerfile string, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, f := range append(files, "Dockerfile") {
		text := "content of " + f
		if f == "Dockerfile" {
			text = dockerfile
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, f), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestTemplateBuild(t *testing.T) {
	b, w := newBuilder(t)
	dir := project(t, "ARG V=1\nFROM python:$V\nLABEL a=b\nCOPY app /srv/\nCOPY app /again/\nRUN true\nCMD [\"serve\", \"it\"]\n", "app/a.py", "app/b.py")
	b.build.Entries = []client.LogEntry{{Level: "info", Message: "CACHED [1/2] RUN \x1b[2Jtrue\n"}}
	r := w.do("template", "build", dir, "--name", "app:v2", "--tag", "latest", "--build-arg", "V=3", "--memory", "1GiB", "--cpu", "0.5", "--force")
	if r.code != 0 || !strings.HasPrefix(r.out, "template app:v2 is ready: build b1, 1MiB") {
		t.Fatalf("%+v", r)
	}
	for _, says := range []string{"warning: " + dir + "/Dockerfile: line 3: LABEL", "no --ready-cmd", "CACHED [1/2] RUN \ufffd[2Jtrue\n"} {
		if !strings.Contains(r.err, says) {
			t.Errorf("%q is not in %q", says, r.err)
		}
	}
	hash := b.asked.Steps[2].FilesHash
	want := client.CreateTemplate{
		Name: "app:v2", Tags: []string{"latest"}, Sources: []string{"python:3"}, Force: true, StartCommand: "serve it", ReadyCommand: "sleep 20",
		Resources: client.Resources{MilliCPU: 500, MemoryBytes: 1 << 30},
		Steps: []client.BuildStep{
			{Type: "USER", Args: []string{"root"}},
			{Type: "WORKDIR", Args: []string{"/"}},
			{Type: "COPY", Args: []string{"app", "/srv/", "", ""}, FilesHash: hash},
			{Type: "COPY", Args: []string{"app", "/again/", "", ""}, FilesHash: hash},
			{Type: "RUN", Args: []string{"true", ""}},
			{Type: "USER", Args: []string{"user"}},
			{Type: "WORKDIR", Args: []string{"/home/user"}},
		},
	}
	if d := cmp.Diff(want, b.asked); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if b.puts != 1 || !b.complete[hash] {
		t.Errorf("%d parts were sent of one archive that two steps take", b.puts)
	}
	if r := w.do("template", "build", filepath.Join(dir, "Dockerfile"), "-n", "app", "--start-cmd", "", "--no-wait"); r.code != 0 || r.out != "b1\n" || b.puts != 1 {
		t.Errorf("%+v, %d parts", r, b.puts)
	}
	if b.asked.StartCommand != "" || b.asked.ReadyCommand != "" {
		t.Errorf("%+v", b.asked)
	}
}

// A transfer that breaks goes on where it ended.
func TestSendFilesAgain(t *testing.T) {
	b, w := newBuilder(t)
	b.breaks = 2
	dir := project(t, "FROM a\nCOPY . /x\n", "a")
	if err := os.WriteFile(filepath.Join(dir, "zeros"), make([]byte, partBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	w.must("template", "build", dir, "-n", "app")
	if b.breaks != 0 || len(b.complete) != 1 {
		t.Errorf("%d breaks left, %v", b.breaks, b.complete)
	}
}

func TestBuildFails(t *testing.T) {
	b, w := newBuilder(t)
	b.build.State, b.build.Error = client.BuildFailed, "failed to run command 'false': exit status 1"
	dir := project(t, "FROM a\nRUN false\n")
	if r := w.do("template", "build", dir, "-n", "app"); r.code != 1 || !strings.HasSuffix(r.err, "cloister: build template app: failed to run command 'false': exit status 1\n") {
		t.Errorf("%+v", r)
	}
	if r := w.do("template", "follow", "b1", "-o", "json"); r.code != 1 || !strings.Contains(r.out, `"state": "failed"`) {
		t.Errorf("%+v", r)
	}
}

func TestBuildInterrupted(t *testing.T) {
	b, w := newBuilder(t)
	b.followed = make(chan struct{})
	dir := project(t, "FROM a\nRUN sleep 1000\n")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan result)
	go func() { done <- w.doContext(ctx, "template", "build", dir, "-n", "app") }()
	<-b.followed
	cancel()
	if r := <-done; r.code != exitInterrupted || !strings.Contains(r.err, "build b1 was cancelled") {
		t.Errorf("%+v", r)
	}
	if id := <-b.canceled; id != "b1" {
		t.Error(id)
	}
}

func TestBuildMistakes(t *testing.T) {
	_, w := newBuilder(t)
	bad := project(t, "FROM a\nCOPY --from=b x y\n")
	empty := t.TempDir()
	missing := project(t, "FROM a\nRUN x\nCOPY nope /\n")
	for _, tc := range []struct {
		args []string
		says string
	}{
		{[]string{missing}, "want --name"},
		{[]string{"-n", "a", "x", "y"}, "want one directory or Dockerfile"},
		{[]string{"-n", "a", filepath.Join(empty, "nope")}, "no such file"},
		{[]string{"-n", "a", empty}, "has no Dockerfile and no e2b.Dockerfile"},
		{[]string{"-n", "a", bad}, bad + "/Dockerfile: Dockerfile, line 2: COPY --from=b"},
		{[]string{"-n", "a", missing}, `line 3: "nope": no such file`},
		{[]string{"-n", "a", "--cpu", "-1", missing}, "cpu -1"},
		{[]string{"-n", "a", "--memory", "x", missing}, `size "x"`},
		{[]string{"-n", "a", "--build-arg", "x", missing}, "want KEY=VALUE"},
		{[]string{"-n", "a", "--context", filepath.Join(empty, "nope"), missing}, "build context"},
	} {
		if r := w.do(append([]string{"template", "build"}, tc.args...)...); r.code != exitUsage || !strings.Contains(r.err, tc.says) {
			t.Errorf("%q: %+v, want %q", tc.args, r, tc.says)
		}
	}
}

func TestStepName(t *testing.T) {
	for in, want := range map[string]string{"3": "step 3", "base": "base", "": ""} {
		if got := stepName(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestSandboxStates(t *testing.T) {
	for want, s := range map[string]client.Sandbox{
		"running":               {State: "running"},
		"failed: why":           {State: "failed", Reason: "why"},
		"paused -, 2MiB":        {State: "paused", PausedKind: "memory", PausedBytes: 2 << 20},
		"paused -, files of 0B": {State: "paused", PausedKind: "files"},
	} {
		if got := stateOf(s); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := ends(client.Sandbox{State: "running", AutoPause: true}); got != "never" {
		t.Error(got)
	}
	if got := fmt.Sprint(forkErrors([]client.Fork{{}, {Error: &client.Error{Code: 503, Message: "full"}}})); got != "[fork 2: full]" {
		t.Error(got)
	}
}
