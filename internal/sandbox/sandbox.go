package sandbox

import "time"

// Resources is an amount of a machine: what a node has, what a sandbox may use.
type Resources struct {
	// MilliCPU is processor time in thousandths of a core.
	MilliCPU int64 `json:"milli_cpu"`
	// MemoryBytes is working memory in bytes.
	MemoryBytes int64 `json:"memory_bytes"`
	// DiskBytes is what may be written to the root file system, in bytes.
	DiskBytes int64 `json:"disk_bytes"`
}

// Add returns r + o.
func (r Resources) Add(o Resources) Resources {
	return Resources{r.MilliCPU + o.MilliCPU, r.MemoryBytes + o.MemoryBytes, r.DiskBytes + o.DiskBytes}
}

// Sub returns r - o; parts may be negative.
func (r Resources) Sub(o Resources) Resources {
	return Resources{r.MilliCPU - o.MilliCPU, r.MemoryBytes - o.MemoryBytes, r.DiskBytes - o.DiskBytes}
}

// Fits reports whether r is no larger than room in any part.
func (r Resources) Fits(room Resources) bool {
	return r.MilliCPU <= room.MilliCPU && r.MemoryBytes <= room.MemoryBytes && r.DiskBytes <= room.DiskBytes
}

// Sandbox is what is known of one sandbox. It is a value: share copies, and never write to a shared Metadata.
type Sandbox struct {
	ID         ID         `json:"id"`
	NodeID     NodeID     `json:"node_id"`
	TemplateID TemplateID `json:"template_id"`
	// TemplateName is the name by which the template was asked for.
	TemplateName string `json:"template_name,omitempty"`
	State        State  `json:"state"`
	// Reason says why the state is what it is; set for failed, lost and deleted, and for paused where its end paused it, not
	// somebody.
	Reason string `json:"reason,omitempty"`
	// Generation grows by one with each change of state or setting. A command or report with a lower one is stale.
	Generation int64             `json:"generation"`
	Resources  Resources         `json:"resources"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	StartedAt  time.Time         `json:"started_at"`
	// EndAt is when the timeout ends the sandbox; zero means never.
	EndAt time.Time `json:"end_at,omitzero"`
	// EndedAt is when it left the machine; zero while it has not.
	EndedAt time.Time `json:"ended_at,omitzero"`
	// Secure means that the agent inside demands an access token.
	Secure bool `json:"secure"`
	// AllowInternet means that the sandbox may open connections to the outside.
	AllowInternet bool `json:"allow_internet"`
	// GuestVersion is the version of the E2B agent contract that the agent inside reports.
	GuestVersion string `json:"guest_version,omitempty"`
	// AutoPause means that the timeout pauses the sandbox instead of ending it; AutoPauseKind is what that keeps.
	AutoPause     bool           `json:"auto_pause,omitempty"`
	AutoPauseKind CheckpointKind `json:"auto_pause_kind,omitempty"`
	// PausedAt is since when it is paused, PausedKind what was kept, and PausedBytes what that occupies on the disk; zero
	// for one that is not paused.
	PausedAt    time.Time      `json:"paused_at,omitzero"`
	PausedKind  CheckpointKind `json:"paused_kind,omitempty"`
	PausedBytes int64          `json:"paused_bytes,omitempty"`
	// Checkpoint is what it is paused or migrating in, and ImageDigest what it runs from.
	Checkpoint  string `json:"checkpoint,omitempty"`
	ImageDigest string `json:"image_digest,omitempty"`
	// Received means that a migrating sandbox has come to NodeID and does not count there yet.
	Received bool `json:"received,omitempty"`
	// AutoResume means that traffic makes it run again while it is paused, for Timeout, which is the last that it was given;
	// 0 there means never. IdleTimeout means that the timeout counts from its last use.
	AutoResume  bool          `json:"auto_resume,omitempty"`
	Timeout     time.Duration `json:"timeout,omitempty"`
	IdleTimeout bool          `json:"idle_timeout,omitempty"`
}

// EndAfter returns when the end of a sandbox comes that was last used at the given time: as it is set or, where it counts from
// the last use, Timeout after that if that is later. Zero means never.
func (b *Sandbox) EndAfter(used time.Time) time.Time {
	if b.EndAt.IsZero() || !b.IdleTimeout || used.IsZero() {
		return b.EndAt
	}
	if slid := used.Add(b.Timeout); slid.After(b.EndAt) {
		return slid
	}
	return b.EndAt
}

// NodeState is what the cluster may ask of a node.
type NodeState string

// The states of a node.
const (
	NodeReady    NodeState = "ready"
	NodeSuspect  NodeState = "suspect"
	NodeDown     NodeState = "down"
	NodeCordoned NodeState = "cordoned"
	NodeDraining NodeState = "draining"
	NodeDrained  NodeState = "drained"
)

// Node is a machine that runs sandboxes.
type Node struct {
	ID           NodeID    `json:"id"`
	Name         string    `json:"name"`
	State        NodeState `json:"state"`
	Version      string    `json:"version"`
	Architecture string    `json:"architecture"`
	Kernel       string    `json:"kernel"`
	Engines      []string  `json:"engines"`
	// EngineVersions says of which version each engine is.
	EngineVersions map[string]string `json:"engine_versions,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	Capacity       Resources         `json:"capacity"`
	RegisteredAt   time.Time         `json:"registered_at"`
	// Address is the HOST:PORT on which it answers other members; empty where only its link to the server reaches it.
	Address string `json:"address,omitempty"`
	// CPUFeatures are the processor's, in the kernel's words; Machine is what it has before over-commit and reserve.
	CPUFeatures []string  `json:"cpu_features,omitempty"`
	Machine     Resources `json:"machine,omitzero"`
}
