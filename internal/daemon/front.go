package daemon

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/api"
	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/proxy"
	"github.com/cloister-dev/cloister/internal/telemetry"
)

// buildFronts opens every listener and gives each its handler. A machine that joined answers the API on its socket only.
func (d *daemon) buildFronts(ctx context.Context) error {
	tlsConfig, err := d.tlsConfig()
	if err != nil {
		return err
	}
	traffic := http.NotFoundHandler()
	if d.proxy != nil {
		traffic = telemetry.Traced(d.proxy.handler, func(r *http.Request) string { return "proxy " + r.Method })
	}
	if d.server != nil {
		handler := telemetry.Traced(d.apiHandler(), func(r *http.Request) string { return "api " + r.Method })
		if err := d.open(ctx, "api-addr", d.cfg.APIAddr, handler, tlsConfig); err != nil {
			return err
		}
		d.admin, traffic = asAdmin(handler), apiByName(d.cfg.Domain, handler, traffic)
	}
	if d.proxy != nil {
		if err := d.openProxy(ctx, traffic, tlsConfig); err != nil {
			return err
		}
	}
	if d.server == nil {
		d.admin = http.HandlerFunc(d.answerStatus)
		if d.node != nil {
			d.admin, d.traffic = asAdmin(d.node.alone), http.HandlerFunc(d.node.alone.serveTraffic)
		}
	}
	if d.cfg.DebugAddr != "" {
		if err := d.open(ctx, "debug-addr", d.cfg.DebugAddr, d.withHealth(telemetry.DebugHandler(d.metrics)), nil); err != nil {
			return err
		}
	}
	l, err := listenUnix(ctx, d.path("cloister.sock"))
	if err != nil {
		return err
	}
	d.addFront(newFront("socket", l, d.socketHandler(), nil))
	return nil
}

// openProxy opens the listener for sandbox traffic, on the proxy's own data path; rest answers what that leaves to net/http.
func (d *daemon) openProxy(ctx context.Context, rest http.Handler, tlsConfig *tls.Config) error {
	l, err := listenTCP(ctx, "proxy-addr", d.cfg.ProxyAddr)
	if err != nil {
		return err
	}
	opt := proxy.ServeOptions{TLS: tlsConfig, Handler: rest}
	if d.server != nil {
		opt.Foreign = apiHost(d.cfg.Domain)
	}
	d.addFront(&front{name: "proxy-addr", listener: l, own: func(ctx context.Context, grace time.Duration) error {
		opt.Grace = grace
		return d.proxy.handler.Serve(ctx, l, opt)
	}})
	return nil
}

// socketHandler is what the unix socket answers: whoever may open it is admin.
func (d *daemon) socketHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", d.withHealth(d.admin))
	if d.member != nil {
		mux.Handle("GET /metrics", telemetry.MetricsHandler(d.metrics))
		mux.HandleFunc("POST "+leavePath, d.serveLeave)
	}
	if d.traffic != nil {
		mux.Handle("/sandbox/", d.traffic)
	}
	return mux
}

// asAdmin lets whoever reaches it do everything.
func asAdmin(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(api.WithLocalAdmin(r.Context())))
	})
}

// apiByName gives requests for api.<domain>, where clients look for the API that know the domain alone, to the API also
// where sandboxes answer: one address then does for both. No sandbox has that name, since theirs begin with a port.
func apiByName(domain string, apiHandler, traffic http.Handler) http.Handler {
	isAPI := apiHost(domain)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isAPI(r.Host) {
			apiHandler.ServeHTTP(w, r)
			return
		}
		traffic.ServeHTTP(w, r)
	})
}

// apiHost returns what recognises the API's name below the domain, in a Host header; without a domain nothing is.
func apiHost(domain string) func(host string) bool {
	if domain == "" {
		return func(string) bool { return false }
	}
	name := "api." + hostname(domain)
	return func(host string) bool { return strings.EqualFold(strings.TrimSuffix(hostname(host), "."), name) }
}

// hostname is host without a port.
func hostname(host string) string {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		return host
	}
	return name
}

// apiHandler is the API, with the metrics behind the same keys.
func (d *daemon) apiHandler() http.Handler {
	return api.New(api.Config{
		Control: d.server.control, Auth: keyring{d.server.store}, Log: d.log, Metrics: d.metrics, Domain: d.cfg.Domain,
		MetricsPage: telemetry.MetricsHandler(d.metrics), Ready: d.isReady,
	})
}

func (d *daemon) open(ctx context.Context, setting, addr string, h http.Handler, tlsConfig *tls.Config) error {
	l, err := listenTCP(ctx, setting, addr)
	if err != nil {
		return err
	}
	d.addFront(newFront(setting, l, h, tlsConfig))
	return nil
}

func (d *daemon) addFront(f *front) {
	d.fronts = append(d.fronts, f)
	d.closers = append(d.closers, func() error { _ = f.listener.Close(); return nil }) // closed already where it served
}

// tlsConfig is nil where the settings name no certificate.
func (d *daemon) tlsConfig() (*tls.Config, error) {
	if d.cfg.TLSCert == "" {
		return nil, nil //nolint:nilnil // no certificate, no TLS, no error
	}
	cert, err := proxy.LoadCertificate(d.cfg.TLSCert, d.cfg.TLSKey, d.log)
	if err != nil {
		return nil, fmt.Errorf("load tls-cert: %w", err)
	}
	return cert.TLSConfig(), nil
}

// publicHosts are the names by which clients reach the proxy itself.
func publicHosts(cfg *config.Config) []string {
	u, err := url.Parse(cfg.PublicProxyURL)
	if err != nil {
		return nil
	}
	return []string{u.Hostname()}
}

// lastResort are the name servers of sandboxes on a machine that names none that they could reach.
func lastResort() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{1, 1, 1, 1}), netip.AddrFrom4([4]byte{8, 8, 8, 8})}
}

// resolvers are the name servers that sandboxes use.
func resolvers(cfg *config.Config) []netip.Addr {
	if set := cfg.ResolverAddrs(); len(set) > 0 {
		return set
	}
	return guestnet.Resolvers(lastResort())
}
