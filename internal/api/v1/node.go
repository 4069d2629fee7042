package v1

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) listNodes(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListNodes(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, nodeToWire))
}

func (s *server) getNode(w http.ResponseWriter, r *http.Request) error {
	n, err := s.control.GetNode(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, nodeToWire(n))
}

func (s *server) updateNode(w http.ResponseWriter, r *http.Request) error {
	var body client.UpdateNode
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	n, err := s.control.UpdateNode(r.Context(), r.PathValue("id"), control.NodeChange{
		Labels: body.Labels, AddTaints: each(body.AddTaints, taintFromWire), RemoveTaints: each(body.RemoveTaints, taintFromWire),
		Cordoned: body.Cordoned, Reason: body.Reason,
	})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, nodeToWire(n))
}

func taintFromWire(t client.Taint) sandbox.Taint {
	return sandbox.Taint{Key: t.Key, Value: t.Value, Effect: sandbox.TaintEffect(t.Effect)}
}

func taintToWire(t sandbox.Taint) client.Taint {
	return client.Taint{Key: t.Key, Value: t.Value, Effect: string(t.Effect)}
}

func nodeToWire(n control.Node) client.Node {
	w := client.Node{
		ID: string(n.ID), Name: n.Name, State: string(n.State), Version: n.Version, Architecture: n.Architecture,
		Kernel: n.Kernel, Engines: n.Engines, Labels: n.Labels, Capacity: resourcesToWire(n.Capacity),
		Allocated: resourcesToWire(n.Allocated), Sandboxes: n.Sandboxes, Warm: n.Warm, Creating: n.Creating,
		RegisteredAt: n.RegisteredAt, LastSeenAt: n.LastSeenAt, StateAt: n.StateAt.UTC(),
		OwnLabels: n.Settings.Labels, Cordoned: n.Settings.Cordoned, CordonReason: n.Settings.Reason, Failures: n.Failures,
		Taints: each(n.Settings.Taints, taintToWire),
	}
	if w.Engines == nil {
		w.Engines = []string{}
	}
	return w
}
