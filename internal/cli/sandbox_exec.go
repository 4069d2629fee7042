package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

// execFlags are shared by exec and shell.
type execFlags struct {
	user, cwd string
	env       []string
}

func (f *execFlags) add(c *cobra.Command) {
	c.Flags().StringVarP(&f.user, "user", "u", "", "`user` of the sandbox; default: the template's, as a rule \"user\"")
	c.Flags().StringVarP(&f.cwd, "workdir", "w", "", "`directory` to start in; default: the user's home")
	c.Flags().StringArrayVarP(&f.env, "env", "e", nil, "environment `KEY=VALUE`; may be given again")
}

func (f *execFlags) config(cmd string, args ...string) (*process.ProcessConfig, error) {
	env, err := parsePairs("environment variable", f.env)
	if err != nil {
		return nil, err
	}
	cfg := &process.ProcessConfig{Cmd: cmd, Args: args, Envs: env}
	if f.cwd != "" {
		cfg.Cwd = &f.cwd
	}
	return cfg, nil
}

func (a *app) sandboxExec() *cobra.Command {
	var flags execFlags
	var stdin bool
	c := &cobra.Command{
		Use: "exec ID -- COMMAND [ARG...]", Short: "Run a command in a sandbox and end with its exit code",
		ValidArgsFunction: a.complete(1, sandboxNames),
		Long: "Run a command in a sandbox. One argument is given to the sandbox's shell; several are one command and its arguments.\n" +
			"An interrupt ends the command with SIGTERM, and with SIGKILL 5 seconds later.",
		Example: "  cloister sandbox exec ID -- python3 -c 'print(6*7)'\n" +
			"  cloister sandbox exec ID 'ls -l | head'\n" +
			"  tar -c src | cloister sandbox exec -i ID -- tar -x",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) < 2 || args[0] == "" {
				return &usageError{fmt.Errorf("sandbox exec: want a sandbox id and a command; see `%s --help`", c.CommandPath())}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			g, err := a.guestOf(c.Context(), args[0], flags.user)
			if err != nil {
				return err
			}
			cfg, err := flags.config("/bin/bash", commandLine(args[1:])...)
			if err != nil {
				return err
			}
			req := &process.StartRequest{Process: cfg, Stdin: &stdin}
			s := session{guest: g, out: a.out, err: a.err}
			if stdin {
				s.in = a.in
			}
			return s.run(c.Context(), req)
		},
	}
	flags.add(c)
	c.Flags().BoolVarP(&stdin, "stdin", "i", false, "pass this command's standard input on")
	c.Flags().SetInterspersed(false)
	return c
}

// commandLine makes a login shell's arguments: of one word a script, of several a command run without another shell's quoting.
func commandLine(args []string) []string {
	if len(args) > 1 && args[0] == "--" { // flags end at the sandbox's id already
		args = args[1:]
	}
	if len(args) == 1 {
		return []string{"-l", "-c", args[0]}
	}
	return append([]string{"-l", "-c", `exec -- "$@"`, "bash"}, args...)
}

func (a *app) sandboxShell() *cobra.Command {
	var flags execFlags
	c := &cobra.Command{
		Use: "shell ID", Short: "Open a terminal in a sandbox", Args: exactly(1, "one sandbox id"), ValidArgsFunction: a.complete(1, sandboxNames),
		RunE: func(c *cobra.Command, args []string) error {
			file, ok := a.in.(*os.File)
			if !ok || !term.IsTerminal(int(file.Fd())) {
				return &usageError{errors.New("sandbox shell: standard input is no terminal; use `cloister sandbox exec`")}
			}
			g, err := a.guestOf(c.Context(), args[0], flags.user)
			if err != nil {
				return err
			}
			return a.shell(c.Context(), g, file, &flags)
		},
	}
	flags.add(c)
	return c
}

