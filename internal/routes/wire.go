package routes

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

//nolint:gochecknoglobals // a table, never written
var stateOfWire = map[agentv1.State]sandbox.State{
	agentv1.State_STATE_CREATING:  sandbox.StateCreating,
	agentv1.State_STATE_RUNNING:   sandbox.StateRunning,
	agentv1.State_STATE_PAUSING:   sandbox.StatePausing,
	agentv1.State_STATE_PAUSED:    sandbox.StatePaused,
	agentv1.State_STATE_RESUMING:  sandbox.StateResuming,
	agentv1.State_STATE_STOPPING:  sandbox.StateStopping,
	agentv1.State_STATE_STOPPED:   sandbox.StateStopped,
	agentv1.State_STATE_MIGRATING: sandbox.StateMigrating,
	agentv1.State_STATE_LOST:      sandbox.StateLost,
	agentv1.State_STATE_FAILED:    sandbox.StateFailed,
	agentv1.State_STATE_DELETED:   sandbox.StateDeleted,
}

// fromWire reads a route. A state that this version does not know stays empty: such a sandbox takes no requests.
func fromWire(w *proxyv1.Route) sandbox.Route {
	return sandbox.Route{
		ID: sandbox.ID(w.GetId()), Node: sandbox.NodeID(w.GetNodeId()), State: stateOfWire[w.GetState()], Reason: w.GetReason(),
		Generation: w.GetGeneration(), Secure: w.GetSecure(), AutoResume: w.GetAutoResume(),
	}
}

func nodeFromWire(w *proxyv1.Node) sandbox.NodeRoute {
	return sandbox.NodeRoute{ID: sandbox.NodeID(w.GetId()), Address: w.GetAddress(), Down: w.GetDown(), Unheard: w.GetUnheard()}
}

// kindOfCode is the one table from what a server answers to the kinds of error.
//
//nolint:gochecknoglobals // a table, never written
var kindOfCode = map[connect.Code]error{
	connect.CodeNotFound:           sandbox.ErrNotFound,
	connect.CodeInvalidArgument:    sandbox.ErrInvalid,
	connect.CodeResourceExhausted:  sandbox.ErrExhausted,
	connect.CodeFailedPrecondition: sandbox.ErrConflict,
	connect.CodeUnimplemented:      sandbox.ErrUnsupported,
	connect.CodePermissionDenied:   sandbox.ErrDenied,
	connect.CodeUnauthenticated:    sandbox.ErrDenied,
}

// answerError is a server's refusal with the kind that its code stands for.
type answerError struct {
	kind error
	text string
	err  error
}

func (e *answerError) Error() string   { return e.text }
func (e *answerError) Unwrap() []error { return []error{e.kind, e.err} }

// fromServer gives what a server answered its kind. What is no answer means that no server can be asked.
func fromServer(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if answer, ok := errors.AsType[*connect.Error](err); ok {
		if kind, known := kindOfCode[answer.Code()]; known {
			return &answerError{kind: kind, text: answer.Message(), err: err}
		}
	}
	if ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("ask the server: %w", context.Cause(ctx))
	}
	if errors.Is(err, sandbox.ErrUnavailable) {
		return err
	}
	return sandbox.Unavailablef("no server can be asked now: %v", err)
}
