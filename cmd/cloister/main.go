// Command cloister runs untrusted code in sandboxes on this machine: server, node, proxy and command line in one binary.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/cloister-dev/cloister/internal/cli"
)

// The engine enters network namespaces on threads of its own and takes the main thread's as the machine's, so nothing
// else may ever run on the main thread.
func init() { runtime.LockOSThread() } //nolint:gochecknoinits // must happen before main's goroutine can move

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	code := make(chan int)
	go func() { code <- cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr) }()
	c := <-code
	stop()
	os.Exit(c)
}
