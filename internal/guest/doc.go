// Package guest is the agent inside each sandbox and virtual machine.
//
// It owns the processes that clients start, the files they read and write and the settings that the node hands over:
// the Connect services process.Process and filesystem.Filesystem, and plain HTTP for /files, /health, /init, /metrics,
// /envs and /logs, all on one port, over HTTP/1.1 and unencrypted HTTP/2. The wire contract is that of the E2B SDKs.
//
// It must not know of the cluster: it is told what it needs through /init. It runs as root and as process 1, and gives
// no protection against the code in the same sandbox; the sandbox is the boundary. What clients send is still bounded.
//
// Concurrency: a Server is safe for concurrent use. Settings are replaced as a whole and read without a lock. The
// reaper's mutex is held while forking and while collecting exits, so that no exit is lost or taken by the wrong
// party; no other lock is taken under it. A process has one goroutine per output; its subscribers have bounded queues,
// and a full queue holds the process back rather than growing. Nothing ticks while no client is connected.
package guest

// Version is what the agent reports: the release of the agent contract that the SDKs check features against.
const Version = "0.6.13"

// DefaultPort is where clients expect the agent.
const DefaultPort = 49983
