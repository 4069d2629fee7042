package proxy

import (
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The headers by which a client names a sandbox where the host name cannot.
const (
	headerSandboxID   = "E2b-Sandbox-Id"
	headerSandboxPort = "E2b-Sandbox-Port"
)

// Limits of what a signed file URL may carry.
const (
	maxSignedField = 4096
	maxSignature   = 256
)

// form is the way in which a request names its sandbox.
type form string

const (
	formHost      form = "host"
	formHeader    form = "header"
	formPath      form = "path"
	formSignature form = "signature"
	formOwn       form = "own" // a question to the proxy itself
)

// head is what routing reads of a request's head.
type head struct {
	method string
	host   string // as sent, with or without a port
	path   string // escaped as sent, beginning with "/"
	query  string
	ids    []string // the values of E2b-Sandbox-Id
	ports  []string // the values of E2b-Sandbox-Port
	// preflightMethod is the method that a CORS preflight asks about.
	preflightMethod string
	fields          fields
}

// fields are the header fields of a request.
type fields interface {
	// Get returns the first value of a field by its canonical name, or nothing.
	Get(name string) string
}

// headOf returns the head of r. A request target that is not a path is ErrInvalid.
func headOf(r *http.Request) (head, error) {
	escaped := r.URL.EscapedPath()
	if r.URL.Opaque != "" || !strings.HasPrefix(escaped, "/") {
		return head{}, sandbox.Invalidf("request target %.80q: want a path that begins with /", r.RequestURI)
	}
	h := head{
		method: r.Method, host: r.Host, path: escaped, query: r.URL.RawQuery,
		ids: r.Header.Values(headerSandboxID), ports: r.Header.Values(headerSandboxPort), fields: r.Header,
	}
	if r.Method == http.MethodOptions {
		h.preflightMethod = r.Header.Get("Access-Control-Request-Method")
	}
	return h, nil
}

// target is where a request wants to go.
type target struct {
	form form
	id   sandbox.ID // empty for formSignature
	port uint16
	// path is what the guest sees, escaped; prefix is what was taken off its front.
	path, prefix string
	signed       signedURL // for formSignature
}

// signedURL is what a signed file URL says.
type signedURL struct{ path, op, user, signature, expiration string }

// rules says which names are the proxy's own. It is never written after newRules.
type rules struct {
	domain string
	public map[string]bool
}

func newRules(domain string, publicHosts []string) rules {
	r := rules{domain: hostname(domain), public: make(map[string]bool, len(publicHosts))}
	for _, h := range publicHosts {
		r.public[hostname(h)] = true
	}
	return r
}

// parse finds out where a request wants to go. It looks at the host name first, then, only where the host name is shared
// by all sandboxes, at the headers, then at the path. Errors: ErrInvalid.
func (ru rules) parse(h head) (target, error) {
	name := hostname(h.host)
	if !ru.shared(name) {
		if t, ok, err := ru.fromLabel(name, h.path); ok || err != nil {
			return t, err
		}
	} else if t, ok, err := fromHeaders(h); ok || err != nil {
		return t, err
	}
	if t, ok, err := fromPath(h.path); ok || err != nil {
		return t, err
	}
	if !ru.shared(name) {
		return target{}, sandbox.Invalidf("host %.80q names no sandbox: want <port>-<sandbox id>.%s, or the path /sandbox/<sandbox id>/<port>/", h.host, ru.domainOr("<domain>"))
	}
	switch h.path {
	case "/healthz", "/readyz":
		return target{form: formOwn, path: h.path}, nil
	case "/files":
		return fromSignature(h)
	}
	return target{}, sandbox.Invalidf("the request names no sandbox: send %s and %s, or use the path /sandbox/<sandbox id>/<port>/", headerSandboxID, headerSandboxPort)
}

func (ru rules) domainOr(otherwise string) string {
	if ru.domain == "" {
		return otherwise
	}
	return ru.domain
}

// shared reports whether a host name belongs to all sandboxes, so that something else must name the one.
func (ru rules) shared(name string) bool {
	if name == "localhost" || ru.public[name] {
		return true
	}
	if rest, ok := strings.CutPrefix(name, "sandbox."); ok && rest != "" {
		return true
	}
	_, err := netip.ParseAddr(name)
	return err == nil
}

// fromLabel reads <port>-<id>[-anything].<domain>. Names of another shape are not ok; those of the shape with an
// impossible port or id are ErrInvalid.
func (ru rules) fromLabel(name, path string) (target, bool, error) {
	first, domain, ok := strings.Cut(name, ".")
	if !ok || domain == "" || (ru.domain != "" && domain != ru.domain) {
		return target{}, false, nil
	}
	portText, rest, ok := strings.Cut(first, "-")
	if !ok || !digits(portText) {
		return target{}, false, nil
	}
	idText, _, _ := strings.Cut(rest, "-")
	port, err := parsePort(portText)
	if err != nil {
		return target{}, false, err
	}
	id, err := sandbox.ParseID(idText)
	if err != nil {
		return target{}, false, err
	}
	return target{form: formHost, id: id, port: port, path: path}, true, nil
}

// fromHeaders reads the routing headers. Without either it is not ok.
func fromHeaders(h head) (target, bool, error) {
	idText, err := single(headerSandboxID, h.ids)
	if err != nil {
		return target{}, false, err
	}
	portText, err := single(headerSandboxPort, h.ports)
	if err != nil {
		return target{}, false, err
	}
	if idText == "" && portText == "" {
		return target{}, false, nil
	}
	if idText == "" {
		return target{}, false, sandbox.Invalidf("header %s is missing beside %s", headerSandboxID, headerSandboxPort)
	}
	t := target{form: formHeader, port: GuestAgentPort, path: h.path}
	if portText != "" {
		if t.port, err = parsePort(portText); err != nil {
			return target{}, false, err
		}
	}
	if t.id, err = parseLongID(idText); err != nil {
		return target{}, false, err
	}
	return t, true, nil
}

// single returns the value of a header that may be sent once. Two that differ would let two readers see two sandboxes.
func single(name string, values []string) (string, error) {
	switch len(values) {
	case 0:
		return "", nil
	case 1:
		return values[0], nil
	}
	return "", sandbox.Invalidf("header %s is sent %d times: want once", name, len(values))
}

// fromPath reads /sandbox/<id>/<port>/... Other paths are not ok.
func fromPath(path string) (target, bool, error) {
	rest, ok := strings.CutPrefix(path, "/sandbox/")
	if !ok {
		return target{}, false, nil
	}
	idText, rest, _ := strings.Cut(rest, "/")
	portText, _, _ := strings.Cut(rest, "/")
	id, err := parseLongID(idText)
	if err != nil {
		return target{}, false, err
	}
	port, err := parsePort(portText)
	if err != nil {
		return target{}, false, err
	}
	prefix := path[:len("/sandbox/")+len(idText)+len("/")+len(portText)]
	t := target{form: formPath, id: id, port: port, prefix: prefix, path: path[len(prefix):]}
	if t.path == "" {
		t.path = "/"
	}
	return t, true, nil
}

// fromSignature reads a signed file URL, which names its sandbox only by the token that signed it.
func fromSignature(h head) (target, error) {
	q, err := url.ParseQuery(h.query)
	if err != nil || q.Get("signature") == "" {
		return target{}, sandbox.Invalidf("/files without a sandbox: send %s, or a signed URL, whose signature tells the sandbox", headerSandboxID)
	}
	s := signedURL{path: q.Get("path"), op: "read", user: q.Get("username"), signature: q.Get("signature"), expiration: q.Get("signature_expiration")}
	method := h.method
	if h.preflightMethod != "" {
		method = h.preflightMethod
	}
	if method != http.MethodGet && method != http.MethodHead {
		s.op = "write"
	}
	if len(s.signature) > maxSignature || len(s.path)+len(s.user)+len(s.expiration) > maxSignedField {
		return target{}, sandbox.Invalidf("signed URL: the signature may have %d bytes and the other fields %d", maxSignature, maxSignedField)
	}
	return target{form: formSignature, port: GuestAgentPort, path: h.path, signed: s}, nil
}

// parseLongID reads a sandbox id, or one followed by "-" and the id of a client, as old clients send.
func parseLongID(s string) (sandbox.ID, error) {
	short, client, long := strings.Cut(s, "-")
	if long {
		if _, err := sandbox.ParseID(client); err != nil {
			return "", sandbox.Invalidf("sandbox id %.80q: want characters of a-z and 0-9", s)
		}
	}
	return sandbox.ParseID(short)
}

// parsePort reads a TCP port.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || len(s) > 5 {
		return 0, sandbox.Invalidf("port %.20q: want a number from 1 to 65535", s)
	}
	return uint16(n), nil
}

func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// hostname returns the name in a Host value: lower case, without port, brackets and the dot of a rooted name.
func hostname(host string) string {
	if in, ok := strings.CutPrefix(host, "["); ok {
		host, _, _ = strings.Cut(in, "]")
	} else if strings.Count(host, ":") == 1 {
		host, _, _ = strings.Cut(host, ":")
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}
