// Package gvisor runs guests on gVisor, linked in as a library: no KVM, no second binary, no container daemon.
//
// It owns the sentry processes, their control groups and their runtime files below Config.Root. It must not know about
// networking beyond the path of a namespace, nor keep records of its own beyond what Stop needs to clear a guest away.
//
// # Processes
//
// A guest is one process tree: the sentry, which is this binary executed again and the init of its own PID namespace,
// and a few stubs that hold the guest's address spaces. Maybe must therefore be the first line of main, and of every
// TestMain whose tests use the engine: it returns at once, unless this process is such a re-execution. Package
// initialisers run in each sentry, so keep them light. There is no gofer: the root is an EROFS image that the sentry reads
// itself, and what the guest writes goes to a nameless file in Spec.ScratchDir that vanishes with the last process.
//
// # Traps
//
//   - gVisor saves the network namespace of the main thread and later restores it on other threads. Nothing may ever
//     change the main thread's namespace: lock the main goroutine to its thread in an init function and do all work
//     elsewhere. A TestMain does the same.
//   - The sentry refuses to run when built with the race detector: tests under -race set Config.ExePath to a plain build.
//   - gVisor hands the standard streams of this process to the guest and changes their owner. The re-execution puts
//     /dev/null in their place, and the owner is put back.
//   - gVisor's log target and the path that it re-executes are global to the process; New sets both.
//
// # What is on disk
//
// Below Config.Root there is one directory per guest, and it is the anchor: it is made before anything else of the guest
// and removed after everything else, so that List shows whatever a killed process left behind. A guest whose directory
// lacks the record (guest.json) was never started completely; its processes are found through its control group, or by
// their arguments.
//
// # Concurrency
//
// An Engine is safe for concurrent use under the rules of package engine. It starts no goroutine that outlives a call.
// Lock order: Engine.mu, then guest.mu. Neither is held during a system call that can block.
package gvisor
