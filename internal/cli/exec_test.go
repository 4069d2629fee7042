package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

func TestExecStreams(t *testing.T) {
	w := newWorld(t)
	binary := bytes.Repeat([]byte{0, 255, '\n', 0xc3}, 100_000)
	w.guest.run = func(p *fakeProcess) (*process.ProcessEvent_EndEvent, error) {
		cfg := p.req.GetProcess()
		want := []string{"-l", "-c", `exec -- "$@"`, "bash", "cmd", "a b", "$HOME", "--flag"}
		if d := cmp.Diff(want, cfg.GetArgs()); d != "" || cfg.GetCwd() != "/tmp" || cfg.GetEnvs()["A"] != "b=c" || p.req.GetStdin() {
			t.Errorf("%v, %s", p.req, d)
		}
		p.stdout(binary)
		p.stderr([]byte("warning"))
		p.stdout([]byte("end"))
		return exited(42)
	}
	w.in = neverReader{t}
	r := w.do("sandbox", "exec", "-w", "/tmp", "-e", "A=b=c", w.id, "--", "cmd", "a b", "$HOME", "--flag")
	if r.code != 42 || r.out != string(binary)+"end" || r.err != "warning" {
		t.Errorf("code %d, %d bytes, %q", r.code, len(r.out), r.err)
	}
}

// neverReader fails the test that reads it.
type neverReader struct{ t *testing.T }

func (r neverReader) Read([]byte) (int, error) {
	r.t.Error("standard input was read without -i")
	return 0, io.EOF
}

func TestExecInput(t *testing.T) {
	w := newWorld(t)
	w.guest.run = func(p *fakeProcess) (*process.ProcessEvent_EndEvent, error) {
		all, err := io.ReadAll(p.stdin)
		if err != nil || !p.req.GetStdin() {
			t.Errorf("%v, %v", err, p.req.GetStdin())
		}
		p.stdout(all)
		return exited(0)
	}
	for _, text := range []string{"", "x", strings.Repeat("binary\x00\xff", 50_000)} {
		w.in = strings.NewReader(text)
		if out := w.must("sandbox", "exec", "-i", w.id, "cat"); out != text {
			t.Errorf("got %d bytes, want %d", len(out), len(text))
		}
	}
}

func TestExecEnds(t *testing.T) {
	signal := func(status string) (*process.ProcessEvent_EndEvent, error) {
		return &process.ProcessEvent_EndEvent{ExitCode: -1, Status: status}, nil
	}
	for _, tc := range []struct {
		name string
		run  func(*fakeProcess) (*process.ProcessEvent_EndEvent, error)
		code int
		says string
	}{
		{"success", func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) { return exited(0) }, 0, ""},
		{"failure", func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) { return exited(255) }, 255, ""},
		{"killed", func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) { return signal("signal: killed") }, 137, ""},
		{"crashed", func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) {
			return signal("signal: segmentation fault (core dumped)")
		}, 139, ""},
		{"odd", func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) { return signal("\x1bodd") }, 1, "the command was ended: \ufffdodd"},
		{"refused", func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) {
			return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("cwd '/x' does not exist"))
		}, 1, "cloister: cwd '/x' does not exist"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			w.guest.run = tc.run
			if r := w.do("sandbox", "exec", w.id, "x"); r.code != tc.code || !strings.Contains(r.err, tc.says) {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestExecSandboxEnds(t *testing.T) {
	w := newWorld(t)
	w.guest.run = func(*fakeProcess) (*process.ProcessEvent_EndEvent, error) {
		if r := w.do("sandbox", "kill", w.id); r.code != 0 {
			t.Error(r.err)
		}
		return nil, errCut
	}
	if r := w.do("sandbox", "exec", w.id, "x"); r.code != 1 || !strings.Contains(r.err, "sandbox "+w.id+" has ended; the command ended with it") {
		t.Errorf("%+v", r)
	}
}

func TestExecInterrupted(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	w.guest.run = func(p *fakeProcess) (*process.ProcessEvent_EndEvent, error) {
		cancel()
		if s := <-p.signal; s != process.Signal_SIGNAL_SIGTERM {
			t.Errorf("got %s", s)
		}
		p.stdout([]byte("cleaned up"))
		return exited(9)
	}
	if r := w.doContext(ctx, "sandbox", "exec", w.id, "x"); r.code != 9 || r.out != "cleaned up" {
		t.Errorf("%+v", r)
	}
}

// brokenPipe is an output that nobody reads.
type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func TestExecBrokenPipe(t *testing.T) {
	w := newWorld(t)
	w.guest.run = func(p *fakeProcess) (*process.ProcessEvent_EndEvent, error) {
		p.stdout([]byte("y\n"))
		if s := <-p.signal; s != process.Signal_SIGNAL_SIGKILL {
			t.Errorf("got %s", s)
		}
		return exited(0)
	}
	if code := run(t.Context(), &app{in: w.in, out: brokenPipe{}, err: io.Discard, environ: w.env, args: []string{"sandbox", "exec", w.id, "yes"}}); code != 141 {
		t.Errorf("code %d", code)
	}
}

func TestCommandLine(t *testing.T) {
	for _, tc := range []struct{ args, want []string }{
		{[]string{"ls | head"}, []string{"-l", "-c", "ls | head"}},
		{[]string{"--", "ls | head"}, []string{"-l", "-c", "ls | head"}},
		{[]string{"ls", "-l"}, []string{"-l", "-c", `exec -- "$@"`, "bash", "ls", "-l"}},
		{[]string{"--", "ls", "--", "-l"}, []string{"-l", "-c", `exec -- "$@"`, "bash", "ls", "--", "-l"}},
	} {
		if d := cmp.Diff(tc.want, commandLine(tc.args)); d != "" {
			t.Errorf("%q: %s", tc.args, d)
		}
	}
}
