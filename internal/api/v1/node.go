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

func (s *server) removeNode(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	force := values.Get("force")
	if force != "" && force != "true" && force != "false" {
		return sandbox.Invalidf("force %.20q: want true or false", force)
	}
	if err := s.control.RemoveNode(r.Context(), r.PathValue("id"), force == "true"); err != nil {
		return err
	}
	return exchange.Empty(w)
}

func (s *server) drainNode(w http.ResponseWriter, r *http.Request) error {
	var body client.DrainNode
	if _, err := exchange.ReadOptional(w, r, &body); err != nil {
		return err
	}
	timeout, err := exchange.Seconds("timeout_seconds", body.TimeoutSeconds)
	if err != nil {
		return err
	}
	n, err := s.control.DrainNode(r.Context(), r.PathValue("id"), control.DrainRequest{
		Timeout: timeout, MaxParallel: body.MaxParallel, Force: body.Force, Reason: body.Reason,
	})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, nodeToWire(n))
}

func drainToWire(p *control.DrainProgress) *client.Drain {
	if p == nil {
		return nil
	}
	w := &client.Drain{
		StartedAt: p.StartedAt.UTC(), Deadline: p.Deadline, DoneAt: p.DoneAt, Error: p.Error, Force: p.Force,
		Moved: p.Moved, Ended: p.Ended, Left: p.Left, Stuck: p.Stuck, Waiting: p.Waiting,
	}
	for _, f := range p.Failed {
		w.Failed = append(w.Failed, client.DrainFailure{ID: string(f.ID), Reason: f.Reason})
	}
	return w
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
		Taints: each(n.Settings.Taints, taintToWire), UsedCPU: n.UsedCPU, UsedMemory: n.UsedMemory, UsedDisk: n.UsedDisk,
		Address: n.Address, CPUFeatures: n.CPUFeatures, Machine: resourcesToWire(n.Machine), Drain: drainToWire(n.Drain),
	}
	if w.Engines == nil {
		w.Engines = []string{}
	}
	return w
}
