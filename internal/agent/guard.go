package agent

import (
	"context"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Guard notes whether a paused sandbox can be brought back on another node. While it can, this node alone cannot know that it
// was not, so it only makes the sandbox run for those who do.
func (a *Agent) Guard(ctx context.Context, req *agentv1.GuardRequest) (*agentv1.GuardResponse, error) {
	in, err := a.visible(req.GetId())
	if err == nil {
		err = in.lock(ctx)
	}
	if err != nil {
		return nil, toWireError(err)
	}
	defer a.release(in)
	r := in.record()
	switch {
	case r.Generation != req.GetGeneration():
		return nil, toWireError(otherGeneration(&r.Sandbox, req.GetGeneration()))
	case r.State != sandbox.StatePaused:
		return nil, toWireError(sandbox.Conflictf("sandbox %s is %s, not paused", in.id, r.State))
	case r.Guarded == req.GetGuarded():
		return &agentv1.GuardResponse{}, nil
	}
	r.Guarded = req.GetGuarded()
	if err := a.putDurable(ctx, in, r); err != nil {
		return nil, toWireError(err)
	}
	return &agentv1.GuardResponse{}, nil
}

func otherGeneration(s *sandbox.Sandbox, want int64) error {
	return sandbox.Conflictf("sandbox %s has generation %d, not %d: something has changed it meanwhile", s.ID, s.Generation, want)
}

// checkGeneration refuses a command that is meant for another generation of a sandbox; one that names none is for any.
func checkGeneration(s *sandbox.Sandbox, want int64) error {
	if want > 0 && s.Generation != want {
		return otherGeneration(s, want)
	}
	return nil
}

// errGuarded says why a sandbox does not run without the server's permit.
func errGuarded(r *journal.Record) error {
	return sandbox.Unavailablef("sandbox %s has copies on other nodes, which may have gone on with it: it is resumed here as soon as a server "+
		"that can be reached says that none has", r.ID)
}
