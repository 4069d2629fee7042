package agent

import (
	"context"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Depart saves a sandbox for a move.
func (a *Agent) Depart(context.Context, *agentv1.DepartRequest) (*agentv1.DepartResponse, error) {
	return nil, toWireError(sandbox.Unsupportedf("this node cannot move sandboxes yet"))
}

// Receive admits a sandbox of another node.
func (a *Agent) Receive(context.Context, *agentv1.ReceiveRequest) (*agentv1.ReceiveResponse, error) {
	return nil, toWireError(sandbox.Unsupportedf("this node cannot move sandboxes yet"))
}

// Arrive makes a received sandbox count.
func (a *Agent) Arrive(context.Context, *agentv1.ArriveRequest) (*agentv1.ArriveResponse, error) {
	return nil, toWireError(sandbox.Unsupportedf("this node cannot move sandboxes yet"))
}

// Return lets a departed sandbox go on here.
func (a *Agent) Return(context.Context, *agentv1.ReturnRequest) (*agentv1.ReturnResponse, error) {
	return nil, toWireError(sandbox.Unsupportedf("this node cannot move sandboxes yet"))
}

// Forget drops a copy that does not count.
func (a *Agent) Forget(context.Context, *agentv1.ForgetRequest) (*agentv1.ForgetResponse, error) {
	return nil, toWireError(sandbox.Unsupportedf("this node cannot move sandboxes yet"))
}
