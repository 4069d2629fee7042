package control

import (
	"time"
	"unique"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
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

// sandboxFromWire reads what a node says of one of its sandboxes. Words that many sandboxes share are kept once.
func sandboxFromWire(node sandbox.NodeID, w *agentv1.Sandbox) (sandbox.Sandbox, error) {
	id, err := sandbox.ParseID(w.GetId())
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	state, ok := stateOfWire[w.GetState()]
	if !ok {
		return sandbox.Sandbox{}, sandbox.Invalidf("sandbox %s: unknown state %d", id, w.GetState())
	}
	return sandbox.Sandbox{
		ID: id, NodeID: node, State: state, Reason: w.GetReason(), Generation: w.GetGeneration(),
		TemplateID:   sandbox.TemplateID(shared(w.GetTemplateId())),
		TemplateName: shared(w.GetTemplateName()),
		Resources:    resourcesFromWire(w.GetResources()),
		Metadata:     w.GetMetadata(),
		StartedAt:    timeFromWire(w.GetStartedAt()), EndAt: timeFromWire(w.GetEndAt()), EndedAt: timeFromWire(w.GetEndedAt()),
		Secure: w.GetSecure(), AllowInternet: w.GetAllowInternet(), GuestVersion: shared(w.GetGuestVersion()),
		AutoPause: w.GetAutoPause(), AutoPauseKind: kindFromWire(w.GetAutoPauseKind()),
		PausedAt: timeFromWire(w.GetPausedAt()), PausedKind: kindFromWire(w.GetPausedKind()), PausedBytes: w.GetPausedBytes(),
		Checkpoint: w.GetCheckpointId(), ImageDigest: shared(w.GetImageDigest()), Received: w.GetReceived(),
		AutoResume: w.GetAutoResume(), Timeout: w.GetTimeout().AsDuration(), IdleTimeout: w.GetIdleTimeout(),
	}, nil
}

// kindFromWire reads the kind of a checkpoint, which is empty where a node names none.
func kindFromWire(w agentv1.CheckpointKind) sandbox.CheckpointKind {
	switch w {
	case agentv1.CheckpointKind_CHECKPOINT_KIND_MEMORY:
		return sandbox.CheckpointMemory
	case agentv1.CheckpointKind_CHECKPOINT_KIND_FILES:
		return sandbox.CheckpointFiles
	case agentv1.CheckpointKind_CHECKPOINT_KIND_UNSPECIFIED:
	}
	return ""
}

// shared returns an equal string of which the process holds one copy.
func shared(s string) string { return unique.Make(s).Value() }

func resourcesFromWire(w *agentv1.Resources) sandbox.Resources {
	return sandbox.Resources{MilliCPU: w.GetMilliCpu(), MemoryBytes: w.GetMemoryBytes(), DiskBytes: w.GetDiskBytes()}
}

func resourcesToWire(r sandbox.Resources) *agentv1.Resources {
	return &agentv1.Resources{MilliCpu: r.MilliCPU, MemoryBytes: r.MemoryBytes, DiskBytes: r.DiskBytes}
}

func timeFromWire(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func timeToWire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// timeoutToWire turns Never into the absence that stands for it.
func timeoutToWire(d time.Duration) *durationpb.Duration {
	if d == Never {
		return nil
	}
	return durationpb.New(d)
}
