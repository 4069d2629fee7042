package v1

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) createSnapshot(w http.ResponseWriter, r *http.Request) error {
	var body client.CreateSnapshot
	id, err := sandboxID(r)
	if err != nil {
		return err
	}
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	made, err := s.control.CreateSnapshot(r.Context(), id, control.SnapshotRequest{
		Name: body.Name, Kind: sandbox.CheckpointKind(body.Kind),
	})
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
	q := control.SnapshotQuery{Name: values.Get("name"), Next: values.Get("next")}
	if id := values.Get("sandbox"); id != "" {
		if q.SandboxID, err = sandbox.ParseID(id); err != nil {
			return err
		}
	}
	limit, err := exchange.Int(values, "limit", 1, control.MaxPage, 100)
	if err != nil {
		return err
	}
	q.Limit = int(limit)
	page, next, err := s.control.ListSnapshots(r.Context(), q)
	if err != nil {
		return err
	}
	if next != "" {
		w.Header().Set(client.NextTokenHeader, next)
	}
	return exchange.JSON(w, http.StatusOK, each(page, snapshotToWire))
}

func (s *server) deleteSnapshot(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.DeleteSnapshot(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	return exchange.Empty(w)
}

func snapshotToWire(s control.Snapshot) client.Snapshot {
	return client.Snapshot{
		ID: s.ID(), TemplateID: string(s.Template.ID), BuildID: s.Build.ID, Names: s.Names(), SandboxID: s.Build.Source,
		Kind: string(s.Build.Checkpoint), Bytes: s.Build.CheckpointBytes, Resources: resourcesToWire(s.Build.Resources),
		CreatedAt: s.SavedAt(),
	}
}
