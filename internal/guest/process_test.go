package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
)

// result is what a whole process produced.
type result struct {
	pid                 uint32
	stdout, stderr, pty bytes.Buffer
	end                 *process.ProcessEvent_EndEvent
	keepalives          int
}

func (r *result) add(e *process.ProcessEvent) {
	switch {
	case e.GetStart() != nil:
		r.pid = e.GetStart().GetPid()
	case e.GetEnd() != nil:
		r.end = e.GetEnd()
	case e.GetKeepalive() != nil:
		r.keepalives++
	}
	r.stdout.Write(e.GetData().GetStdout())
	r.stderr.Write(e.GetData().GetStderr())
	r.pty.Write(e.GetData().GetPty())
}

func bash(script string) *process.StartRequest {
	no := false
	return &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}, Stdin: &no}
}

func byPID(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Tag{Tag: tag}}
}

// started is a process whose start event was received.
type started struct {
	t      *testing.T
	stream *connect.ServerStreamForClient[process.StartResponse]
	result
	cancel context.CancelFunc
}

func (a *agent) start(ctx context.Context, t *testing.T, req *process.StartRequest) *started {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	stream, err := a.proc.Start(ctx, req)
	must(t, err)
	s := &started{t: t, stream: stream, cancel: cancel}
	t.Cleanup(func() { _ = stream.Close() })
	t.Cleanup(cancel)
	s.next()
	if s.pid == 0 {
		t.Fatalf("the first event is not the start: %v", stream.Msg())
	}
	return s
}

func (s *started) next() {
	s.t.Helper()
	if !s.stream.Receive() {
		s.t.Fatalf("the stream ended: %v; terminal: %q", s.stream.Err(), s.pty.String())
	}
	s.add(s.stream.Msg().GetEvent())
}

// until receives until done.
func (s *started) until(done func() bool) {
	s.t.Helper()
	for !done() {
		s.next()
	}
}

// wait receives up to the end.
func (s *started) wait() *result {
	s.t.Helper()
	for s.stream.Receive() {
		s.add(s.stream.Msg().GetEvent())
	}
	if err := s.stream.Err(); err != nil || s.end == nil {
		s.t.Fatalf("no end event: %v", err)
	}
	return &s.result
}

func (a *agent) run(t *testing.T, script string) (int, string, string) {
	t.Helper()
	r := a.start(t.Context(), t, bash(script)).wait()
	return int(r.end.GetExitCode()), r.stdout.String(), r.stderr.String()
}

func connectTo(t *testing.T, c processconnect.ProcessClient, sel *process.ProcessSelector) (*result, error) {
	t.Helper()
	stream, err := c.Connect(t.Context(), &process.ConnectRequest{Process: sel})
	must(t, err)
	defer stream.Close() //nolint:errcheck // It was only read.
	r := &result{}
	for stream.Receive() {
		r.add(stream.Msg().GetEvent())
	}
	return r, stream.Err()
}

func TestRun(t *testing.T) {
	a := newAgent(t)
	a.initialize(t, `{"envVars":{"GLOBAL":"g","BOTH":"g"}}`)
	req := bash(`echo out; echo err >&2; pwd; echo "$HOME $USER/$LOGNAME $GLOBAL/$BOTH/$OWN/$FROM_IMAGE"; exit 7`)
	req.Process.Envs = map[string]string{"OWN": "o", "BOTH": "o"}
	for name, client := range map[string]*http.Client{"HTTP/1.1": a.http, "HTTP/2": h2c(t)} {
		for codec, options := range map[string][]connect.ClientOption{"binary": nil, "JSON": {connect.WithProtoJSON()}, "gRPC": {connect.WithGRPC()}} {
			if codec == "gRPC" && name == "HTTP/1.1" {
				continue
			}
			t.Run(name+" "+codec, func(t *testing.T) {
				c, _ := a.clients(client, options...)
				b := *a
				b.proc = c
				r := b.start(t.Context(), t, req).wait()
				want := "out\n" + a.home + "\n" + a.home + " user/user g/o/o/1\n"
				if diff := cmp.Diff(want, r.stdout.String()); diff != "" || r.stderr.String() != "err\n" {
					t.Errorf("stdout (-want +got):\n%s\nstderr %q", diff, r.stderr.String())
				}
				if r.end.GetExitCode() != 7 || !r.end.GetExited() || r.end.GetStatus() != "exit status 7" || r.end.GetError() != "exit status 7" {
					t.Errorf("end: %v", r.end)
				}
			})
		}
	}
}

