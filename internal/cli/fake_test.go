package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem/filesystemconnect"
	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeProcess is what a test's program sees.
type fakeProcess struct {
	req    *process.StartRequest
	stdin  *io.PipeReader
	feed   *io.PipeWriter
	send   func(*process.ProcessEvent_DataEvent)
	signal chan process.Signal
}

func (p *fakeProcess) stdout(b []byte) {
	p.send(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: b}})
}

func (p *fakeProcess) stderr(b []byte) {
	p.send(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stderr{Stderr: b}})
}

// errCut makes the fake break the connection in place of an end.
var errCut = errors.New("cut")

// fakeGuest is the agent in a sandbox: its files are those below root, its one program is run.
type fakeGuest struct {
	processconnect.UnimplementedProcessHandler
	filesystemconnect.UnimplementedFilesystemHandler
	root  string
	run   func(*fakeProcess) (*process.ProcessEvent_EndEvent, error)
	list  func() []*filesystem.EntryInfo // nil: what is there
	mu    sync.Mutex
	now   *fakeProcess
	users []string
}

func exited(code int32) (*process.ProcessEvent_EndEvent, error) {
	return &process.ProcessEvent_EndEvent{ExitCode: code, Exited: true, Status: "exit status " + strconv.Itoa(int(code))}, nil
}

func (g *fakeGuest) Start(_ context.Context, req *process.StartRequest, out *connect.ServerStream[process.StartResponse]) error {
	emit := func(e *process.ProcessEvent) { _ = out.Send(&process.StartResponse{Event: e}) }
	p := &fakeProcess{req: req, signal: make(chan process.Signal, 4), send: func(d *process.ProcessEvent_DataEvent) {
		emit(&process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}})
	}}
	p.stdin, p.feed = io.Pipe()
	defer func() { _ = p.stdin.Close() }()
	g.mu.Lock()
	g.now = p
	g.mu.Unlock()
	emit(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}})
	run := g.run
	if req.GetProcess().GetCmd() == "chmod" {
		run = g.chmod
	}
	end, err := run(p)
	if errors.Is(err, errCut) {
		panic(http.ErrAbortHandler)
	}
	if err != nil {
		return err
	}
	emit(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}})
	return nil
}

func (g *fakeGuest) current() *fakeProcess {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.now
}

func (g *fakeGuest) SendInput(_ context.Context, r *process.SendInputRequest) (*process.SendInputResponse, error) {
	_, err := g.current().feed.Write(r.GetInput().GetStdin())
	return &process.SendInputResponse{}, err
}

func (g *fakeGuest) CloseStdin(context.Context, *process.CloseStdinRequest) (*process.CloseStdinResponse, error) {
	return &process.CloseStdinResponse{}, g.current().feed.Close()
}

func (g *fakeGuest) SendSignal(_ context.Context, r *process.SendSignalRequest) (*process.SendSignalResponse, error) {
	g.current().signal <- r.GetSignal()
	return &process.SendSignalResponse{}, nil
}

func (g *fakeGuest) chmod(p *fakeProcess) (*process.ProcessEvent_EndEvent, error) {
	args := p.req.GetProcess().GetArgs()
	mode, err := strconv.ParseUint(args[0], 8, 12)
	for _, at := range args[2:] {
		err = errors.Join(err, os.Chmod(g.host(at), fs.FileMode(mode)))
	}
	if err != nil {
		p.stderr([]byte(err.Error()))
		return exited(1)
	}
	return exited(0)
}

// abs is a path as the agent resolves it, host where the test keeps it.
func (g *fakeGuest) abs(p string) string {
	if !path.IsAbs(p) {
		p = path.Join("/home/user", p)
	}
	return path.Clean(p)
}
func (g *fakeGuest) host(p string) string { return filepath.Join(g.root, g.abs(p)) }

func (g *fakeGuest) entry(at string) (*filesystem.EntryInfo, error) {
	info, err := os.Lstat(g.host(at))
	if err != nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("path '"+at+"' does not exist"))
	}
	e := &filesystem.EntryInfo{Name: info.Name(), Path: g.abs(at), Mode: uint32(info.Mode().Perm()), Type: filesystem.FileType_FILE_TYPE_FILE}
	switch {
	case info.IsDir():
		e.Type = filesystem.FileType_FILE_TYPE_DIRECTORY
	case info.Mode()&fs.ModeSymlink != 0:
		e.Type = filesystem.FileType_FILE_TYPE_SYMLINK
	}
	return e, nil
}

func (g *fakeGuest) Stat(_ context.Context, r *filesystem.StatRequest) (*filesystem.StatResponse, error) {
	e, err := g.entry(r.GetPath())
	return &filesystem.StatResponse{Entry: e}, err
}

