package control

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// kindOfCode is the one table from what a node answers to the kinds of error.
//
//nolint:gochecknoglobals // a table, never written
var kindOfCode = map[connect.Code]error{
	connect.CodeNotFound:           sandbox.ErrNotFound,
	connect.CodeInvalidArgument:    sandbox.ErrInvalid,
	connect.CodeOutOfRange:         sandbox.ErrInvalid,
	connect.CodeResourceExhausted:  sandbox.ErrExhausted,
	connect.CodeUnavailable:        sandbox.ErrUnavailable,
	connect.CodeDeadlineExceeded:   sandbox.ErrUnavailable,
	connect.CodeCanceled:           sandbox.ErrUnavailable,
	connect.CodeAborted:            sandbox.ErrConflict,
	connect.CodeFailedPrecondition: sandbox.ErrConflict,
	connect.CodeAlreadyExists:      sandbox.ErrConflict,
	connect.CodeUnimplemented:      sandbox.ErrUnsupported,
	connect.CodePermissionDenied:   sandbox.ErrDenied,
	connect.CodeUnauthenticated:    sandbox.ErrDenied,
}

// codeOfKind is the way back, for the answers that nodes get from the server.
//
//nolint:gochecknoglobals // a table, never written
var codeOfKind = []struct {
	kind error
	code connect.Code
}{
	{sandbox.ErrNotFound, connect.CodeNotFound},
	{sandbox.ErrInvalid, connect.CodeInvalidArgument},
	{sandbox.ErrExhausted, connect.CodeResourceExhausted},
	{sandbox.ErrUnavailable, connect.CodeUnavailable},
	{sandbox.ErrConflict, connect.CodeFailedPrecondition},
	{sandbox.ErrUnsupported, connect.CodeUnimplemented},
	{sandbox.ErrDenied, connect.CodePermissionDenied},
}

// nodeError is a node's refusal with the kind that its code stands for.
type nodeError struct {
	kind error
	text string
	err  error
}

func (e *nodeError) Error() string   { return e.text }
func (e *nodeError) Unwrap() []error { return []error{e.kind, e.err} }

// fromNode gives what a node answered its kind. What already has one, as from a node in this process, stays as it is.
func fromNode(node sandbox.NodeID, err error) error {
	if err == nil {
		return nil
	}
	for _, k := range codeOfKind {
		if errors.Is(err, k.kind) {
			return err
		}
	}
	if answer, ok := errors.AsType[*connect.Error](err); ok {
		kind, ok := kindOfCode[answer.Code()]
		if !ok {
			return err
		}
		text := answer.Message()
		if text == "" {
			text = answer.Code().String()
		}
		if kind == sandbox.ErrUnavailable { //nolint:errorlint // an entry of the table above
			text = "node " + string(node) + " does not answer: " + text
		}
		return &nodeError{kind: kind, text: text, err: err}
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return &nodeError{kind: sandbox.ErrUnavailable, text: "node " + string(node) + " did not answer in time", err: err}
	}
	return err
}

// toNode is an error as a node is to see it.
func toNode(err error) error {
	if err == nil {
		return nil
	}
	for _, k := range codeOfKind {
		if errors.Is(err, k.kind) {
			return connect.NewError(k.code, err)
		}
	}
	return connect.NewError(connect.CodeInternal, err)
}
