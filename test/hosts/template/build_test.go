// Package template_test builds templates on a node with its real engine, network and images, and starts sandboxes from them.
package template_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cloister-dev/cloister/internal/agent"
	"github.com/cloister-dev/cloister/internal/engine/gvisor"
	"github.com/cloister-dev/cloister/internal/engine/gvisor/sentry"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/guest/binary"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

const (
	mib      = 1 << 20
	patience = 5 * time.Minute
)

func TestMain(m *testing.M) {
	gvisor.Maybe()
	code := make(chan int)
	go func() { code <- m.Run() }() // the engine needs the main thread to stay in its network namespace
	os.Exit(<-code)                 //nolint:forbidigo // this is the tests' main
}

// server takes what the node says.
type server struct{}

func (server) Register(context.Context, *nodev1.RegisterRequest) (*nodev1.RegisterResponse, error) {
	return &nodev1.RegisterResponse{Epoch: 1, TokenSecret: bytes.Repeat([]byte("s"), 32)}, nil
}

func (server) Report(_ context.Context, r *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	var last int64
	for _, c := range r.GetChanges() {
		last = max(last, c.GetSequence())
	}
	return &nodev1.ReportResponse{AcknowledgedSequence: last}, nil
}

// node is a node of the tests.
type node struct {
	*agent.Agent
	t   *testing.T
	dir string
}

func size() sandbox.Resources {
	return sandbox.Resources{MilliCPU: 1000, MemoryBytes: 512 * mib, DiskBytes: 2048 * mib}
}

func start(t *testing.T) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // a setting of test runs alone
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	dir := t.TempDir()
	must(t, os.Chmod(filepath.Dir(dir), 0o755)) // the sentry's user passes through it
	must(t, os.Chmod(dir, 0o755))
	must(t, os.Mkdir(filepath.Join(dir, "scratch"), 0o700))
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	jr, err := journal.Open(t.Context(), filepath.Join(dir, "journal.db"), journal.Options{Capacity: sandbox.Resources{
		MilliCPU: 8000, MemoryBytes: 4096 * mib, DiskBytes: 20480 * mib,
	}})
	must(t, err)
	exe, err := sentry.Install(filepath.Join(dir, "bin"))
	must(t, err)
	eng, err := gvisor.New(gvisor.Config{
		ExePath: exe, Root: filepath.Join(dir, "gvisor"), CgroupParent: "cloister-" + string(jr.NodeID()), MemoryBudgetBytes: 4096 * mib, Logger: log,
	})
	must(t, err)
	resolvers := []netip.Addr{netip.MustParseAddr("9.9.9.9")}
	nets, err := guestnet.New(guestnet.Config{
		Range: netip.MustParsePrefix("10.151.0.0/20"), Name: string(jr.NodeID()), Resolvers: resolvers, MaxConnections: 1024, Logger: log,
	})
	must(t, err)
	cache, err := os.UserCacheDir()
	must(t, err)
	images, err := image.New(image.Config{
		Dir: filepath.Join(dir, "images"), CacheDir: filepath.Join(cache, "cloister"), Guest: binary.Bytes, Logger: log,
	})
	must(t, err)
	saves, err := snapshot.New(filepath.Join(dir, "snapshots"), log)
	must(t, err)
	a, err := agent.New(agent.Config{
		Name: "builder", ScratchDir: filepath.Join(dir, "scratch"), FilesDir: filepath.Join(dir, "files"), WarmMax: -1, Resolvers: resolvers,
	}, agent.Deps{
		Journal: jr, Engine: eng, Network: nets, Images: images, Snapshots: saves, Server: server{}, Registerer: prometheus.NewRegistry(), Logger: log,
	})
	must(t, err)
	must(t, a.Recover(t.Context()))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	t.Cleanup(func() {
		stop, done := context.WithTimeout(context.Background(), time.Minute)
		defer done()
		cancel()
		err := errors.Join(<-ended, a.StopAll(stop, "the test is over"), nets.Purge(stop), eng.Purge(stop))
		nets.Close()
		if err = errors.Join(err, jr.Close()); err != nil {
			t.Error(err)
		}
	})
	return &node{Agent: a, t: t, dir: dir}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wire(r sandbox.Resources) *agentv1.Resources {
	return &agentv1.Resources{MilliCpu: r.MilliCPU, MemoryBytes: r.MemoryBytes, DiskBytes: r.DiskBytes}
}

