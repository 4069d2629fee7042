package install

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// inFreshNetwork runs fn on a thread in a new, empty network namespace. Thread and namespace end with it. It is never the
// process's main thread, from which others read the process's namespace.
func inFreshNetwork(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- inFreshNetwork(fn)
			runtime.UnlockOSThread()
			return
		}
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("create network namespace: %w", err)
			return // the thread ends, since it stays locked
		}
		done <- fn()
	}()
	return <-done
}
