package e2b

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	maxPage = 100
	// maxFilters bounds the metadata that one list asks for.
	maxFilters = 64
)

// list is the present list: pages, the newest first.
func (s *server) list(w http.ResponseWriter, r *http.Request) error {
	q, err := listQuery(r)
	if err != nil {
		return err
	}
	page, err := s.control.List(r.Context(), q)
	if err != nil {
		return err
	}
	if page.Next != "" {
		w.Header().Set("X-Next-Token", page.Next)
	}
	if slices.Contains(q.States, sandbox.StateRunning) {
		w.Header().Set("X-Total-Running", strconv.Itoa(page.Running))
	}
	return exchange.JSON(w, http.StatusOK, listToWire(page.Sandboxes))
}

// listOld is the older list: all that run, at once.
func (s *server) listOld(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	metadata, err := parseMetadata(values.Get("metadata"))
	if err != nil {
		return err
	}
	q := control.ListQuery{States: wireStates["running"], Metadata: metadata, Limit: control.MaxPage}
	var all []sandbox.Sandbox
	for {
		page, err := s.control.List(r.Context(), q)
		if err != nil {
			return err
		}
		all = append(all, page.Sandboxes...)
		if q.Next = page.Next; q.Next == "" {
			return exchange.JSON(w, http.StatusOK, listToWire(all))
		}
	}
}

func listToWire(boxes []sandbox.Sandbox) []listedWire {
	out := make([]listedWire, 0, len(boxes))
	for _, b := range boxes {
		out = append(out, listedToWire(b))
	}
	return out
}

// wireStates says which states a client means by the contract's two; it is the inverse of stateToWire.
//
//nolint:gochecknoglobals // a table, never written
var wireStates = map[string][]sandbox.State{
	"running": {sandbox.StateRunning, sandbox.StateCreating, sandbox.StatePausing, sandbox.StateMigrating},
	"paused":  {sandbox.StatePaused, sandbox.StateResuming},
}

func listQuery(r *http.Request) (control.ListQuery, error) {
	values, err := exchange.Query(r)
	if err != nil {
		return control.ListQuery{}, err
	}
	q := control.ListQuery{Template: values.Get("template"), Next: values.Get("nextToken")}
	if q.States, err = parseStates(values["state"]); err != nil {
		return control.ListQuery{}, err
	}
	if q.Metadata, err = parseMetadata(values.Get("metadata")); err != nil {
		return control.ListQuery{}, err
	}
	limit, err := exchange.Int(values, "limit", 1, maxPage, maxPage)
	if err != nil {
		return control.ListQuery{}, err
	}
	q.Limit = int(limit)
	if q.StartedAfter, err = exchange.Time(values, "startedAfter"); err != nil {
		return control.ListQuery{}, err
	}
	switch order := values.Get("order"); order {
	case "", "desc":
	case "asc":
		q.OldestFirst = true
	default:
		return control.ListQuery{}, sandbox.Invalidf("order %.20q: want asc or desc", order)
	}
	return q, nil
}

// parseStates reads a comma list, or several; none means both states.
func parseStates(values []string) ([]sandbox.State, error) {
	var out []sandbox.State
	for name := range strings.SplitSeq(strings.Join(values, ","), ",") {
		if name == "" {
			continue
		}
		states, ok := wireStates[name]
		if !ok {
			return nil, sandbox.Invalidf("state %.20q: want running, paused, or both with a comma", name)
		}
		out = append(out, states...)
	}
	if len(out) == 0 {
		out = append(slices.Clone(wireStates["running"]), wireStates["paused"]...)
	}
	return out, nil
}

// parseMetadata reads a filter that is left after the query itself was decoded: clients escape each key and value, join
// them as a query string, which escapes them again, and put that into the query, which escapes it once more.
func parseMetadata(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	pairs, err := url.ParseQuery(text)
	if err != nil {
		return nil, badMetadata(text, err)
	}
	if len(pairs) > maxFilters {
		return nil, sandbox.Invalidf("metadata filter has %d keys: want at most %d", len(pairs), maxFilters)
	}
	out := make(map[string]string, len(pairs))
	for k, values := range pairs {
		if len(values) != 1 {
			return nil, sandbox.Invalidf("metadata filter has the key %.40q %d times: want it once", k, len(values))
		}
		key, err := url.PathUnescape(k)
		if err != nil {
			return nil, badMetadata(text, err)
		}
		if out[key], err = url.PathUnescape(values[0]); err != nil {
			return nil, badMetadata(text, err)
		}
	}
	return out, nil
}

func badMetadata(text string, err error) error {
	return sandbox.Invalidf("metadata filter %.80q: want key=value&key=value with keys and values URL-encoded: %v", text, err)
}