// build carries a build out and returns its end with the whole log.
func (n *node) build(req *agentv1.BuildRequest) (*agentv1.GetBuildResponse, time.Duration) {
	n.t.Helper()
	began := time.Now()
	resp, err := n.Build(n.t.Context(), req)
	must(n.t, err)
	deadline := time.Now().Add(patience)
	for from := int32(0); time.Now().Before(deadline); {
		b, err := n.GetBuild(n.t.Context(), &agentv1.GetBuildRequest{BuildId: resp.GetBuildId(), Offset: from, Wait: durationpb.New(time.Minute)})
		must(n.t, err)
		for _, e := range b.GetEntries() {
			n.t.Logf("%s %s %s %s", e.GetTime().AsTime().Format("05.000"), e.GetFields()["step"], e.GetLevel(), e.GetMessage())
		}
		from = b.GetEntriesTotal()
		if b.GetState() == agentv1.BuildState_BUILD_STATE_BUILDING {
			continue
		}
		took := time.Since(began)
		b, err = n.GetBuild(n.t.Context(), &agentv1.GetBuildRequest{BuildId: resp.GetBuildId()})
		must(n.t, err)
		return b, took
	}
	n.t.Fatalf("build %s takes too long", resp.GetBuildId())
	return nil, 0
}

func (n *node) ready(req *agentv1.BuildRequest) (*agentv1.GetBuildResponse, time.Duration) {
	n.t.Helper()
	b, took := n.build(req)
	if b.GetState() != agentv1.BuildState_BUILD_STATE_READY {
		n.t.Fatalf("step %s: %s", b.GetFailedStep(), b.GetError())
	}
	return b, took
}

func archive(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for name, text := range files {
		must(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text)), Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0)}))
		_, err := w.Write([]byte(text))
		must(t, err)
	}
	must(t, errors.Join(w.Close(), z.Close()))
	return b.Bytes()
}

// get asks a server in a sandbox.
func (n *node) get(id string, port uint16) string {
	n.t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return n.DialGuest(ctx, sandbox.ID(id), port)
	}}}
	req, err := http.NewRequestWithContext(n.t.Context(), http.MethodGet, "http://sandbox/", http.NoBody)
	must(n.t, err)
	resp, err := client.Do(req)
	must(n.t, err)
	text, err := io.ReadAll(resp.Body)
	must(n.t, errors.Join(err, resp.Body.Close()))
	return string(text)
}

func steps() []*agentv1.BuildStep {
	return []*agentv1.BuildStep{
		{Type: "USER", Args: []string{"root"}},
		{Type: "WORKDIR", Args: []string{"/"}},
		{Type: "RUN", Args: []string{"echo made by $(id -un) in $PWD > /made; ls -la /made; echo warned >&2; mkdir /opt/tool; printf '#!/bin/sh\\necho a tool' > /opt/tool/tool; chmod +x /opt/tool/tool"}},
		{Type: "USER", Args: []string{"app"}},
		{Type: "ENV", Args: []string{"GREETING", "hello", "PATH", "/opt/tool:$PATH"}},
		{Type: "WORKDIR", Args: []string{"/srv/app"}},
		{Type: "COPY", Args: []string{"src", ".", "", ""}, FilesHash: "site"},
		{Type: "RUN", Args: []string{"echo \"$GREETING $(id -un) $PWD $(cat index.html) $(tool)\" > page; stat -c '%U %a %Y' index.html"}},
		{Type: "RUN", Args: []string{"rm /made && touch /root-was-here", "root"}},
	}
}