func (a *app) shell(ctx context.Context, g *guestConn, tty *os.File, flags *execFlags) error {
	flags.env = append(flags.env, "TERM="+termName(a.environ))
	cfg, err := flags.config("/bin/bash", "-i", "-l")
	if err != nil {
		return err
	}
	saved, err := term.MakeRaw(int(tty.Fd()))
	if err != nil {
		return fmt.Errorf("set the terminal to raw mode: %w", err)
	}
	defer func() { _ = term.Restore(int(tty.Fd()), saved) }()
	s := session{guest: g, in: tty, out: a.out, err: a.err, tty: tty}
	return s.run(ctx, &process.StartRequest{Process: cfg, Pty: &process.PTY{Size: windowSize(tty)}})
}

func termName(environ []string) string {
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, "TERM="); ok && v != "" {
			return v
		}
	}
	return "xterm-256color"
}

func windowSize(tty *os.File) *process.PTY_Size {
	w, h, err := term.GetSize(int(tty.Fd()))
	if err != nil || w < 1 || h < 1 {
		w, h = 80, 24
	}
	return &process.PTY_Size{Cols: uint32(w), Rows: uint32(h)}
}

// session is one process in a sandbox that this command is attached to.
type session struct {
	guest    *guestConn
	in       io.Reader // nil: the process gets no input
	out, err io.Writer
	tty      *os.File // not nil: the process has a terminal, and this is ours
}

// run starts the process, carries its input and output, and returns its exit as an exitError.
func (s *session) run(ctx context.Context, req *process.StartRequest) error {
	// A reader that went away is an error of the write then, and not the end of this command while the process goes on.
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, syscall.SIGPIPE)
	defer signal.Stop(broken)
	// The stream outlives an interrupt, so that the process is ended and not left behind.
	streamCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	stream, err := s.guest.process.Start(streamCtx, req)
	if err != nil {
		return startError(err)
	}
	defer func() { _ = stream.Close() }()
	var pid uint32
	for stream.Receive() {
		switch e := stream.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Start:
			pid = e.Start.GetPid()
			go s.killOnInterrupt(ctx, streamCtx, pid)
			go s.sendInput(streamCtx, pid)
			go s.resize(streamCtx, pid)
		case *process.ProcessEvent_Data:
			if err := s.write(e.Data); err != nil {
				return s.abandon(streamCtx, pid, err)
			}
		case *process.ProcessEvent_End:
			return endError(e.End)
		}
	}
	return s.cut(streamCtx, stream.Err())
}

// cut words the end of a stream that came before the end of the process.
func (s *session) cut(ctx context.Context, err error) error {
	if e, ok := errors.AsType[*connect.Error](err); ok && connect.IsWireError(e) {
		return startError(err)
	}
	if fate := s.guest.fate(ctx); fate != nil {
		return fmt.Errorf("%w; the command ended with it", fate)
	}
	if err != nil {
		return fmt.Errorf("the connection to sandbox %s broke: %w", s.guest.sandbox.ID, startError(err))
	}
	return fmt.Errorf("sandbox %s closed the connection before the command ended", s.guest.sandbox.ID)
}

// abandon ends a process whose output nobody takes any more.
func (s *session) abandon(ctx context.Context, pid uint32, err error) error {
	s.signal(ctx, pid, process.Signal_SIGNAL_SIGKILL)
	if errors.Is(err, syscall.EPIPE) {
		return &exitError{128 + int(syscall.SIGPIPE)} // as if this command had been the one that wrote
	}
	return err
}

// command runs a command of our own in the sandbox; its output matters only where it does not succeed.
func (g *guestConn) command(ctx context.Context, name string, args ...string) error {
	said := &capped{}
	noInput := false
	s := session{guest: g, out: said, err: said}
	err := s.run(ctx, &process.StartRequest{Process: &process.ProcessConfig{Cmd: name, Args: args}, Stdin: &noInput})
	if ended, ok := errors.AsType[*exitError](err); ok {
		return fmt.Errorf("%s ended with exit code %d in sandbox %s: %s", name, ended.code, g.sandbox.ID, printable(strings.TrimSpace(said.text.String())))
	}
	return err
}

