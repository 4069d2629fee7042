package guestnet

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// onThread runs fn on an operating system thread that nothing else uses meanwhile and that fn may move into other network
// namespaces. It is never the process's main thread: others read the process's namespace from there. A thread
// that cannot return to its namespace ends.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- onThread(fn) // this goroutine keeps the main thread, so that the next one gets another
			runtime.UnlockOSThread()
			return
		}
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open the thread's network namespace: %w", err)
			return
		}
		err = fn()
		if back := netns.Set(home); back == nil {
			runtime.UnlockOSThread()
		}
		_ = home.Close() // nothing was written
		done <- err
	}()
	return <-done
}

// inNamespace runs fn on a thread inside ns.
func inNamespace(ns netns.NsHandle, fn func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// writeSetting writes a kernel setting of the calling thread's network namespace. A setting that the kernel does not
// have, such as those of a disabled IPv6, is no error.
func writeSetting(path, value string) error {
	f, err := os.OpenFile("/proc/sys/net/"+path, os.O_WRONLY, 0) //nolint:gosec // constant names and those of our links
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open setting net/%s: %w", path, err)
	}
	_, err = f.WriteString(value)
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("set net/%s to %s: %w", path, value, err)
	}
	return nil
}
