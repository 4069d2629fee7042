package guest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

func TestTerminal(t *testing.T) {
	a := newAgent(t)
	s := a.start(t.Context(), t, &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"--norc", "-i"}, Envs: map[string]string{"PS1": "$ ", "TERM": "xterm"}},
		Pty:     &process.PTY{Size: &process.PTY_Size{Cols: 80, Rows: 24}},
	})
	send := func(text string) {
		t.Helper()
		_, err := a.proc.SendInput(t.Context(), &process.SendInputRequest{Process: byPID(s.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte(text)}}})
		must(t, err)
	}
	shows := func(text string) { s.until(func() bool { return strings.Contains(s.pty.String(), text) }) }
	send("stty size; tty\n")
	shows("24 80\r\n/dev/pts/")
	_, err := a.proc.Update(t.Context(), &process.UpdateRequest{Process: byPID(s.pid), Pty: &process.PTY{Size: &process.PTY_Size{Cols: 132, Rows: 70000}}})
	must(t, err)
	send("stty size\n")
	shows("65535 132")
	_, err = a.proc.SendInput(t.Context(), &process.SendInputRequest{Process: byPID(s.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte("x")}}})
	wantCode(t, err, connect.CodeFailedPrecondition, "pty input")
	_, err = a.proc.CloseStdin(t.Context(), &process.CloseStdinRequest{Process: byPID(s.pid)})
	wantCode(t, err, connect.CodeFailedPrecondition, "0x04")
	send("sleep 1000 & disown; exit 6\n") // the job keeps the terminal open
	if got := s.wait().end.GetExitCode(); got != 6 {
		t.Errorf("exit code %d", got)
	}
	killSession(int(s.pid))
}

func TestTerminalKillTakesJobs(t *testing.T) {
	a := newAgent(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s := a.start(ctx, t, &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"--norc", "-i"}}, Pty: &process.PTY{},
	})
	_, err := a.proc.SendInput(t.Context(), &process.SendInputRequest{Process: byPID(s.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte("nohup sleep 1000 >/dev/null 2>&1 & echo job=$!.\n")}}})
	must(t, err)
	var job int
	s.until(func() bool {
		for line := range strings.Lines(s.pty.String()) {
			if n, _ := fmt.Sscanf(line, "job=%d.", &job); n == 1 && strings.HasSuffix(line, "\n") {
				return true
			}
		}
		return false
	})
	_, err = a.proc.SendSignal(t.Context(), &process.SendSignalRequest{Process: byPID(s.pid), Signal: process.Signal_SIGNAL_SIGKILL})
	must(t, err)
	s.wait()
	if alive(job) {
		t.Errorf("job %d survived", job)
	}
}
