package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

const (
	// keepaliveHeader is how often, in seconds, a client wants to hear from a silent stream.
	keepaliveHeader  = "Keepalive-Ping-Interval"
	defaultKeepalive = 90 * time.Second
	maxKeepalive     = time.Hour
)

// processService answers process.Process.
type processService struct{ *Server }

func (s *processService) List(context.Context, *process.ListRequest) (*process.ListResponse, error) {
	res := &process.ListResponse{}
	for _, p := range s.procs.list() {
		res.Processes = append(res.Processes, &process.ProcessInfo{Config: p.config, Pid: uint32(p.pid), Tag: p.tag}) //nolint:gosec // A pid is positive.
	}
	return res, nil
}

func (s *processService) Start(ctx context.Context, req *process.StartRequest, stream *connect.ServerStream[process.StartResponse]) error {
	c, err := s.command(ctx, req)
	if err != nil {
		return err
	}
	p, sub, err := s.procs.start(ctx, c)
	if err != nil {
		return connect.NewError(startCode(err), err)
	}
	return s.follow(ctx, p, sub, func(e *process.ProcessEvent) error {
		return stream.Send(&process.StartResponse{Event: e})
	})
}

func (s *processService) Connect(ctx context.Context, req *process.ConnectRequest, stream *connect.ServerStream[process.ConnectResponse]) error {
	p := s.procs.find(req.GetProcess(), true)
	if p == nil {
		return noProcess(req.GetProcess())
	}
	return s.follow(ctx, p, p.hub.subscribe(ctx), func(e *process.ProcessEvent) error {
		return stream.Send(&process.ConnectResponse{Event: e})
	})
}

// follow sends the start of p and then what the subscription brings, until its end or that of ctx. Without a
// subscription the process has ended already.
func (s *processService) follow(ctx context.Context, p *proc, sub *subscriber, send func(*process.ProcessEvent) error) error {
	if err := send(p.startEvent()); err != nil {
		return err
	}
	if sub == nil {
		<-p.exited
		return send(p.endEvent())
	}
	defer p.hub.unsubscribe(sub)
	interval := keepalive(rpcHeader(ctx, keepaliveHeader))
	silence := time.NewTimer(interval)
	defer silence.Stop()
	for {
		var e *process.ProcessEvent
		select {
		case next, open := <-sub.events:
			if !open {
				return nil
			}
			e = next
		case <-silence.C:
			e = &process.ProcessEvent{Event: &process.ProcessEvent_Keepalive{Keepalive: &process.ProcessEvent_KeepAlive{}}}
		case <-ctx.Done():
			return endOfStream(ctx)
		}
		if err := send(e); err != nil {
			return err
		}
		silence.Reset(interval)
	}
}

// endOfStream words the end of a stream's context.
func endOfStream(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the request's timeout is over"))
	}
	return connect.NewError(connect.CodeCanceled, ctx.Err())
}

// keepalive reads the header's seconds.
func keepalive(header string) time.Duration {
	seconds, err := strconv.Atoi(header)
	if err != nil || seconds <= 0 {
		return defaultKeepalive
	}
	return min(time.Duration(min(seconds, int(maxKeepalive/time.Second)))*time.Second, maxKeepalive)
}

// command checks a request to start a process.
func (s *processService) command(ctx context.Context, req *process.StartRequest) (*command, error) {
	a, err := s.rpcUser(ctx)
	if err != nil {
		return nil, err
	}
	cfg := req.GetProcess()
	if cfg.GetCmd() == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("no command was given"))
	}
	set := s.settings.get()
	dir, err := resolvePath(cfg.GetCwd(), a, set.workdir)
	if err == nil {
		dir, err = workingDir(dir, cfg.GetCwd() == "")
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	c := &command{config: cfg, tag: req.Tag, account: a, dir: dir, stdin: req.Stdin == nil || req.GetStdin()} //nolint:protogetter // Unset and false differ.
	c.env = environment(s.cfg.Env, a, set.env, cfg.GetEnvs())
	if c.path, err = findProgram(cfg.GetCmd(), dir, c.env); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("error starting process '%s': %w", cfg.GetCmd(), err))
	}
	if req.GetPty() != nil {
		c.size = winsize(req.GetPty().GetSize())
	}
	return c, nil
}

// startCode maps why a process could not be started.
func startCode(err error) connect.Code {
	switch {
	case isExhausted(err):
		return connect.CodeResourceExhausted
	case errors.Is(err, context.Canceled):
		return connect.CodeCanceled
	}
	return connect.CodeInvalidArgument
}

