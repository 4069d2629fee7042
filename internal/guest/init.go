package guest

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// clockTolerance is how far the clock may be off before it is set.
const clockTolerance = 500 * time.Millisecond

// sandboxIDVariable tells processes, and us, which sandbox this is.
const sandboxIDVariable = "E2B_SANDBOX_ID"

// hostsMark ends the lines of /etc/hosts that are ours to replace.
const hostsMark = "# set by the agent"

// initRequest is the body of POST /init. Unknown fields are ignored, absent ones change nothing.
type initRequest struct {
	AccessToken    *string           `json:"accessToken"`
	EnvVars        map[string]string `json:"envVars"`
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir string            `json:"defaultWorkdir"`
	Timestamp      string            `json:"timestamp"`
	CABundle       string            `json:"caBundle"`
	VolumeMounts   []volumeMount     `json:"volumeMounts"`
	Hostname       string            `json:"hostname"`
	Resolvers      []string          `json:"resolvers"`
	// Hosts maps names to addresses for /etc/hosts.
	Hosts      map[string]string `json:"hosts"`
	SandboxID  string            `json:"sandboxId"`
	TemplateID string            `json:"templateId"`
}

// volumeMount is a directory that the node attaches from outside; the agent only sees to it that it exists.
type volumeMount struct {
	Path string `json:"path"`
}

func (s *Server) postInit(w http.ResponseWriter, r *http.Request) {
	var req initRequest
	if err := decodeJSON(w, r, maxInitBytes, &req); err != nil {
		writeError(w, err)
		return
	}
	if err := req.validate(); err != nil {
		writeError(w, httpErrorf(http.StatusBadRequest, "%v", err))
		return
	}
	before := ""
	err := s.settings.update(func(next *settings) error {
		before = next.env[sandboxIDVariable]
		return req.apply(next, r.Header.Get(tokenHeader))
	})
	if err != nil {
		writeError(w, err)
		return
	}
	if before != "" && req.SandboxID != "" && req.SandboxID != before {
		s.forgetPast()
	}
	s.configureMachine(r, &req)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

// forgetPast drops what was said and what has ended in the sandbox that this one is a copy of: it is not this one's past, and
// may be somebody else's. What runs goes on.
func (s *Server) forgetPast() {
	s.ring.clear()
	s.procs.forgetEnded()
}

// validate refuses what cannot be stored in an environment or a configuration file.
func (q *initRequest) validate() error {
	for name, value := range q.EnvVars {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return fmt.Errorf("environment variable %q: a name has no '=', neither name nor value a zero byte", name)
		}
	}
	for _, text := range []string{q.Hostname, q.SandboxID, q.TemplateID, q.DefaultUser} {
		if strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c == 0x7f }) || len(text) > 253 {
			return fmt.Errorf("%q: a host name, user or id has at most 253 bytes and no spaces or control characters", text)
		}
	}
	for _, address := range append(slices.Collect(maps.Values(q.Hosts)), q.Resolvers...) {
		if _, err := netip.ParseAddr(address); err != nil {
			return fmt.Errorf("resolver or host address: %w", err)
		}
	}
	for name := range q.Hosts {
		if name == "" || strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c == '#' || c == 0x7f }) {
			return fmt.Errorf("host name %q contains spaces or control characters", name)
		}
	}
	if q.Timestamp != "" {
		if _, err := time.Parse(time.RFC3339Nano, q.Timestamp); err != nil {
			return fmt.Errorf("timestamp: %w", err)
		}
	}
	return nil
}

// apply changes the settings if the caller may: the first token is anybody's to set, later calls must know it.
func (q *initRequest) apply(next *settings, header string) error {
	if next.token != "" && !sameSecret(header, next.token) && (q.AccessToken == nil || !sameSecret(*q.AccessToken, next.token)) {
		return httpErrorf(http.StatusUnauthorized, "the access token is missing or does not match the one that is set")
	}
	if q.AccessToken != nil && *q.AccessToken != "" {
		next.token = *q.AccessToken
	}
	maps.Copy(next.env, q.EnvVars)
	if q.SandboxID != "" {
		next.env[sandboxIDVariable] = q.SandboxID
	}
	if q.TemplateID != "" {
		next.env["E2B_TEMPLATE_ID"] = q.TemplateID
	}
	if q.DefaultUser != "" {
		next.user = q.DefaultUser
	}
	if q.DefaultWorkdir != "" {
		next.workdir = q.DefaultWorkdir
	}
	return nil
}

