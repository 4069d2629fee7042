// Command cloister-guest is the agent inside each sandbox and virtual machine, where it runs as process 1.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/cloister-dev/cloister/internal/guest"
)

func main() {
	addr := flag.String("addr", fmt.Sprintf(":%d", guest.DefaultPort), "address to listen on")
	verbose := flag.Bool("log", false, "write the log to standard error, too")
	flag.Parse()
	guest.Frugal()
	cfg := guest.Config{Addr: *addr, Env: os.Environ(), Init: os.Getpid() == 1}
	if *verbose {
		cfg.Log = slog.NewTextHandler(os.Stderr, nil)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := guest.Run(ctx, cfg)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "cloister-guest: %v\n", err)
		os.Exit(1)
	}
}
