package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/runsc/specutils"
)

const (
	// fileServerName is how the process that serves a checkpoint's files calls itself.
	fileServerName = "cloister-files"
	nobody         = 65534
	maxServed      = 4 << 10 // bytes of what it says at its end
	firstPassed    = 3       // the descriptor of its first file
)

// servingArgs is what a file server's process is told, as its only argument. Numbers are descriptors.
type servingArgs struct {
	Write bool           `json:"write"`
	Files map[string]int `json:"files"` // -1 drops what is written
	Join  []int          `json:"join"`
}

// served is what a file server's process says at its end.
type served struct {
	// Shared is how many bytes were cloned.
	Shared int64  `json:"shared"`
	Errno  int64  `json:"errno"`
	Err    string `json:"err"`
}

// maybeServeFiles is the file server's process.
func maybeServeFiles() {
	if os.Args[0] != fileServerName || len(os.Args) != 2 {
		return
	}
	out, err := serveFiles([]byte(os.Args[1]))
	if err != nil {
		out.Err = err.Error()
	}
	_ = json.NewEncoder(os.Stdout).Encode(out) // who does not hear it sees that it is missing
	unix.Exit(0)
}

func serveFiles(raw []byte) (served, error) {
	var args servingArgs
	if err := json.Unmarshal(raw, &args); err != nil {
		return served{}, fmt.Errorf("parse arguments: %w", err)
	}
	for _, fd := range args.Join {
		if err := joinGroup(fd); err != nil {
			return served{}, err
		}
	}
	s := &fileServer{sock: firstPassed, write: args.Write, files: map[string]*os.File{}}
	for name, fd := range args.Files {
		s.files[name] = nil
		if fd >= 0 {
			s.files[name] = os.NewFile(uintptr(fd), name)
		}
	}
	err := s.serve()
	return served{Shared: s.shared.Load(), Errno: s.errno.Load()}, err
}

// fileProcess is a file server's process.
type fileProcess struct {
	cmd *exec.Cmd
	out bytes.Buffer
	// sock is the sentry's end, where it is ours to close.
	sock *os.File
}

// room is the control group that a process begins its life in; the zero value is this process's.
type room struct {
	dir   *os.File
	tasks []*os.File
}

// startFileServer starts a process that serves files over a socket, until ctx ends or the sentry hangs up.
func startFileServer(ctx context.Context, files map[string]*os.File, write bool, in room) (*fileProcess, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	server := os.NewFile(uintptr(pair[0]), "server")
	defer func() { _ = server.Close() }() // the process has its own
	p := &fileProcess{sock: os.NewFile(uintptr(pair[1]), "sentry")}
	if err := p.start(ctx, server, files, servingArgs{Write: write, Files: map[string]int{}}, in); err != nil {
		_ = p.sock.Close() // nothing was written
		return nil, err
	}
	return p, nil
}

func (p *fileProcess) start(ctx context.Context, sock *os.File, files map[string]*os.File, args servingArgs, in room) error {
	passed := []*os.File{sock}
	for name, f := range files {
		args.Files[name] = -1
		if f != nil {
			args.Files[name] = firstPassed + len(passed)
			passed = append(passed, f)
		}
	}
	for _, f := range in.tasks {
		args.Join = append(args.Join, firstPassed+len(passed))
		passed = append(passed, f)
	}
	raw, err := json.Marshal(args)
	if err != nil {
		return fmt.Errorf("encode arguments: %w", err)
	}
	cmd := exec.CommandContext(ctx, specutils.ExePath) //nolint:gosec // this program or the sentry
	cmd.Args = []string{fileServerName, string(raw)}
	cmd.Env = []string{}
	cmd.ExtraFiles = passed
	cmd.Stdout = &p.out
	cmd.SysProcAttr = &unix.SysProcAttr{
		Setsid: true, Credential: &syscall.Credential{Uid: nobody, Gid: nobody},
	}
	if in.dir != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(in.dir.Fd())
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start file server: %w", err)
	}
	p.cmd = cmd
	return nil
}

// wait hangs up and waits for the process's end. The error is what went wrong with the files, such as unix.ENOSPC.
func (p *fileProcess) wait() (served, error) {
	if p.sock != nil {
		_ = p.sock.Close() // the sentry has its own, or is gone
	}
	err := p.cmd.Wait()
	if p.out.Len() == 0 || p.out.Len() > maxServed {
		return served{}, errors.Join(errors.New("the file server said nothing"), err)
	}
	var out served
	if err := json.Unmarshal(p.out.Bytes(), &out); err != nil {
		return served{}, fmt.Errorf("parse what the file server said: %w", err)
	}
	if out.Errno != 0 {
		return out, unix.Errno(out.Errno) //nolint:gosec // an errno
	}
	if out.Err != "" {
		return out, errors.New(out.Err)
	}
	return out, nil
}

// end kills the process.
func (p *fileProcess) end() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end file server: %w", err)
	}
	_ = p.cmd.Wait() // it was killed
	return nil
}
