package e2b

import (
	"net/http"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

type nodeWire struct {
	ID                   string      `json:"id"`
	NodeID               string      `json:"nodeID"`
	Version              string      `json:"version"`
	Status               string      `json:"status"`
	SandboxCount         int         `json:"sandboxCount"`
	SandboxStartingCount int         `json:"sandboxStartingCount"`
	Metrics              nodeMetrics `json:"metrics"`
}

type nodeMetrics struct {
	CPUCount             int64 `json:"cpuCount"`
	AllocatedCPU         int64 `json:"allocatedCPU"`
	MemoryTotalBytes     int64 `json:"memoryTotalBytes"`
	AllocatedMemoryBytes int64 `json:"allocatedMemoryBytes"`
}

func (s *server) listNodes(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListNodes(r.Context())
	if err != nil {
		return err
	}
	out := make([]nodeWire, 0, len(all))
	for _, n := range all {
		out = append(out, nodeToWire(n))
	}
	return exchange.JSON(w, http.StatusOK, out)
}

func nodeToWire(n control.Node) nodeWire {
	return nodeWire{
		ID: string(n.ID), NodeID: string(n.ID), Version: n.Version, Status: nodeStatus(n.State),
		SandboxCount: n.Sandboxes, SandboxStartingCount: n.Creating,
		Metrics: nodeMetrics{
			CPUCount: n.Capacity.MilliCPU / 1000, AllocatedCPU: (n.Allocated.MilliCPU + 999) / 1000,
			MemoryTotalBytes: n.Capacity.MemoryBytes, AllocatedMemoryBytes: n.Allocated.MemoryBytes,
		},
	}
}

// nodeStatus is the contract's word for a node's state.
func nodeStatus(s sandbox.NodeState) string {
	switch s {
	case sandbox.NodeReady:
		return "ready"
	case sandbox.NodeCordoned, sandbox.NodeDraining, sandbox.NodeDrained:
		return "draining"
	case sandbox.NodeSuspect, sandbox.NodeDown:
	}
	return "unhealthy"
}
