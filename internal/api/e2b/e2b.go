package e2b

import (
	"net/http"
	"strings"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// server holds what the handlers share.
type server struct {
	control *control.Control
	domain  *string
}

// Routes returns the API's operations. domain is what sandboxes' host names end in; clients that are given one use it
// instead of their own, so it is empty where sandboxes are reached through one URL.
func Routes(c *control.Control, domain string) []exchange.Route {
	s := &server{control: c}
	if domain != "" {
		s.domain = &domain
	}
	routes := []exchange.Route{
		{Method: "GET", Path: "/health", Handle: health, Public: true},
		{Method: "POST", Path: "/v2/sandboxes", Handle: s.createSecured},
		{Method: "POST", Path: "/sandboxes", Handle: s.createOld},
		{Method: "POST", Path: "/v2/sandboxes/{id}/connect", Handle: s.connect},
		{Method: "POST", Path: "/sandboxes/{id}/connect", Handle: s.connectOld},
		{Method: "GET", Path: "/v2/sandboxes", Handle: s.list},
		{Method: "GET", Path: "/sandboxes", Handle: s.listOld},
		{Method: "GET", Path: "/sandboxes/metrics", Handle: s.manyMetrics},
		{Method: "GET", Path: "/sandboxes/{id}", Handle: s.get},
		{Method: "DELETE", Path: "/sandboxes/{id}", Handle: s.kill},
		{Method: "POST", Path: "/sandboxes/{id}/timeout", Handle: s.setTimeout},
		{Method: "POST", Path: "/sandboxes/{id}/refreshes", Handle: s.refresh},
		{Method: "POST", Path: "/sandboxes/{id}/pause", Handle: s.pause},
		{Method: "POST", Path: "/sandboxes/{id}/resume", Handle: s.resume},
		{Method: "POST", Path: "/sandboxes/{id}/snapshots", Handle: s.createSnapshot},
		{Method: "GET", Path: "/snapshots", Handle: s.listSnapshots},
		{Method: "POST", Path: "/sandboxes/{id}/fork", Handle: s.fork},
		{Method: "GET", Path: "/sandboxes/{id}/metrics", Handle: s.metrics},
		{Method: "GET", Path: "/sandboxes/{id}/logs", Handle: s.logs},
		{Method: "GET", Path: "/v2/sandboxes/{id}/logs", Handle: s.logsNew},
		{Method: "GET", Path: "/templates", Handle: s.listTemplates},
		{Method: "GET", Path: "/v2/templates", Handle: s.listTemplates},
		{Method: "GET", Path: "/templates/{id}", Handle: s.getTemplate},
		{Method: "DELETE", Path: "/templates/{id}", Handle: s.deleteTemplate},
		{Method: "GET", Path: "/templates/{id}/{part}", Handle: s.templatePart},
		{Method: "POST", Path: "/v3/templates", Handle: s.requestBuild},
		{Method: "POST", Path: "/v2/templates", Handle: s.requestBuild},
		{Method: "PATCH", Path: "/templates/{id}", Handle: s.updateTemplate},
		{Method: "PATCH", Path: "/v2/templates/{id}", Handle: s.updateTemplate},
		{Method: "GET", Path: "/templates/{id}/files/{hash}", Handle: s.uploadLink},
		{Method: "PUT", Path: "/uploads/{hash}", Handle: s.upload, Public: true},
		{Method: "POST", Path: "/v2/templates/{id}/builds/{build}", Handle: s.startBuild},
		{Method: "GET", Path: "/templates/{id}/builds/{build}/status", Handle: s.buildStatusOf},
		{Method: "GET", Path: "/templates/{id}/builds/{build}/logs", Handle: s.buildLogs},
		{Method: "POST", Path: "/templates/tags", Handle: s.assignTags},
		{Method: "DELETE", Path: "/templates/tags", Handle: s.removeTags},
		{Method: "GET", Path: "/teams", Handle: listTeams},
		{Method: "GET", Path: "/nodes", Handle: s.listNodes},
	}
	return append(routes, s.unsupported()...)
}

func health(w http.ResponseWriter, _ *http.Request) error {
	return exchange.Bytes(w, http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
}

// sandboxID reads the id of the path. Older clients append the deprecated client id after a dash.
func sandboxID(r *http.Request) (sandbox.ID, error) {
	text, _, _ := strings.Cut(r.PathValue("id"), "-")
	id, err := sandbox.ParseID(text)
	if err != nil {
		// What can be no id is also not found: clients ask for either in the same way, and expect the same answer.
		return "", sandbox.NotFoundf("sandbox %.80q was not found", r.PathValue("id"))
	}
	return id, nil
}