func TestEnds(t *testing.T) {
	a := newAgent(t)
	for script, want := range map[string]*process.ProcessEvent_EndEvent{
		"true":       {ExitCode: 0, Exited: true, Status: "exit status 0"},
		"kill -9 $$": {ExitCode: -1, Status: "signal: killed"},
		"exit 255":   {ExitCode: 255, Exited: true, Status: "exit status 255"},
	} {
		got := a.start(t.Context(), t, bash(script)).wait().end
		wantError := ""
		if want.GetExitCode() != 0 {
			wantError = want.GetStatus()
		}
		if got.GetExitCode() != want.GetExitCode() || got.GetExited() != want.GetExited() || got.GetStatus() != want.GetStatus() ||
			got.GetError() != wantError || (got.Error == nil) != (wantError == "") {
			t.Errorf("%s: got %v, want %v", script, got, want)
		}
	}
}

func TestStartErrors(t *testing.T) {
	a := newAgent(t)
	dir := func(path string) *process.StartRequest {
		req := bash("true")
		req.Process.Cwd = &path
		return req
	}
	must(t, os.WriteFile(filepath.Join(a.home, "file"), nil, 0o644))
	for name, test := range map[string]struct {
		user string
		req  *process.StartRequest
		code connect.Code
		text string
	}{
		"missing cwd":     {"", dir("/nope"), connect.CodeInvalidArgument, "cwd '/nope' does not exist"},
		"cwd is a file":   {"", dir("file"), connect.CodeInvalidArgument, "is not a directory"},
		"cwd of another":  {"", dir("~root"), connect.CodeInvalidArgument, "~root"},
		"unknown user":    {"x", bash("true"), connect.CodeUnauthenticated, "invalid username: 'x'"},
		"unknown command": {"", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "no-such-command"}}, connect.CodeInvalidArgument, "error starting process 'no-such-command'"},
		"missing file":    {"", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/no/such"}}, connect.CodeInvalidArgument, "no such file"},
		"no command":      {"", &process.StartRequest{}, connect.CodeInvalidArgument, "no command"},
	} {
		stream, err := a.proc.Start(as(t, test.user), test.req)
		must(t, err)
		if stream.Receive() {
			t.Errorf("%s: started", name)
		}
		t.Run(name, func(t *testing.T) { wantCode(t, stream.Err(), test.code, test.text) })
		_ = stream.Close()
	}
	if n := len(a.procs.list()); n != 0 {
		t.Errorf("%d processes are left", n)
	}
}

func TestUnknownProcess(t *testing.T) {
	a := newAgent(t)
	ctx, sel := t.Context(), byPID(4_000_000)
	_, err := connectTo(t, a.proc, sel)
	wantCode(t, err, connect.CodeNotFound, "4000000")
	_, err = a.proc.Update(ctx, &process.UpdateRequest{Process: sel})
	wantCode(t, err, connect.CodeNotFound, "4000000")
	_, err = a.proc.SendInput(ctx, &process.SendInputRequest{Process: sel})
	wantCode(t, err, connect.CodeNotFound, "4000000")
	_, err = a.proc.SendSignal(ctx, &process.SendSignalRequest{Process: sel, Signal: process.Signal_SIGNAL_SIGKILL})
	wantCode(t, err, connect.CodeNotFound, "4000000")
	_, err = a.proc.CloseStdin(ctx, &process.CloseStdinRequest{Process: byTag("t")})
	wantCode(t, err, connect.CodeNotFound, "'t'")
}

