package e2b

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

type snapshotWire struct {
	SnapshotID string   `json:"snapshotID"`
	Names      []string `json:"names"`
}

func snapshotToWire(s control.Snapshot) snapshotWire {
	return snapshotWire{SnapshotID: s.ID(), Names: s.Names()}
}

func (s *server) createSnapshot(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Name string `json:"name"`
	}
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	made, err := s.control.CreateSnapshot(r.Context(), id, control.SnapshotRequest{Name: body.Name})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusCreated, snapshotToWire(made))
}

func (s *server) listSnapshots(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	q := control.SnapshotQuery{Name: values.Get("name"), Next: values.Get("nextToken")}
	if id := values.Get("sandboxID"); id != "" {
		if q.SandboxID, err = sandbox.ParseID(id); err != nil {
			return err
		}
	}
	limit, err := exchange.Int(values, "limit", 1, maxPage, maxPage)
	if err != nil {
		return err
	}
	q.Limit = int(limit)
	page, next, err := s.control.ListSnapshots(r.Context(), q)
	if err != nil {
		return err
	}
	if next != "" {
		w.Header().Set("X-Next-Token", next)
	}
	out := make([]snapshotWire, 0, len(page))
	for _, snap := range page {
		out = append(out, snapshotToWire(snap))
	}
	return exchange.JSON(w, http.StatusOK, out)
}
