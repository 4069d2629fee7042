package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

const (
	// outputChunk is the most that one event carries, in bytes.
	outputChunk = 32 << 10
	// ttyQuiet is how long a terminal must be silent after its process exited before its output counts as complete:
	// a background job may keep the terminal open for ever.
	ttyQuiet = 100 * time.Millisecond
	// killedQuiet is the same for the pipes of a process that was killed.
	killedQuiet = 200 * time.Millisecond
	// killPatience is how long a kill waits for the exit to be collected.
	killPatience = 2 * time.Second
	// killInterval is how often a kill looks whether what it killed is gone.
	killInterval = 5 * time.Millisecond
)

// proc is one process that a client started.
type proc struct {
	pid    int
	tag    *string
	config *process.ProcessConfig
	hub    hub

	stdin   *input   // nil where standard input is empty
	tty     *os.File // nil unless the process has a terminal
	outputs []*os.File
	kinds   []outputKind
	killed  atomic.Bool
	timeout *time.Timer // kills; nil for none

	// exited is closed when the kernel's exit was collected, after status was set; done after the end was published.
	exited  chan struct{}
	done    chan struct{}
	status  syscall.WaitStatus
	endedAt time.Time
}

// outputKind is which stream a piece of output belongs to.
type outputKind int

const (
	kindStdout outputKind = iota
	kindStderr
	kindPTY
)

func (k outputKind) event(data []byte) *process.ProcessEvent {
	d := &process.ProcessEvent_DataEvent{}
	switch k {
	case kindStdout:
		d.Output = &process.ProcessEvent_DataEvent_Stdout{Stdout: data}
	case kindStderr:
		d.Output = &process.ProcessEvent_DataEvent_Stderr{Stderr: data}
	case kindPTY:
		d.Output = &process.ProcessEvent_DataEvent_Pty{Pty: data}
	}
	return &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}}
}

func (p *proc) startEvent() *process.ProcessEvent {
	return &process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: uint32(p.pid)}}} //nolint:gosec // A pid is positive.
}

// endEvent may be called once exited is closed.
func (p *proc) endEvent() *process.ProcessEvent {
	end := &process.ProcessEvent_EndEvent{ExitCode: -1, Exited: p.status.Exited(), Status: statusText(p.status)}
	if end.Exited {
		end.ExitCode = int32(p.status.ExitStatus()) //nolint:gosec // An exit status has 8 bits.
	}
	if end.ExitCode != 0 {
		end.Error = &end.Status
	}
	return &process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}}
}

// statusText words a status as Go's os package does, which clients have come to know.
func statusText(status syscall.WaitStatus) string {
	if !status.Signaled() {
		return fmt.Sprintf("exit status %d", status.ExitStatus())
	}
	text := "signal: " + status.Signal().String()
	if status.CoreDump() {
		text += " (core dumped)"
	}
	return text
}

// collected is called by the reaper with the exit.
func (p *proc) collected(status syscall.WaitStatus) {
	p.status = status
	close(p.exited)
	p.hurry()
}

func (p *proc) hasExited() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// hurry bounds the wait for more output of a process that is over. Pipes of one that was not killed are read to
// their end, however long its children keep them open.
func (p *proc) hurry() {
	quiet := ttyQuiet
	if p.tty == nil {
		quiet = killedQuiet
	}
	if p.tty == nil && !p.killed.Load() {
		return
	}
	for _, f := range p.outputs {
		_ = f.SetReadDeadline(time.Now().Add(quiet)) // fails only on a closed file
	}
}

// pump publishes what comes out of the process, then, when every output has ended, its end.
func (p *proc) pump(ended func(*proc)) {
	var others sync.WaitGroup
	for i := 1; i < len(p.outputs); i++ {
		others.Go(func() { p.copyOut(i) })
	}
	p.copyOut(0)
	others.Wait()
	<-p.exited
	if p.timeout != nil {
		p.timeout.Stop()
	}
	p.stdin.close()
	ended(p)
	p.hub.close(p.endEvent())
	close(p.done)
}

// copyOut reads one output until it ends or, after the exit, falls silent.
func (p *proc) copyOut(i int) {
	f, kind := p.outputs[i], p.kinds[i]
	defer f.Close() //nolint:errcheck // It was only read.
	buf := make([]byte, outputChunk)
	for {
		n, err := f.Read(buf)
		if n > 0 && !p.hub.idle() {
			p.hub.publish(kind.event(bytes.Clone(buf[:n])))
		}
		if err != nil {
			return // the end, a terminal without processes, or silence
		}
		if p.hasExited() {
			p.hurry()
		}
	}
}

// kill ends the process with its session, and waits a moment until all of it is gone and the last output collected.
func (p *proc) kill(r *reaper) error {
	p.killed.Store(true)
	alive, err := r.signal(p.pid, syscall.SIGKILL)
	if err != nil {
		return err
	}
	if !alive { // only children are left, which hold the outputs open
		p.hurry()
	}
	patience := time.NewTimer(killPatience)
	defer patience.Stop()
	select {
	case <-p.exited:
	case <-patience.C:
		return fmt.Errorf("process %d was sent a kill, but has not exited after %s", p.pid, killPatience)
	}
	if err := p.killRest(patience.C); err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-patience.C: // a subscriber is slow; the process is gone
	}
	return nil
}

// killRest kills what is left of the session until nothing is.
func (p *proc) killRest(enough <-chan time.Time) error {
	if killSession(p.pid) == 0 {
		return nil
	}
	again := time.NewTicker(killInterval)
	defer again.Stop()
	for killSession(p.pid) > 0 {
		select {
		case <-again.C:
		case <-enough:
			return fmt.Errorf("children of process %d were sent a kill, but have not exited after %s", p.pid, killPatience)
		}
	}
	return nil
}

// Reasons why input cannot be given.
var (
	errNoStdin    = errors.New("standard input is closed, or was not requested at the start")
	errStdinOnPTY = errors.New("the process has a terminal: send pty input instead of stdin")
	errNoPTY      = errors.New("the process has no terminal")
)

// input is a pipe or terminal that clients write to, one at a time and in order.
type input struct {
	file *os.File
	turn chan struct{} // holds one element while somebody writes
}

func newInput(f *os.File) *input { return &input{file: f, turn: make(chan struct{}, 1)} }

// write gives up when ctx ends, even in the middle of a pipe that nobody reads.
func (in *input) write(ctx context.Context, data []byte) error {
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-in.turn }()
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = in.file.SetWriteDeadline(time.Now())
		close(fired)
	})
	_, err := in.file.Write(data)
	if !stop() {
		<-fired
		_ = in.file.SetWriteDeadline(time.Time{})
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	return err
}

// close is safe on nil and more than once.
func (in *input) close() {
	if in != nil {
		_ = in.file.Close()
	}
}