// configureMachine does the part of /init that is outside the agent. What does not work is logged and left: a sandbox
// without the right host name is of more use than none.
func (s *Server) configureMachine(r *http.Request, q *initRequest) {
	try := func(what string, err error) {
		if err != nil {
			s.log.LogAttrs(r.Context(), slog.LevelWarn, "settings not applied in full", slog.String("op", what), slog.Any("err", err))
		}
	}
	if q.Timestamp != "" && s.cfg.Init {
		try("set the clock", setClock(q.Timestamp))
	}
	if q.Hostname != "" {
		if s.cfg.Init {
			try("set the host name", unix.Sethostname([]byte(q.Hostname)))
		}
		try("write the host name", s.writeFile("etc/hostname", q.Hostname+"\n"))
	}
	if q.Hostname != "" || len(q.Hosts) > 0 {
		try("write hosts", s.writeHosts(q.Hostname, q.Hosts))
	}
	if len(q.Resolvers) > 0 {
		try("write resolvers", s.writeFile("etc/resolv.conf", "nameserver "+strings.Join(q.Resolvers, "\nnameserver ")+"\n"))
	}
	if q.EnvVars["PATH"] != "" {
		try("write the search path", s.writePath(q.EnvVars["PATH"]))
	}
	try("write identity", s.writeIdentity(q))
	if q.CABundle != "" {
		try("install certificates", s.installCertificates(q.CABundle))
	}
	for _, v := range q.VolumeMounts {
		if filepath.IsAbs(v.Path) {
			try("make the directory of a volume", os.MkdirAll(filepath.Join(s.cfg.Root, v.Path), 0o755)) //nolint:gosec // A directory that every user may enter.
		}
	}
}

// writeFile replaces a small file below the root unless it already has the content.
func (s *Server) writeFile(name, content string) error {
	path := filepath.Join(s.cfg.Root, name)
	if old, err := os.ReadFile(path); err == nil && string(old) == content { //nolint:gosec // One of a few fixed names.
		return nil
	}
	err := os.WriteFile(path, []byte(content), 0o644) //nolint:gosec // Every process reads these files.
	if errors.Is(err, os.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil { //nolint:gosec // As above.
			err = os.WriteFile(path, []byte(content), 0o644) //nolint:gosec // As above.
		}
	}
	return err
}

// pathFile is read by the login shells that the SDKs run commands in, after they have set a search path of their own.
const pathFile = "etc/profile.d/sandbox-path.sh"

// writePath lets login shells keep the search path that the template says. The usual one is left to them.
func (s *Server) writePath(path string) error {
	if path == defaultPath {
		if _, err := os.Lstat(filepath.Join(s.cfg.Root, pathFile)); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	return s.writeFile(pathFile, "export PATH='"+strings.ReplaceAll(path, "'", `'\''`)+"'\n")
}

// writeIdentity leaves who this sandbox is where programs look for it.
func (s *Server) writeIdentity(q *initRequest) error {
	err := s.writeFile("run/e2b/.E2B_SANDBOX", "true")
	if q.SandboxID != "" {
		err = errors.Join(err, s.writeFile("run/e2b/.E2B_SANDBOX_ID", q.SandboxID))
	}
	if q.TemplateID != "" {
		err = errors.Join(err, s.writeFile("run/e2b/.E2B_TEMPLATE_ID", q.TemplateID))
	}
	return err
}

// writeHosts puts our own lines at the end of /etc/hosts and leaves those of others alone.
func (s *Server) writeHosts(hostname string, extra map[string]string) error {
	old, err := os.ReadFile(filepath.Join(s.cfg.Root, "etc/hosts"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return s.writeFile("etc/hosts", hostsFile(string(old), hostname, extra))
}

func hostsFile(old, hostname string, extra map[string]string) string {
	var b strings.Builder
	loopback := false
	for line := range strings.Lines(old) {
		line = strings.TrimRight(line, "\r\n")
		if strings.HasSuffix(line, hostsMark) {
			continue
		}
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "127.0.0.1" && slices.Contains(fields[1:], "localhost") {
			loopback = true
		}
		b.WriteString(line + "\n")
	}
	own := func(address, names string) { b.WriteString(address + "\t" + names + "\t" + hostsMark + "\n") }
	if !loopback {
		own("127.0.0.1", "localhost")
		own("::1", "localhost ip6-localhost ip6-loopback")
	}
	if hostname != "" {
		own("127.0.1.1", hostname)
	}
	for _, name := range slices.Sorted(maps.Keys(extra)) {
		own(extra[name], name)
	}
	return b.String()
}

func setClock(timestamp string) error {
	at, err := time.Parse(time.RFC3339Nano, timestamp)
	if err != nil {
		return err
	}
	if off := time.Since(at); off.Abs() < clockTolerance {
		return nil
	}
	ts := unix.NsecToTimespec(at.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// installCertificates adds PEM certificates to the bundle that the image's programs trust, once.
func (s *Server) installCertificates(pem string) error {
	for _, name := range []string{"etc/ssl/certs/ca-certificates.crt", "etc/pki/tls/certs/ca-bundle.crt", "etc/ssl/cert.pem"} {
		path := filepath.Join(s.cfg.Root, name)
		old, err := os.ReadFile(path) //nolint:gosec // One of the fixed names above.
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if bytes.Contains(old, []byte(strings.TrimSpace(pem))) {
			return nil
		}
		return s.writeFile(name, strings.TrimRight(string(old), "\n")+"\n"+strings.TrimSpace(pem)+"\n")
	}
	return s.writeFile("etc/ssl/certs/ca-certificates.crt", strings.TrimSpace(pem)+"\n")
}

func (s *Server) getEnvs(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, s.settings.get().env)
}