// capped keeps the beginning of what is written to it.
type capped struct{ text strings.Builder }

func (c *capped) Write(p []byte) (int, error) {
	const most = 4 << 10
	c.text.Write(p[:min(len(p), max(most-c.text.Len(), 0))])
	return len(p), nil
}

func startError(err error) error {
	if ce, ok := errors.AsType[*connect.Error](err); ok {
		return errors.New(ce.Message())
	}
	return err
}

func endError(end *process.ProcessEvent_EndEvent) error {
	switch code := int(end.GetExitCode()); {
	case code > 0:
		return &exitError{code}
	case code < 0 || !end.GetExited():
		if n := signalNumber(end.GetStatus()); n > 0 {
			return &exitError{128 + n}
		}
		return fmt.Errorf("the command was ended: %s", printable(end.GetStatus()))
	}
	return nil
}

// signalNumber finds the signal in a status such as "signal: killed (core dumped)"; 0 where there is none.
func signalNumber(status string) int {
	name, ok := strings.CutPrefix(strings.TrimSuffix(status, " (core dumped)"), "signal: ")
	for n := syscall.Signal(1); ok && n < 65; n++ {
		if n.String() == name {
			return int(n)
		}
	}
	return 0
}

func (s *session) write(d *process.ProcessEvent_DataEvent) error {
	to, data := s.out, d.GetStdout()
	switch {
	case d.GetStderr() != nil:
		to, data = s.err, d.GetStderr()
	case d.GetPty() != nil:
		data = d.GetPty()
	}
	if _, err := to.Write(data); err != nil {
		return fmt.Errorf("write the command's output: %w", err)
	}
	return nil
}

func (s *session) selector(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
}

// killOnInterrupt ends the process when this command is interrupted.
func (s *session) killOnInterrupt(ctx, streamCtx context.Context, pid uint32) {
	select {
	case <-streamCtx.Done():
	case <-ctx.Done():
		if s.tty == nil { // a shell at a terminal ignores SIGTERM
			s.signal(streamCtx, pid, process.Signal_SIGNAL_SIGTERM)
			wait(streamCtx, killAfter)
		}
		s.signal(streamCtx, pid, process.Signal_SIGNAL_SIGKILL)
	}
}

// killAfter is how long an interrupted process may take to end by itself.
const killAfter = 5 * time.Second

// wait returns after d or when ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// signal sends a signal to the process; one that has ended needs none.
func (s *session) signal(ctx context.Context, pid uint32, sig process.Signal) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, _ = s.guest.process.SendSignal(ctx, &process.SendSignalRequest{Process: s.selector(pid), Signal: sig})
}

// sendInput carries input until it ends, then closes the process's.
func (s *session) sendInput(ctx context.Context, pid uint32) {
	if s.in == nil {
		return
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := s.in.Read(buf)
		if n > 0 {
			in := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: buf[:n]}}
			if s.tty != nil {
				in = &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: buf[:n]}}
			}
			if _, err := s.guest.process.SendInput(ctx, &process.SendInputRequest{Process: s.selector(pid), Input: in}); err != nil {
				return // the process has ended; its end event follows
			}
		}
		if err != nil {
			if s.tty == nil {
				_, _ = s.guest.process.CloseStdin(ctx, &process.CloseStdinRequest{Process: s.selector(pid)})
			}
			return
		}
	}
}

// resize tells the process each new size of our terminal.
func (s *session) resize(ctx context.Context, pid uint32) {
	if s.tty == nil {
		return
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			_, _ = s.guest.process.Update(ctx, &process.UpdateRequest{Process: s.selector(pid), Pty: &process.PTY{Size: windowSize(s.tty)}})
		}
	}
}