func TestOtherUser(t *testing.T) {
	needRoot(t)
	a := newAgent(t)
	r := a.start(as(t, "nobody"), t, bash("id -u; id -g; id -G; pwd; echo $HOME")).wait()
	if got, want := r.stdout.String(), "65534\n65534\n65534 4711\n/\n/nonexistent\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestInput(t *testing.T) {
	a := newAgent(t)
	req := &process.StartRequest{Process: &process.ProcessConfig{Cmd: "cat"}} // found in PATH, stdin unset
	s := a.start(t.Context(), t, req)
	send := func(in *process.ProcessInput) error {
		_, err := a.proc.SendInput(t.Context(), &process.SendInputRequest{Process: byPID(s.pid), Input: in})
		return err
	}
	must(t, send(&process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte("one ")}}))
	must(t, send(&process.ProcessInput{Input: &process.ProcessInput_Stdin{}}))
	wantCode(t, send(&process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte("x")}}), connect.CodeFailedPrecondition, "no terminal")
	wantCode(t, send(&process.ProcessInput{}), connect.CodeInvalidArgument, "no input")

	proc, _ := a.clients(h2c(t))
	stream, err := proc.StreamInput(t.Context())
	must(t, err)
	must(t, stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: byPID(s.pid)}}}))
	must(t, stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Keepalive{}}))
	for _, word := range []string{"two ", "three"} {
		must(t, stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{
			Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte(word)}},
		}}}))
	}
	_, err = stream.CloseAndReceive()
	must(t, err)
	for range 2 { // closing twice is no error
		_, err = a.proc.CloseStdin(t.Context(), &process.CloseStdinRequest{Process: byPID(s.pid)})
		if err != nil && connect.CodeOf(err) != connect.CodeNotFound {
			t.Error(err)
		}
	}
	if got := s.wait().stdout.String(); got != "one two three" {
		t.Errorf("got %q", got)
	}
}

func TestInputRefused(t *testing.T) {
	a := newAgent(t)
	s := a.start(t.Context(), t, bash("sleep 30"))
	stdin := &process.SendInputRequest{Process: byPID(s.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte("x")}}}
	_, err := a.proc.SendInput(t.Context(), stdin)
	wantCode(t, err, connect.CodeFailedPrecondition, "standard input")
	_, err = a.proc.CloseStdin(t.Context(), &process.CloseStdinRequest{Process: byPID(s.pid)})
	wantCode(t, err, connect.CodeFailedPrecondition, "standard input")
	_, err = a.proc.Update(t.Context(), &process.UpdateRequest{Process: byPID(s.pid), Pty: &process.PTY{}})
	wantCode(t, err, connect.CodeFailedPrecondition, "no terminal")
	_, err = a.proc.SendSignal(t.Context(), &process.SendSignalRequest{Process: byPID(s.pid)})
	wantCode(t, err, connect.CodeInvalidArgument, "SIGTERM and SIGKILL")
	stream, err := a.proc.StreamInput(t.Context())
	must(t, err)
	_ = stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{}})
	_, err = stream.CloseAndReceive()
	wantCode(t, err, connect.CodeInvalidArgument, "before")
	_, err = a.proc.SendSignal(t.Context(), &process.SendSignalRequest{Process: byPID(s.pid), Signal: process.Signal_SIGNAL_SIGTERM})
	must(t, err)
	if got := s.wait().end.GetStatus(); got != "signal: terminated" {
		t.Errorf("status %q", got)
	}
}

// A pipe that nobody reads must not hold up the next writer for ever.
func TestInputGivesUp(t *testing.T) {
	a := newAgent(t)
	s := a.start(t.Context(), t, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "sleep", Args: []string{"30"}}})
	big := &process.SendInputRequest{Process: byPID(s.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: make([]byte, 1<<20)}}}
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := a.proc.SendInput(ctx, big)
		cancel()
		wantCode(t, err, connect.CodeDeadlineExceeded, "")
	}
	_, err := a.proc.SendSignal(t.Context(), &process.SendSignalRequest{Process: byPID(s.pid), Signal: process.Signal_SIGNAL_SIGKILL})
	must(t, err)
}

