package daemon

import (
	"context"
	"testing"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/gen/agent/v1/agentv1connect"
)

// permits remembers what it was permitted.
type permits struct {
	agentv1connect.AgentServiceClient
	given []bool
}

// Resume implements agent.v1.
func (p *permits) Resume(_ context.Context, req *agentv1.ResumeRequest) (*agentv1.ResumeResponse, error) {
	p.given = append(p.given, req.GetPermitted())
	return &agentv1.ResumeResponse{}, nil
}

// Rollback implements agent.v1.
func (p *permits) Rollback(_ context.Context, req *agentv1.RollbackRequest) (*agentv1.RollbackResponse, error) {
	p.given = append(p.given, req.GetPermitted())
	return &agentv1.RollbackResponse{}, nil
}

// TestNodePermitsItselfNothing has a node by itself never run what another may have brought back.
func TestNodePermitsItselfNothing(t *testing.T) {
	node := &permits{}
	own := ownCommands{node}
	_, err := own.Resume(t.Context(), &agentv1.ResumeRequest{Permitted: true})
	if err != nil {
		t.Error(err)
	}
	if _, err := own.Rollback(t.Context(), &agentv1.RollbackRequest{Permitted: true}); err != nil {
		t.Error(err)
	}
	if len(node.given) != 2 || node.given[0] || node.given[1] {
		t.Errorf("permitted: %v; want false twice", node.given)
	}
	if _, err := own.Guard(t.Context(), &agentv1.GuardRequest{}); err == nil {
		t.Error("a node by itself notes that there are copies")
	}
}
