package guest

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// reaper starts children and collects their exits. It is the only caller of wait in the process, since a second one
// could take an exit that is not its own: Go's os/exec must not be used beside it where it collects orphans, too.
type reaper struct {
	orphans bool

	// mu is held while forking, so that a child is known before its exit can be collected.
	mu       sync.Mutex
	children map[int]func(syscall.WaitStatus)
}

func newReaper(orphans bool) *reaper {
	return &reaper{orphans: orphans, children: map[int]func(syscall.WaitStatus){}}
}

// start forks and executes. exited is called once, from the reaper's goroutine, which it must not hold up.
func (r *reaper) start(path string, argv []string, attr *syscall.ProcAttr, exited func(syscall.WaitStatus)) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr) //nolint:gosec // Running what clients ask for is the purpose.
	if err != nil {
		return 0, err
	}
	r.children[pid] = exited
	return pid, nil
}

// signal sends to the child's process group if the child has not been collected yet, and reports whether it was there.
func (r *reaper) signal(pid int, sig syscall.Signal) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.children[pid]; !ok {
		return false, nil
	}
	err := syscall.Kill(-pid, sig)
	if errors.Is(err, syscall.ESRCH) { // it has not become the leader of its own group yet
		err = syscall.Kill(pid, sig)
	}
	return true, err
}

// run collects exits until ctx ends. It sleeps until the kernel reports one.
func (r *reaper) run(ctx context.Context) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGCHLD)
	defer signal.Stop(changed)
	for {
		r.collect()
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (r *reaper) collect() {
	for {
		exited, status := r.next()
		if exited == nil {
			return
		}
		exited(status)
	}
}

// next collects one exit of our own children and returns what to call with it, or nil if there is none. Exits of
// orphans that were given to us are collected on the way. Forking is excluded meanwhile, so a child that is not known
// here is an orphan.
func (r *reaper) next() (exited func(syscall.WaitStatus), status syscall.WaitStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.orphans {
		for pid := range r.children {
			if got, status := waitNow(pid); got == pid {
				return r.forget(pid), status
			}
		}
		return nil, 0
	}
	for {
		pid, status := waitNow(-1)
		if pid <= 0 {
			return nil, 0
		}
		if exited := r.forget(pid); exited != nil {
			return exited, status
		}
	}
}

func (r *reaper) forget(pid int) func(syscall.WaitStatus) {
	exited := r.children[pid]
	delete(r.children, pid)
	return exited
}

// waitNow collects an exit if there is one. A child whose exit somebody else took counts as having exited.
func waitNow(pid int) (int, syscall.WaitStatus) {
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return pid, 0
		default:
			return got, status
		}
	}
}