func (g *fakeGuest) MakeDir(_ context.Context, r *filesystem.MakeDirRequest) (*filesystem.MakeDirResponse, error) {
	if err := os.MkdirAll(g.host(r.GetPath()), 0o755); err != nil {
		return nil, err
	}
	e, err := g.entry(r.GetPath())
	return &filesystem.MakeDirResponse{Entry: e}, err
}

func (g *fakeGuest) ListDir(_ context.Context, r *filesystem.ListDirRequest) (*filesystem.ListDirResponse, error) {
	if g.list != nil {
		return &filesystem.ListDirResponse{Entries: g.list()}, nil
	}
	out := &filesystem.ListDirResponse{}
	top := g.host(r.GetPath())
	err := filepath.WalkDir(top, func(at string, d fs.DirEntry, err error) error {
		if err != nil || at == top {
			return err
		}
		rel, _ := filepath.Rel(top, at)
		e, err := g.entry(path.Join(g.abs(r.GetPath()), rel))
		out.Entries = append(out.Entries, e)
		if d.IsDir() && depth(rel) == int(r.GetDepth()) {
			return errors.Join(err, fs.SkipDir)
		}
		return err
	})
	if errors.Is(err, fs.SkipDir) {
		err = nil
	}
	return out, err
}

func (g *fakeGuest) serveFiles(w http.ResponseWriter, r *http.Request) {
	at := r.URL.Query().Get("path")
	user, _, _ := r.BasicAuth()
	g.mu.Lock()
	g.users = append(g.users, user)
	g.mu.Unlock()
	if r.Method == http.MethodGet {
		text, err := os.ReadFile(g.host(at))
		if err != nil {
			w.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(w).Encode(client.Error{Code: 404, Message: "path '" + at + "' does not exist"})
			return
		}
		_, _ = w.Write(text)
		return
	}
	text, err := io.ReadAll(r.Body)
	err = errors.Join(err, os.MkdirAll(filepath.Dir(g.host(at)), 0o755), os.WriteFile(g.host(at), text, 0o644))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_ = json.NewEncoder(w).Encode([]map[string]string{{"path": g.abs(at)}})
}

// world is a daemon of fakes with one sandbox, and the command line that reaches it.
type world struct {
	t       *testing.T
	cluster *apitest.Cluster
	guest   *fakeGuest
	env     []string
	id      string
	in      io.Reader
	token   string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, cluster: apitest.NewCluster(t, nil), guest: &fakeGuest{root: t.TempDir()}, in: strings.NewReader("")}
	w.guest.run = func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) { return exited(0) }
	url, key := w.cluster.Serve(t)
	api := client.New(url, key)
	t.Cleanup(api.Close)
	box, err := api.CreateSandbox(t.Context(), client.CreateSandbox{})
	if err != nil {
		t.Fatal(err)
	}
	w.id, w.token = box.ID, box.AccessToken
	mux := http.NewServeMux()
	at, h := processconnect.NewProcessHandler(w.guest)
	mux.Handle(at, h)
	at, h = filesystemconnect.NewFilesystemHandler(w.guest)
	mux.Handle(at, h)
	mux.HandleFunc("/files", w.guest.serveFiles)
	prefix := "/sandbox/" + box.ID + "/49983"
	proxy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/49983/health") { // of every sandbox
			rw.WriteHeader(http.StatusNoContent)
			return
		}
		if r.Header.Get("X-Access-Token") != w.token || !strings.HasPrefix(r.URL.Path, prefix) {
			t.Errorf("unexpected request %s", r.URL)
		}
		http.StripPrefix(prefix, mux).ServeHTTP(rw, r)
	}))
	t.Cleanup(proxy.Close)
	w.env = []string{"E2B_API_URL=" + url, "E2B_API_KEY=" + key, "E2B_SANDBOX_URL=" + proxy.URL, "CLOISTER_DATA_DIR=" + t.TempDir()}
	return w
}

// result is how a command line ended.
type result struct {
	code     int
	out, err string
}

func (w *world) do(args ...string) result { return w.doContext(w.t.Context(), args...) }

func (w *world) doContext(ctx context.Context, args ...string) result {
	var out, errOut bytes.Buffer
	code := run(ctx, &app{in: w.in, out: &out, err: &errOut, environ: w.env, args: args})
	return result{code, out.String(), errOut.String()}
}

// must is do for what has to succeed.
func (w *world) must(args ...string) string {
	w.t.Helper()
	r := w.do(args...)
	if r.code != 0 {
		w.t.Fatalf("%q: code %d, %s", args, r.code, r.err)
	}
	return r.out
}