func noProcess(sel *process.ProcessSelector) error {
	if tag, ok := sel.GetSelector().(*process.ProcessSelector_Tag); ok {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with tag '%s' not found", tag.Tag))
	}
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", sel.GetPid()))
}

func (s *processService) running(sel *process.ProcessSelector) (*proc, error) {
	if p := s.procs.find(sel, false); p != nil {
		return p, nil
	}
	return nil, noProcess(sel)
}

func (s *processService) Update(_ context.Context, req *process.UpdateRequest) (*process.UpdateResponse, error) {
	p, err := s.running(req.GetProcess())
	if err != nil {
		return nil, err
	}
	if req.GetPty() == nil {
		return &process.UpdateResponse{}, nil
	}
	if p.tty == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errNoPTY)
	}
	if err := resize(p.tty, winsize(req.GetPty().GetSize())); err != nil {
		return nil, connect.NewError(inputCode(err), fmt.Errorf("process %d: %w", p.pid, err))
	}
	return &process.UpdateResponse{}, nil
}

func (s *processService) SendInput(ctx context.Context, req *process.SendInputRequest) (*process.SendInputResponse, error) {
	p, err := s.running(req.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.give(ctx, req.GetInput()); err != nil {
		return nil, err
	}
	return &process.SendInputResponse{}, nil
}

func (s *processService) StreamInput(ctx context.Context, stream *connect.ClientStream[process.StreamInputRequest]) (*process.StreamInputResponse, error) {
	var p *proc
	for stream.Receive() {
		var err error
		switch e := stream.Msg().GetEvent().(type) {
		case *process.StreamInputRequest_Start:
			p, err = s.running(e.Start.GetProcess())
		case *process.StreamInputRequest_Data:
			if p == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("input came before the event that names the process"))
			}
			err = p.give(ctx, e.Data.GetInput())
		case *process.StreamInputRequest_Keepalive:
		}
		if err != nil {
			return nil, err
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return &process.StreamInputResponse{}, nil
}

// give writes input of either kind.
func (p *proc) give(ctx context.Context, in *process.ProcessInput) error {
	var data []byte
	var err error
	switch i := in.GetInput().(type) {
	case *process.ProcessInput_Stdin:
		if p.tty != nil {
			err = errStdinOnPTY
		}
		data = i.Stdin
	case *process.ProcessInput_Pty:
		if p.tty == nil {
			err = errNoPTY
		}
		data = i.Pty
	default:
		return connect.NewError(connect.CodeInvalidArgument, errors.New("no input was given: set stdin or pty"))
	}
	if err == nil && p.stdin == nil {
		err = errNoStdin
	}
	if err == nil {
		err = p.stdin.write(ctx, data)
	}
	if err != nil {
		return connect.NewError(inputCode(err), fmt.Errorf("error writing input of process %d: %w", p.pid, err))
	}
	return nil
}

// inputCode maps why input was not taken; that the process is over, or never wanted any, is the client's to know.
func inputCode(err error) connect.Code {
	for _, expected := range []error{errNoStdin, errStdinOnPTY, errNoPTY, os.ErrClosed, syscall.EPIPE} {
		if errors.Is(err, expected) {
			return connect.CodeFailedPrecondition
		}
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled):
		return connect.CodeCanceled
	}
	return connect.CodeInternal
}

func (s *processService) SendSignal(_ context.Context, req *process.SendSignalRequest) (*process.SendSignalResponse, error) {
	p, err := s.running(req.GetProcess())
	if err != nil {
		return nil, err
	}
	var sig syscall.Signal
	switch req.GetSignal() {
	case process.Signal_SIGNAL_SIGTERM:
		sig = syscall.SIGTERM
	case process.Signal_SIGNAL_SIGKILL:
		sig = syscall.SIGKILL
	case process.Signal_SIGNAL_UNSPECIFIED:
	}
	if sig == 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("signal %s: only SIGTERM and SIGKILL can be sent", req.GetSignal()))
	}
	if err := s.procs.signal(p, sig); err != nil {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("send %s to process %d: %w", sig, p.pid, err))
	}
	return &process.SendSignalResponse{}, nil
}

func (s *processService) CloseStdin(_ context.Context, req *process.CloseStdinRequest) (*process.CloseStdinResponse, error) {
	p, err := s.running(req.GetProcess())
	if err != nil {
		return nil, err
	}
	switch {
	case p.tty != nil:
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the process has a terminal: send Ctrl+D (0x04) as pty input instead"))
	case p.stdin == nil:
		return nil, connect.NewError(connect.CodeFailedPrecondition, errNoStdin)
	}
	p.stdin.close()
	return &process.CloseStdinResponse{}, nil
}
