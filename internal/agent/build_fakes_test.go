package agent

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/cloister-dev/cloister/internal/engine/fake"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// fakeComposer composes images by name alone; layers and steps are in a store of the real kind.
type fakeComposer struct {
	store    *image.Store
	composed []string // base and layers of each
	pushed   []image.PushRequest
}

func (f *fakeImages) layers(tb testing.TB) *fakeImages {
	tb.Helper()
	var err error
	if f.store, err = image.New(image.Config{Dir: tb.TempDir()}); err != nil {
		tb.Fatal(err)
	}
	return f
}

func (f *fakeImages) Get(_ context.Context, digest string) (image.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	im, ok := f.have[digest]
	if !ok {
		return im, sandbox.NotFoundf("image %s is not in the cache", digest)
	}
	return im, nil
}

func (f *fakeImages) Compose(_ context.Context, base string, layers []string, _ func(image.Progress)) (image.Image, error) {
	name := base + " " + strings.Join(layers, " ")
	f.mu.Lock()
	f.composed = append(f.composed, name)
	f.mu.Unlock()
	return f.add(name), nil
}

func (f *fakeImages) NewRecorder() *image.Recorder        { return f.store.NewRecorder() }
func (f *fakeImages) StepLayer(key string) (string, bool) { return f.store.StepLayer(key) }
func (f *fakeImages) PutStep(key, layer string) error     { return f.store.PutStep(key, layer) }
func (f *fakeImages) Prune(ctx context.Context, inUse []string) error {
	return f.store.Prune(ctx, inUse)
}

func (f *fakeImages) Push(_ context.Context, r image.PushRequest, _ func(image.Progress)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pushed = append(f.pushed, r)
	return nil
}

// headersOf returns what the agent inside puts on its answer.
func headersOf(r *http.Request, status int) http.Header {
	if status >= http.StatusBadRequest {
		return http.Header{"Content-Type": {"application/json"}}
	}
	return http.Header{"Content-Type": r.Header["Content-Type"]}
}

// ran is a command that a build's sandbox was asked to run.
type ran struct {
	ID   sandbox.ID
	User string
	Cfg  *process.ProcessConfig
}

// result is what a command comes to.
type result struct {
	stdout, stderr string
	code           int32
	wait           <-chan struct{} // the command goes on until it is closed
}

// shop is the agents inside the sandboxes of builds: what they were asked, and what they do.
type shop struct {
	m     *machine
	do    func(c ran) result
	noSh  bool // there is no bash
	mu    sync.Mutex
	asked []string
}

// newShop sets a machine up for builds with steps.
func newShop(m *machine) *shop {
	m.images.layers(m.t)
	m.cfg.FilesDir = filepath.Join(m.dir, "files")
	s := &shop{m: m, do: func(ran) result { return result{} }}
	m.onGuest(s.answer)
	return s
}

func (s *shop) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, fmt.Sprintf(format, args...))
}

// took returns what was asked since the last time.
func (s *shop) took() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.asked
	s.asked = nil
	return out
}

// answer answers a request; the machine's mutex is held.
func (s *shop) answer(id sandbox.ID, r *http.Request) (int, string) {
	body, _ := io.ReadAll(r.Body)
	user, _, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(r.Header.Get("Authorization"), user+" ")); err == nil {
		user = strings.TrimSuffix(string(raw), ":")
	}
	switch r.URL.Path {
	case "/filesystem.Filesystem/Stat":
		if s.noSh {
			return http.StatusNotFound, `{"code":"not_found","message":"nothing"}`
		}
		return http.StatusOK, ""
	case "/filesystem.Filesystem/MakeDir":
		var req filesystem.MakeDirRequest
		if err := proto.Unmarshal(body, &req); err != nil {
			s.m.t.Error(err)
		}
		s.note("mkdir %s as %s", req.GetPath(), user)
		return http.StatusOK, ""
	case "/accounts":
		s.note("account %s", body)
		return http.StatusOK, `{}`
	case "/copy":
		s.note("copy %s: %d bytes", r.URL.Query().Encode(), len(body))
		return http.StatusNoContent, ""
	case "/process.Process/Start":
		var req process.StartRequest
		if err := proto.Unmarshal(body[5:], &req); err != nil {
			s.m.t.Error(err)
		}
		return http.StatusOK, s.start(ran{ID: id, User: user, Cfg: req.GetProcess()})
	}
	return 0, ""
}

func (s *shop) start(c ran) string {
	args := c.Cfg.GetArgs()
	s.note("%s %s: %s as %s", c.Cfg.GetCmd(), strings.Join(args[:len(args)-1], " "), args[len(args)-1], c.User)
	s.m.mu.Unlock()
	res := s.do(c)
	if res.wait != nil {
		<-res.wait
	}
	s.m.mu.Lock()
	var b bytes.Buffer
	frame := func(flags byte, data []byte) {
		b.WriteByte(flags)
		_ = binary.Write(&b, binary.BigEndian, uint32(len(data)))
		b.Write(data)
	}
	send := func(e *process.ProcessEvent) {
		data, err := proto.Marshal(&process.StartResponse{Event: e})
		if err != nil {
			s.m.t.Error(err)
		}
		frame(0, data)
	}
	send(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}})
	data := func(d *process.ProcessEvent_DataEvent) {
		send(&process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}})
	}
	if res.stdout != "" {
		data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stdout{Stdout: []byte(res.stdout)}})
	}
	if res.stderr != "" {
		data(&process.ProcessEvent_DataEvent{Output: &process.ProcessEvent_DataEvent_Stderr{Stderr: []byte(res.stderr)}})
	}
	send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: &process.ProcessEvent_EndEvent{
		ExitCode: res.code, Exited: true, Status: fmt.Sprintf("exit status %d", res.code),
	}}})
	frame(2, []byte("{}"))
	return b.String()
}

// writes is what a command does that changes files.
func (s *shop) writes(c ran, text string) {
	if err := s.m.host.SetContents(c.ID, fake.Contents{Files: text}); err != nil {
		s.m.t.Error(err)
	}
}

// messages returns a build's log.
func messages(b *agentv1.GetBuildResponse) []string {
	var out []string
	for _, e := range b.GetEntries() {
		out = append(out, fmt.Sprintf("%s %s: %s", e.GetFields()["step"], e.GetLevel(), e.GetMessage()))
	}
	return out
}

func has(list []string, want string) bool {
	return slices.ContainsFunc(list, func(s string) bool { return strings.Contains(s, want) })
}
