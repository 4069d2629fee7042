// Command nginx measures the proxy's data paths against nginx as a reverse proxy, and against dialling the backend
// directly, side by side on loopback:
//
//	sudo go run ./test/load/nginx -rounds 9
//
// It needs Debian's nginx-light and wrk. All ways take turns, a few seconds each, and the ratios are of medians of the same
// run: the machine may have other work, which then meets all of them. The load generator and the backend (an nginx too) run on
// the first processor, the proxy that is measured on the last, each with one worker. Lines that benchstat reads go to standard output,
// then a table.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

type options struct {
	rounds, connections int
	each                time.Duration
	profile             string
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "how often each way is measured")
	flag.IntVar(&o.connections, "connections", 64, "connections that are kept open")
	flag.DurationVar(&o.each, "each", 2*time.Second, "how long one measurement takes")
	serve := flag.String("serve", "", "used by itself: be the proxy, with this data path")
	listen := flag.String("listen", "", "used by itself: where the proxy listens")
	backend := flag.String("backend", "", "used by itself: where the backend listens")
	flag.StringVar(&o.profile, "profile", "", "file for a profile of the fast path's processor time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if *serve != "" {
		err = beProxy(ctx, o, *serve, *listen, *backend)
	} else {
		err = run(ctx, o)
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		stop()
		os.Exit(1) //nolint:forbidigo,gocritic // this is a main
	}
}
