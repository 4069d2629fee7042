package sandbox

import "slices"

// State is where a sandbox is in its life.
type State string

// The states of a sandbox. Those that end in "ing", except running, are transient and carry a deadline.
const (
	StateCreating  State = "creating"
	StateRunning   State = "running"
	StatePausing   State = "pausing"
	StatePaused    State = "paused"
	StateResuming  State = "resuming"
	StateStopping  State = "stopping"
	StateStopped   State = "stopped"
	StateMigrating State = "migrating"
	// StateLost means that the node, or the sandbox's process, went away while nobody watched.
	StateLost State = "lost"
	// StateFailed means that the sandbox ended by itself: out of memory, a crash, a start that did not succeed.
	StateFailed State = "failed"
	// StateDeleted means that somebody, or its timeout, ended the sandbox. Nothing of it is left.
	StateDeleted State = "deleted"
)

// transitions holds every allowed change of state. A state that is no key allows no change.
//
//nolint:gochecknoglobals // the one table of the state machine, never written
var transitions = map[State][]State{
	StateCreating:  {StateRunning, StateFailed, StateLost, StateStopping, StateDeleted},
	StateRunning:   {StatePausing, StateStopping, StateMigrating, StateFailed, StateLost, StateDeleted},
	StatePausing:   {StatePaused, StateRunning, StateMigrating, StateFailed, StateLost, StateStopping, StateDeleted},
	StatePaused:    {StateResuming, StateMigrating, StateStopping, StateLost, StateFailed, StateDeleted},
	StateResuming:  {StateRunning, StatePaused, StateFailed, StateLost, StateStopping, StateDeleted},
	StateMigrating: {StateRunning, StatePaused, StateStopping, StateFailed, StateLost, StateDeleted},
	StateStopping:  {StateStopped, StateFailed, StateLost, StateDeleted},
	StateStopped:   {StateResuming, StateDeleted},
	StateLost:      {StateRunning, StatePaused, StateDeleted},
	StateFailed:    {StateDeleted},
}

// CanBecome reports whether a sandbox in state s may change to state next.
func (s State) CanBecome(next State) bool { return slices.Contains(transitions[s], next) }

// Ended reports whether a sandbox in state s holds no process and never will again without outside help.
func (s State) Ended() bool {
	return s == StateFailed || s == StateLost || s == StateDeleted
}

// Valid reports whether s is one of the states above.
func (s State) Valid() bool {
	_, ok := transitions[s]
	return ok || s == StateDeleted
}
