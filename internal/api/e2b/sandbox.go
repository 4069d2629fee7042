package e2b

import (
	"net/http"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The timeouts of requests that name none, in seconds: the contract's.
const (
	defaultTimeout    = 300
	defaultTimeoutOld = 15
)

// allTraffic denied is the contract's other way to forbid the internet.
const allTraffic = "0.0.0.0/0"

// createSecured is the present create: the agent inside always demands a token.
func (s *server) createSecured(w http.ResponseWriter, r *http.Request) error {
	return s.create(w, r, defaultTimeout, true)
}

func (s *server) createOld(w http.ResponseWriter, r *http.Request) error {
	return s.create(w, r, defaultTimeoutOld, false)
}

func (s *server) create(w http.ResponseWriter, r *http.Request, timeout int64, secure bool) error {
	var body newSandbox
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	req, err := body.request(timeout, secure)
	if err != nil {
		return err
	}
	req.IdempotencyKey = r.Header.Get("Idempotency-Key")
	box, err := s.control.Create(r.Context(), req)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusCreated, s.sandboxToWire(box))
}

// request reads what is asked for, and refuses what this version would not do.
func (n *newSandbox) request(timeout int64, secure bool) (control.CreateRequest, error) {
	if n.TemplateID == "" {
		return control.CreateRequest{}, sandbox.Invalidf("templateID is missing: want the name or id of a template, as in base")
	}
	if n.Timeout != nil {
		timeout = *n.Timeout
	}
	life, err := exchange.Seconds("timeout", timeout)
	if err != nil {
		return control.CreateRequest{}, err
	}
	if life < time.Second { // also: -1 means something else to control
		return control.CreateRequest{}, sandbox.Invalidf("timeout %d: want at least 1 second", timeout)
	}
	if n.AutoPauseMemory != nil && !*n.AutoPauseMemory && n.AutoResume.Enabled {
		return control.CreateRequest{}, sandbox.Invalidf("autoPauseMemory false cannot be combined with autoResume: " +
			"a sandbox that is saved without its memory is resumed by a request alone")
	}
	if err := n.checkSupported(); err != nil {
		return control.CreateRequest{}, err
	}
	internet := n.AllowInternetAccess == nil || *n.AllowInternetAccess
	if len(n.Network.DenyOut) > 0 {
		internet = false
	}
	return control.CreateRequest{
		Template: n.TemplateID, Metadata: n.Metadata, Env: n.EnvVars, Timeout: life,
		Secure: secure || n.Secure, AllowInternet: internet, AutoPause: n.AutoPause, AutoPauseKind: kind(n.AutoPauseMemory),
		AutoResume: n.AutoResume.Enabled, IdleTimeout: n.IdleTimeout,
	}, nil
}

func (n *newSandbox) checkSupported() error {
	switch {
	case len(n.VolumeMounts) > 0:
		return notSupported("volumeMounts: mounting volumes")
	case len(n.IAM.Tokens) > 0:
		return notSupported("iam: workload identity")
	}
	return n.Network.checkSupported()
}

func (n *network) checkSupported() error {
	// With everything denied and nothing allowed, denyOut says the same as allow_internet_access false.
	denyAll := len(n.AllowOut) == 0 && slices.Equal(n.DenyOut, []string{allTraffic})
	switch {
	case len(n.AllowOut) > 0, len(n.DenyOut) > 0 && !denyAll:
		return notSupported("network: rules for single destinations")
	case len(n.Rules) > 0:
		return notSupported("network.rules: transforming requests")
	case len(n.EgressProxy) > 0:
		return notSupported("network.egressProxy: a proxy for egress")
	case n.AllowPublicTraffic != nil && !*n.AllowPublicTraffic:
		return notSupported("network.allowPublicTraffic: closing a sandbox's ports to the public")
	case n.MaskRequestHost != "":
		return notSupported("network.maskRequestHost: another Host for the sandbox")
	case len(n.HTTPSPorts) > 0:
		return notSupported("network.httpsPorts: HTTPS inside the sandbox")
	}
	return nil
}

func notSupported(what string) error {
	return sandbox.Unsupportedf("%s is not supported by this version", what)
}

func (s *server) get(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	box, err := s.control.Get(r.Context(), id)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, s.detailToWire(box))
}

func (s *server) kill(w http.ResponseWriter, r *http.Request) error {
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if err := s.control.Kill(r.Context(), id); err != nil {
		return err
	}
	return exchange.Empty(w)
}
