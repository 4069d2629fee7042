package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem/filesystemconnect"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
)

// Limits of what one request may hold in memory.
const (
	maxMessageBytes = 16 << 20
	maxInitBytes    = 8 << 20
	maxRequestBytes = 1 << 20
)

// neverCompress is a size that no message has: compressed requests are understood, but for answers the sandbox's
// processor is worth more than the network between two processes of one machine.
const neverCompress = 1 << 30

const (
	headerTimeout   = 30 * time.Second
	shutdownTimeout = 2 * time.Second
)

// Config says how the agent runs. The zero value listens on every address and acts as the default user.
type Config struct {
	// Addr is the address to listen on; empty means every address, DefaultPort.
	Addr string
	// Env is the environment that every process inherits, below the settings and the request's own.
	Env []string
	// Root is the directory in which etc and run are found; empty means /.
	Root string
	// DefaultUser is whom requests without a user act as; empty means "user". /init may replace it.
	DefaultUser string
	// Init says that the agent is process 1 of a machine of its own: it collects orphans, and sets host name and clock.
	Init bool
	// Log receives what the agent's own log holds, too; nil means nowhere else.
	Log slog.Handler
}

// Server is one agent.
type Server struct {
	cfg      Config
	log      *slog.Logger
	ring     *ring
	settings *settingsBox
	users    *users
	reaper   *reaper
	procs    *processes
	watchers *watchers
	cpu      cpuMeter
	rest     rest
	handler  http.Handler
}

// New returns an agent that does nothing until it is run.
func New(cfg Config) *Server {
	if cfg.Addr == "" {
		cfg.Addr = ":" + strconv.Itoa(DefaultPort)
	}
	if cfg.Root == "" {
		cfg.Root = "/"
	}
	if cfg.DefaultUser == "" {
		cfg.DefaultUser = "user"
	}
	s := &Server{cfg: cfg, ring: &ring{next: cfg.Log}}
	s.log = slog.New(s.ring)
	s.settings = newSettingsBox(cfg.DefaultUser)
	s.users = &users{root: cfg.Root}
	s.reaper = newReaper(cfg.Init)
	s.procs = newProcesses(s.reaper, s.log)
	s.watchers = &watchers{byID: map[string]*pollWatcher{}}
	s.handler = s.routes()
	return s
}

// Run listens and serves until ctx ends, then kills what it started.
func Run(ctx context.Context, cfg Config) error {
	s := New(cfg)
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", s.cfg.Addr)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", s.cfg.Addr, err)
	}
	return s.Serve(ctx, ln)
}

// Serve answers on ln until ctx ends, then closes it, kills what it started and returns.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reaped := make(chan struct{})
	reapCtx, stopReaper := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer close(reaped)
		s.reaper.run(reapCtx)
	}()
	defer func() {
		s.rest.stop()
		s.procs.killAll()
		stopReaper()
		<-reaped
	}()
	srv := s.httpServer(ctx)
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	s.log.LogAttrs(ctx, slog.LevelInfo, "agent ready", slog.String("addr", ln.Addr().String()), slog.String("version", Version))
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	cancel()
	return s.shutdown(srv, failed)
}

func (s *Server) shutdown(srv *http.Server, failed <-chan error) error {
	ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	s.watchers.closeAll()
	if err := srv.Shutdown(ctx); err != nil {
		_ = srv.Close()
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

func (s *Server) httpServer(ctx context.Context) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           s.handler,
		Protocols:         &protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 4096, MaxReceiveBufferPerConnection: 4 << 20, MaxReceiveBufferPerStream: 1 << 20},
		ReadHeaderTimeout: headerTimeout,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.ring, slog.LevelDebug),
	}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	options := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxMessageBytes),
		connect.WithCompressMinBytes(neverCompress),
	}
	mux.Handle(processconnect.NewProcessHandler(&processService{s}, options...))
	mux.Handle(filesystemconnect.NewFilesystemHandler(&filesystemService{s}, options...))
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /files", s.getFiles)
	mux.HandleFunc("POST /files", s.postFiles)
	mux.HandleFunc("POST /files/compose", s.postCompose)
	mux.HandleFunc("POST /init", s.postInit)
	mux.HandleFunc("POST /copy", s.postCopy)
	mux.HandleFunc("POST /accounts", s.postAccounts)
	mux.HandleFunc("GET /envs", s.getEnvs)
	mux.HandleFunc("GET /metrics", s.getMetrics)
	mux.HandleFunc("GET /logs", s.getLogs)
	mux.HandleFunc("GET /loopback", s.getLoopback)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, httpErrorf(http.StatusNotFound, "no such route: %s %s", r.Method, r.URL.Path))
	})
	return s.rest.around(allowOrigins(s.requireToken(mux)))
}
