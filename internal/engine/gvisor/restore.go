package gvisor

import (
	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// checkpointOf reads what spec.Checkpoint holds, checks that it fits the spec, and gives the spec what a checkpoint decides.
// Without a checkpoint it returns the zero manifest.
func checkpointOf(spec *engine.Spec) (manifest, error) {
	if spec.Checkpoint == "" {
		return manifest{}, nil
	}
	m, err := readManifest(spec.Checkpoint)
	if err != nil {
		return m, err
	}
	if m.Kind == engine.SaveFiles {
		if len(spec.Args) == 0 {
			return m, sandbox.Invalidf("checkpoint %s holds files alone: want a program to run", spec.Checkpoint)
		}
		return m, nil
	}
	if m.Limits != spec.Limits {
		return manifest{}, sandbox.Invalidf("checkpoint %s: it was made with limits %+v, and can only go on with them: got %+v",
			spec.Checkpoint, m.Limits, spec.Limits)
	}
	spec.Args, spec.Env, spec.Hostname = []string{"checkpoint"}, nil, m.Hostname // gVisor wants a name, and does not run it
	return m, nil
}
