package guest

import (
	"runtime"
	"runtime/debug"
)

const (
	// maxProcs is how many processors the agent uses at once: the sandbox's are for its users.
	maxProcs = 2
	// gcPercent trades processor time, which the agent hardly needs, for memory, which each idle sandbox holds.
	gcPercent = 40
	// memoryGoal is where the runtime starts to work hard for returning memory.
	memoryGoal = 96 << 20
)

// Frugal tunes the Go runtime for a process that is idle most of the time, and of which a machine runs hundreds.
func Frugal() {
	runtime.GOMAXPROCS(min(maxProcs, runtime.NumCPU()))
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryGoal)
}