func TestBuild(t *testing.T) {
	n := start(t)
	if _, err := n.PutFile(t.Context(), &agentv1.PutFileRequest{Hash: "site", Data: archive(t, map[string]string{"src/index.html": "from the context"}), Complete: true}); err != nil {
		t.Fatal(err)
	}
	base, took := n.ready(&agentv1.BuildRequest{TemplateId: "base", BuildId: "base-1", Sources: []string{"debian:bookworm"}})
	t.Logf("base: %v", took)
	req := &agentv1.BuildRequest{
		TemplateId: "app", BuildId: "app-1", BaseImageDigest: base.GetImageDigest(), BaseGuest: base.GetGuest(), Resources: wire(size()), Steps: steps(),
		StartCommand: "exec python3 -c 'import http.server as h, os\n" +
			"class H(h.BaseHTTPRequestHandler):\n def do_GET(s):\n  s.send_response(200); s.end_headers(); s.wfile.write(open(\"page\").read().encode())\n" +
			"h.HTTPServer((\"\", 8000), H).serve_forever()'",
		ReadyCommand: "python3 -c 'import urllib.request as u; u.urlopen(\"http://127.0.0.1:8000/\")'",
	}
	b, took := n.ready(req)
	t.Logf("first: %v", took)
	req.BuildId = "app-2"
	cached, took := n.ready(req)
	t.Logf("all cached: %v", took)
	if cached.GetImageDigest() != b.GetImageDigest() || cached.GetCheckpoint().GetId() != "app-2" || took > 2*time.Second {
		t.Errorf("the same again is %v after %v", cached, took)
	}
	for i := range 2 {
		sb, err := n.Create(t.Context(), &agentv1.CreateRequest{
			TemplateId: "app", ImageDigest: b.GetImageDigest(), Resources: wire(size()), CheckpointId: "app-2", Guest: b.GetGuest(), AllowInternet: true, Secure: true,
		})
		must(t, err)
		if got, want := n.get(sb.GetSandbox().GetId(), 8000), "hello app /srv/app from the context a tool\n"; got != want {
			t.Errorf("sandbox %d answers %q", i, got)
		}
	}
	req.BuildId, req.StartCommand, req.ReadyCommand = "app-3", "", ""
	req.Steps = append(steps(), &agentv1.BuildStep{Type: "RUN", Args: []string{"test ! -e /made && test -e /root-was-here && cat page && exit 3"}})
	failed, took := n.build(req)
	t.Logf("one more step: %v", took)
	if failed.GetFailedStep() != "10" || !strings.HasSuffix(failed.GetError(), ": exit status 3") {
		t.Errorf("failed at %s: %s", failed.GetFailedStep(), failed.GetError())
	}
}

func TestCancel(t *testing.T) {
	n := start(t)
	base, _ := n.ready(&agentv1.BuildRequest{TemplateId: "base", BuildId: "base-1", Sources: []string{"debian:bookworm"}})
	_, err := n.Build(t.Context(), &agentv1.BuildRequest{
		TemplateId: "app", BuildId: "app-1", BaseImageDigest: base.GetImageDigest(), Resources: wire(size()),
		Steps: []*agentv1.BuildStep{{Type: "RUN", Args: []string{"echo begun; sleep 1000"}}},
	})
	must(t, err)
	for from := int32(0); ; {
		b, err := n.GetBuild(t.Context(), &agentv1.GetBuildRequest{BuildId: "app-1", Offset: from, Wait: durationpb.New(time.Minute)})
		must(t, err)
		from = b.GetEntriesTotal()
		if b.GetState() != agentv1.BuildState_BUILD_STATE_BUILDING {
			t.Fatal(b.GetError())
		}
		if len(b.GetEntries()) > 0 && b.GetEntries()[len(b.GetEntries())-1].GetMessage() == "begun" {
			break
		}
	}
	_, err = n.CancelBuild(t.Context(), &agentv1.CancelBuildRequest{BuildId: "app-1"})
	must(t, err)
	left, err := filepath.Glob(filepath.Join(n.dir, "files", "layers", "*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	b, err := n.GetBuild(t.Context(), &agentv1.GetBuildRequest{BuildId: "app-1"})
	if err != nil || b.GetError() != "cancelled" {
		t.Errorf("%v, %v", b, err)
	}
}
