package v1

import (
	_ "embed"
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
)

// openAPI describes every route below; a test holds the two together.
//
//go:embed openapi.json
var openAPI []byte

// server holds what the handlers share.
type server struct{ control *control.Control }

// Routes returns the API's operations.
func Routes(c *control.Control) []exchange.Route {
	s := &server{control: c}
	return []exchange.Route{
		{Method: "GET", Path: "/v1/openapi.json", Handle: serveOpenAPI},
		{Method: "GET", Path: "/v1/status", Handle: s.status},
		{Method: "GET", Path: "/v1/nodes", Handle: s.listNodes},
		{Method: "GET", Path: "/v1/nodes/{id}", Handle: s.getNode},
		{Method: "PATCH", Path: "/v1/nodes/{id}", Handle: s.updateNode},
		{Method: "DELETE", Path: "/v1/nodes/{id}", Handle: s.removeNode},
		{Method: "POST", Path: "/v1/nodes/{id}/drain", Handle: s.drainNode},
		{Method: "GET", Path: "/v1/proxies", Handle: s.listProxies},
		{Method: "DELETE", Path: "/v1/proxies/{id}", Handle: s.removeProxy},
		{Method: "GET", Path: "/v1/scheduler", Handle: s.getScheduler},
		{Method: "PUT", Path: "/v1/scheduler", Handle: s.setScheduler},
		{Method: "DELETE", Path: "/v1/scheduler", Handle: s.resetScheduler},
		{Method: "POST", Path: "/v1/schedule/explain", Handle: s.explainSchedule},
		{Method: "GET", Path: "/v1/sandboxes", Handle: s.listSandboxes},
		{Method: "POST", Path: "/v1/sandboxes", Handle: s.createSandbox},
		{Method: "GET", Path: "/v1/sandboxes/{id}", Handle: s.getSandbox},
		{Method: "DELETE", Path: "/v1/sandboxes/{id}", Handle: s.killSandbox},
		{Method: "POST", Path: "/v1/sandboxes/{id}/timeout", Handle: s.setTimeout},
		{Method: "POST", Path: "/v1/sandboxes/{id}/pause", Handle: s.pauseSandbox},
		{Method: "POST", Path: "/v1/sandboxes/{id}/resume", Handle: s.resumeSandbox},
		{Method: "POST", Path: "/v1/sandboxes/{id}/snapshots", Handle: s.createSnapshot},
		{Method: "POST", Path: "/v1/sandboxes/{id}/fork", Handle: s.forkSandbox},
		{Method: "POST", Path: "/v1/sandboxes/{id}/rollback", Handle: s.rollbackSandbox},
		{Method: "GET", Path: "/v1/sandboxes/{id}/logs", Handle: s.logs},
		{Method: "GET", Path: "/v1/sandboxes/{id}/metrics", Handle: s.metrics},
		{Method: "GET", Path: "/v1/snapshots", Handle: s.listSnapshots},
		{Method: "DELETE", Path: "/v1/snapshots/{id}", Handle: s.deleteSnapshot},
		{Method: "GET", Path: "/v1/templates", Handle: s.listTemplates},
		{Method: "POST", Path: "/v1/templates", Handle: s.buildTemplate},
		{Method: "GET", Path: "/v1/templates/{id}", Handle: s.getTemplate},
		{Method: "DELETE", Path: "/v1/templates/{id}", Handle: s.deleteTemplate},
		{Method: "PATCH", Path: "/v1/templates/{id}", Handle: s.updateTemplate},
		{Method: "PUT", Path: "/v1/templates/{id}/tags", Handle: s.setTags},
		{Method: "DELETE", Path: "/v1/templates/{id}/tags/{tag}", Handle: s.removeTag},
		{Method: "POST", Path: "/v1/templates/{id}/push", Handle: s.pushTemplate},
		{Method: "GET", Path: "/v1/builds/{id}", Handle: s.getBuild},
		{Method: "DELETE", Path: "/v1/builds/{id}", Handle: s.cancelBuild},
		{Method: "GET", Path: "/v1/files/{hash}", Handle: s.getFile},
		{Method: "PUT", Path: "/v1/files/{hash}", Handle: s.putFile},
		{Method: "GET", Path: "/v1/keys", Handle: s.listKeys},
		{Method: "POST", Path: "/v1/keys", Handle: s.createKey},
		{Method: "DELETE", Path: "/v1/keys/{id}", Handle: s.revokeKey},
		{Method: "GET", Path: "/v1/tokens", Handle: s.listTokens},
		{Method: "POST", Path: "/v1/tokens", Handle: s.createToken},
		{Method: "DELETE", Path: "/v1/tokens/{id}", Handle: s.revokeToken},
		{Method: "GET", Path: "/v1/members", Handle: s.listMembers},
		{Method: "GET", Path: "/v1/events", Handle: s.events},
	}
}

func serveOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	return exchange.Bytes(w, http.StatusOK, "application/json", openAPI)
}
