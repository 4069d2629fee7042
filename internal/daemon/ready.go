package daemon

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cloister-dev/cloister/internal/proxy"
	"github.com/cloister-dev/cloister/internal/routes"
)

// departTimeout is how long a proxy that ends tries to tell the server so.
const departTimeout = 2 * time.Second

// isReady reports whether the process should get requests: it has started, of a proxy that is to say with the routing table,
// and it is not ending.
func (d *daemon) isReady() bool {
	return d.ready.Load() && !d.ending.Load() && (d.proxy == nil || d.proxy.table == nil || d.proxy.table.Ready())
}

// depart says that no new requests are wanted, before the listeners close: on /readyz, and, of a proxy that joined, to the server.
func (d *daemon) depart(ctx context.Context) {
	d.ending.Store(true)
	if d.proxy == nil || d.proxy.table == nil || !d.member.link.Connected() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, departTimeout)
	defer cancel()
	if err := d.proxy.table.Leave(ctx); err != nil {
		d.log.WarnContext(ctx, "the server was not told that this proxy ends", slog.Any("err", err))
	}
}

// linger has a proxy that joined go on for a while after depart, so that whoever asks /readyz now and then sends it no more before its
// listener closes. A signal ends it, or ctx.
func (d *daemon) linger(ctx context.Context) {
	if d.proxy == nil || d.proxy.table == nil || d.cfg.ProxyDrainDelay == 0 {
		return
	}
	again := make(chan os.Signal, 1)
	signal.Notify(again, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(again)
	d.log.InfoContext(ctx, "taking connections for a while longer, as proxy-drain-delay says; another signal ends that", slog.Duration("for", d.cfg.ProxyDrainDelay))
	wait := time.NewTimer(d.cfg.ProxyDrainDelay)
	defer wait.Stop()
	select {
	case <-ctx.Done():
	case <-again:
	case <-wait.C:
	}
}

// proxySelf is what a proxy that joined says of itself.
func (d *daemon) proxySelf(p *proxy.Proxy) routes.Self {
	connections, requests := p.Open()
	return routes.Self{
		Version: d.version, Address: d.cfg.PublicProxyURL, Started: d.begun.UTC(), Connections: connections, Requests: requests,
	}
}

// withHealth answers, before next, whether the process works and whether it should get requests, and says nothing else.
func (d *daemon) withHealth(next http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", next)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "ok\n") // who has gone needs no answer
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !d.isReady() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n") // likewise
	})
	return mux
}