func TestKillReachesChildren(t *testing.T) {
	a := newAgent(t)
	s := a.start(t.Context(), t, bash("sleep 1000 & echo $!; wait"))
	s.until(func() bool { return strings.Contains(s.stdout.String(), "\n") })
	var child int
	if _, err := fmt.Sscan(s.stdout.String(), &child); err != nil {
		t.Fatal(err)
	}
	_, err := a.proc.SendSignal(t.Context(), &process.SendSignalRequest{Process: byPID(s.pid), Signal: process.Signal_SIGNAL_SIGKILL})
	must(t, err)
	if err := syscall.Kill(int(s.pid), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process is still there after the kill was answered: %v", err)
	}
	if got := s.wait().end; got.GetExitCode() != -1 || got.GetStatus() != "signal: killed" || got.GetExited() {
		t.Errorf("end: %v", got)
	}
	if alive(child) {
		t.Errorf("child %d survived", child)
	}
	list, err := a.proc.List(t.Context(), &process.ListRequest{})
	must(t, err)
	if len(list.GetProcesses()) != 0 {
		t.Errorf("still listed: %v", list)
	}
	_, err = a.proc.SendSignal(t.Context(), &process.SendSignalRequest{Process: byPID(s.pid), Signal: process.Signal_SIGNAL_SIGKILL})
	wantCode(t, err, connect.CodeNotFound, "")
}

// alive says that a process runs; zombies and strangers do not count.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z")
}

// A daemon that keeps the outputs open must not keep a killed process from ending.
func TestKillWithDaemon(t *testing.T) {
	a := newAgent(t)
	s := a.start(t.Context(), t, bash("setsid sleep 1000 & echo $!; wait"))
	s.until(func() bool { return strings.Contains(s.stdout.String(), "\n") })
	var daemon int
	if _, err := fmt.Sscan(s.stdout.String(), &daemon); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(daemon, syscall.SIGKILL) }()
	_, err := a.proc.SendSignal(t.Context(), &process.SendSignalRequest{Process: byPID(s.pid), Signal: process.Signal_SIGNAL_SIGKILL})
	must(t, err)
	if got := s.wait().end.GetStatus(); got != "signal: killed" {
		t.Errorf("status %q", got)
	}
}

// Output of children that outlive the process still belongs to it.
func TestOutputAfterExit(t *testing.T) {
	a := newAgent(t)
	if code, out, _ := a.run(t, "(sleep 0.2; echo late) & echo early; exit 3"); code != 3 || out != "early\nlate\n" {
		t.Errorf("code %d, output %q", code, out)
	}
}

func TestTimeoutKills(t *testing.T) {
	a := newAgent(t)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	s := a.start(ctx, t, bash("sleep 1000"))
	for s.stream.Receive() {
	}
	wantCode(t, s.stream.Err(), connect.CodeDeadlineExceeded, "")
	r, err := connectTo(t, a.proc, byPID(s.pid)) // waits for the end, or is told of it
	if err != nil || r.end.GetStatus() != "signal: killed" {
		t.Errorf("end %v, %v", r.end, err)
	}
}

func TestDisconnectDoesNotKill(t *testing.T) {
	a := newAgent(t)
	req := bash("read -r line < gate; echo got $line; exit 4")
	tag := "worker"
	req.Tag = &tag
	gate := filepath.Join(a.home, "gate")
	must(t, syscall.Mkfifo(gate, 0o600))
	s := a.start(t.Context(), t, req)
	s.cancel()
	for s.stream.Receive() {
	}
	list, err := a.proc.List(t.Context(), &process.ListRequest{})
	must(t, err)
	if len(list.GetProcesses()) != 1 || list.GetProcesses()[0].GetPid() != s.pid || list.GetProcesses()[0].GetTag() != tag || list.GetProcesses()[0].GetConfig().GetCmd() != "/bin/bash" {
		t.Fatalf("list: %v", list)
	}
	var clients sync.WaitGroup
	results := make([]*result, 3)
	for i := range results {
		stream, err := a.proc.Connect(t.Context(), &process.ConnectRequest{Process: []*process.ProcessSelector{byTag(tag), byPID(s.pid), byTag(tag)}[i]})
		must(t, err)
		defer stream.Close() //nolint:errcheck // It was only read.
		results[i] = &result{}
		if !stream.Receive() {
			t.Fatal(stream.Err())
		}
		results[i].add(stream.Msg().GetEvent())
		clients.Go(func() {
			for stream.Receive() {
				results[i].add(stream.Msg().GetEvent())
			}
		})
	}
	must(t, os.WriteFile(gate, []byte("it\n"), 0o600))
	clients.Wait()
	for i, r := range results {
		if r.pid != s.pid || r.stdout.String() != "got it\n" || r.end.GetExitCode() != 4 {
			t.Errorf("subscriber %d: pid %d, %q, %v", i, r.pid, r.stdout.String(), r.end)
		}
	}
	for _, sel := range []*process.ProcessSelector{byPID(s.pid), byTag(tag)} { // the exit is retained
		r, err := connectTo(t, a.proc, sel)
		if err != nil || r.pid != s.pid || r.end.GetExitCode() != 4 {
			t.Errorf("late: %v, %v", r, err)
		}
	}
}

func TestRetentionEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		procs := newProcesses(newReaper(false), New(Config{}).log)
		for pid := range maxRetained + 10 {
			p := &proc{pid: pid + 1, config: &process.ProcessConfig{}}
			procs.live[p] = struct{}{}
			procs.finished(p)
		}
		if len(procs.ended) != maxRetained || procs.find(byPID(1), true) != nil || procs.find(byPID(maxRetained+10), true) == nil {
			t.Errorf("%d exits are retained", len(procs.ended))
		}
		if procs.find(byPID(maxRetained+10), false) != nil {
			t.Error("an ended process counts as running")
		}
		time.Sleep(retention + time.Second) //nolint:forbidigo // The clock of a synctest bubble.
		if procs.find(byPID(maxRetained+10), true) != nil {
			t.Error("an exit is retained for too long")
		}
	})
}

// A subscriber that does not read holds the process back, and its memory stays bounded; when it leaves, all goes on.
func TestSlowSubscriber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h hub
		ctx, leave := context.WithCancel(t.Context())
		slow, fast := h.subscribe(ctx), h.subscribe(t.Context())
		published := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 100 {
				h.publish(kindStdout.event([]byte("x")))
				published++
			}
			h.close(&process.ProcessEvent{})
		}()
		received := make(chan int, 1)
		go func() {
			n := 0
			for range fast.events {
				n++
			}
			received <- n
		}()
		synctest.Wait()
		if published != subscriberQueue || len(slow.events) != subscriberQueue {
			t.Errorf("%d events were published to a subscriber that never reads, %d wait", published, len(slow.events))
		}
		leave()
		h.unsubscribe(slow)
		<-done
		if n := <-received; n != 101 {
			t.Errorf("the other subscriber received %d events, want 101", n)
		}
		if h.subscribe(t.Context()) != nil {
			t.Error("an ended process was subscribed to")
		}
	})
}

func TestBigOutputThroughSlowReader(t *testing.T) {
	a := newAgent(t)
	const size = 8 << 20
	s := a.start(t.Context(), t, bash(fmt.Sprintf("head -c %d /dev/zero; head -c 1000 /dev/zero >&2", size)))
	if r := s.wait(); r.stdout.Len() != size || r.stderr.Len() != 1000 {
		t.Errorf("received %d and %d bytes", r.stdout.Len(), r.stderr.Len())
	}
}

func TestKeepalive(t *testing.T) {
	a := newAgent(t)
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set(keepaliveHeader, "1")
	s := a.start(ctx, t, bash("sleep 30"))
	s.until(func() bool { return s.keepalives > 1 })
	for header, want := range map[string]time.Duration{
		"": defaultKeepalive, "x": defaultKeepalive, "-1": defaultKeepalive, "0": defaultKeepalive, "50": 50 * time.Second, "999999999999": maxKeepalive,
	} {
		if got := keepalive(header); got != want {
			t.Errorf("keepalive %q: %s, want %s", header, got, want)
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	a := newAgent(t)
	var all sync.WaitGroup
	for i := range 60 {
		all.Go(func() {
			stream, err := a.proc.Start(t.Context(), bash(fmt.Sprintf("echo %d; exit %d", i, i)))
			if err != nil {
				t.Error(err)
				return
			}
			defer stream.Close() //nolint:errcheck // It was only read.
			r := &result{}
			for stream.Receive() {
				r.add(stream.Msg().GetEvent())
			}
			if r.end.GetExitCode() != int32(i) || r.stdout.String() != fmt.Sprintln(i) {
				t.Errorf("process %d: %q, %v, %v", i, r.stdout.String(), r.end, stream.Err())
			}
		})
	}
	all.Wait()
}
