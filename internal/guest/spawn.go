package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/gen/envd/process"
)

// defaultPath is searched where the environment has no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// ttyGroup owns terminals by convention.
const ttyGroup = 5

// command is a checked request to start a process.
type command struct {
	config  *process.ProcessConfig
	tag     *string
	account *account
	path    string
	dir     string
	env     []string
	stdin   bool
	size    *unix.Winsize // nil for no terminal
}

// environment merges, later ones winning: what the agent has, the account, the settings, the request.
func environment(base []string, a *account, layers ...map[string]string) []string {
	merged := make(map[string]string, len(base)+8)
	for _, entry := range base {
		if name, value, ok := strings.Cut(entry, "="); ok && name != "" {
			merged[name] = value
		}
	}
	if merged["PATH"] == "" {
		merged["PATH"] = defaultPath
	}
	merged["HOME"], merged["USER"], merged["LOGNAME"] = a.home, a.name, a.name
	for _, layer := range layers {
		maps.Copy(merged, layer)
	}
	env := make([]string, 0, len(merged))
	for name, value := range merged {
		env = append(env, name+"="+value)
	}
	return env
}

// findProgram returns the file to execute for a command's name, as a shell would.
func findProgram(name, dir string, env []string) (string, error) {
	if strings.ContainsRune(name, '/') {
		if filepath.IsAbs(name) {
			return name, nil
		}
		return filepath.Join(dir, name), nil
	}
	for _, entry := range env {
		path, ok := strings.CutPrefix(entry, "PATH=")
		if !ok {
			continue
		}
		for _, d := range filepath.SplitList(path) {
			if !filepath.IsAbs(d) {
				d = filepath.Join(dir, d)
			}
			candidate := filepath.Join(d, name)
			if info, err := os.Stat(candidate); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return candidate, nil
			}
		}
	}
	return "", fmt.Errorf("executable file %q not found in $PATH", name)
}

// spawn starts c. The process is its own session and group, so that a kill reaches its children.
func spawn(r *reaper, c *command) (*proc, error) {
	p := &proc{config: c.config, tag: c.tag, exited: make(chan struct{}), done: make(chan struct{})}
	var theirs []*os.File
	var err error
	if c.size != nil {
		theirs, err = p.openTerminal(c)
	} else {
		theirs, err = p.openPipes(c.stdin)
	}
	defer closeFiles(theirs)
	if err != nil {
		p.closeOurs()
		return nil, fmt.Errorf("error starting process '%s': %w", c.config.GetCmd(), err)
	}
	attr := &syscall.ProcAttr{Dir: c.dir, Env: c.env, Sys: &syscall.SysProcAttr{
		Setsid: true, Setctty: c.size != nil, Credential: credential(c.account),
	}}
	for _, f := range theirs {
		attr.Files = append(attr.Files, f.Fd())
	}
	if c.size != nil {
		attr.Files = []uintptr{attr.Files[0], attr.Files[0], attr.Files[0]}
	}
	argv := append([]string{c.config.GetCmd()}, c.config.GetArgs()...)
	if p.pid, err = r.start(c.path, argv, attr, p.collected); err != nil {
		p.closeOurs()
		return nil, fmt.Errorf("error starting process '%s': %w", c.config.GetCmd(), err)
	}
	return p, nil
}

// credential is nil where there is nothing to switch to, which also lets an agent that is not root act as itself.
func credential(a *account) *syscall.Credential {
	if os.Getuid() != 0 && os.Getuid() == int(a.uid) {
		return nil
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
}

// openPipes sets up our ends and returns the child's: standard input, output and error.
func (p *proc) openPipes(stdin bool) (theirs []*os.File, err error) {
	if !stdin {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		theirs = append(theirs, null)
	} else {
		r, w, err := blockingPipe(false)
		if err != nil {
			return nil, err
		}
		theirs = append(theirs, r)
		p.stdin = newInput(w)
	}
	for _, kind := range []outputKind{kindStdout, kindStderr} {
		r, w, err := blockingPipe(true)
		if err != nil {
			return theirs, err
		}
		theirs = append(theirs, w)
		p.outputs, p.kinds = append(p.outputs, r), append(p.kinds, kind)
	}
	return theirs, nil
}

// blockingPipe returns a pipe of which only our end, the reading one if weRead, is non-blocking: programs do not
// expect that of their standard streams. os.Pipe makes both ends so.
func blockingPipe(weRead bool) (r, w *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	ours := fds[1]
	if weRead {
		ours = fds[0]
	}
	_ = unix.SetNonblock(ours, true) // cannot fail on a descriptor that is open
	return os.NewFile(uintptr(fds[0]), "|0"), os.NewFile(uintptr(fds[1]), "|1"), nil
}

// openTerminal sets up our end and returns the child's.
func (p *proc) openTerminal(c *command) (theirs []*os.File, err error) {
	master, slave, err := openPTY()
	if err != nil {
		return nil, err
	}
	p.tty, p.stdin = master, newInput(master)
	p.outputs, p.kinds = []*os.File{master}, []outputKind{kindPTY}
	if err := resize(master, c.size); err != nil {
		return []*os.File{slave}, err
	}
	_ = slave.Chown(int(c.account.uid), ttyGroup) // a terminal of root works, too, but for programs that open it again
	return []*os.File{slave}, nil
}

func (p *proc) closeOurs() {
	p.stdin.close()
	closeFiles(p.outputs)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// killSession kills what there is of a session, whose members may have groups of their own, as a shell's jobs do. It
// returns how many there were that have not exited yet.
func killSession(sid int) (found int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path) //nolint:gosec // A file of /proc.
		if err != nil {
			continue
		}
		if pid, ok := inSession(string(text), sid); ok {
			found++
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return found
}

// inSession reads /proc/<pid>/stat: "pid (name) state ppid pgrp session ...". What has exited is in no session.
func inSession(stat string, sid int) (pid int, ok bool) {
	open, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return 0, false
	}
	fields := strings.Fields(stat[end+1:])
	if len(fields) < 4 || fields[3] != strconv.Itoa(sid) || fields[0] == "Z" || fields[0] == "X" {
		return 0, false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(stat[:open]))
	return pid, err == nil && pid > 1
}

// isExhausted says that a start failed for want of something that may be there again later.
func isExhausted(err error) bool {
	for _, errno := range []error{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.ENOSPC} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// workingDir checks the directory that a process is to start in; implied says that no client asked for it.
func workingDir(dir string, implied bool) (string, error) {
	info, err := os.Stat(dir)
	switch {
	case err == nil && info.IsDir():
		return dir, nil
	case implied:
		return "/", nil
	case err == nil:
		return "", fmt.Errorf("cwd '%s' is not a directory", dir)
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("cwd '%s' does not exist", dir)
	}
	return "", fmt.Errorf("cwd '%s': %w", dir, err)
}
