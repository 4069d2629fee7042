// Package client is the wire form of the /v1 API and a Go client for it.
//
// The server's edge (api/v1) encodes these types, the command line and the tests decode them; both sides share one
// definition. It knows nothing of the cluster's inside and keeps no state but an http.Client, which is safe for
// concurrent use.
package client

import "time"

// Resources is an amount of a machine.
type Resources struct {
	MilliCPU    int64 `json:"milli_cpu"`
	MemoryBytes int64 `json:"memory_bytes"`
	DiskBytes   int64 `json:"disk_bytes"`
}

// Error is the body of every answer that is not 2xx.
type Error struct {
	// Code repeats the HTTP status.
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// Status is GET /v1/status.
type Status struct {
	Version   string         `json:"version"`
	StartedAt time.Time      `json:"started_at"`
	Ready     bool           `json:"ready"`
	APIURL    string         `json:"api_url"`
	ProxyURL  string         `json:"proxy_url"`
	Nodes     map[string]int `json:"nodes"`
	Sandboxes map[string]int `json:"sandboxes"`
	Templates int            `json:"templates"`
	Capacity  Resources      `json:"capacity"`
	Allocated Resources      `json:"allocated"`
	// Member is set on a machine that joined a cluster: everything else is then of that machine alone.
	Member *Member `json:"member,omitempty"`
}

// Member is what a machine is that joined a cluster.
type Member struct {
	Role      string `json:"role"`
	ID        string `json:"id"`
	Name      string `json:"name"`
	ClusterID string `json:"cluster_id"`
	// Servers are HOST:PORT of each; Connected means that one of them is reached now.
	Servers   []string `json:"servers"`
	Connected bool     `json:"connected"`
	// CertificateExpiresAt is the end of the machine's certificate, unless it is renewed.
	CertificateExpiresAt time.Time `json:"certificate_expires_at"`
}

// Node is one entry of GET /v1/nodes.
type Node struct {
	ID           string            `json:"id"`
	Name         string            `json:"name"`
	State        string            `json:"state"`
	Version      string            `json:"version"`
	Architecture string            `json:"architecture"`
	Kernel       string            `json:"kernel"`
	Engines      []string          `json:"engines"`
	Labels       map[string]string `json:"labels,omitempty"`
	Capacity     Resources         `json:"capacity"`
	Allocated    Resources         `json:"allocated"`
	Sandboxes    int               `json:"sandboxes"`
	Warm         int               `json:"warm"`
	RegisteredAt time.Time         `json:"registered_at"`
	LastSeenAt   time.Time         `json:"last_seen_at"`
	// Creating counts the sandboxes that are being created.
	Creating int `json:"creating"`
	// StateAt is when the state changed last.
	StateAt time.Time `json:"state_at"`
	// OwnLabels are those that an administrator set; Labels are all.
	OwnLabels map[string]string `json:"own_labels,omitempty"`
	Taints    []Taint           `json:"taints,omitempty"`
	// Cordoned means that the node gets no new sandboxes, whatever its state; CordonReason says why.
	Cordoned     bool   `json:"cordoned"`
	CordonReason string `json:"cordon_reason,omitempty"`
	// Failures is how many recent failures count against the node.
	Failures float64 `json:"failures,omitempty"`
	// UsedCPU, UsedMemory and UsedDisk are how much of the machine is in use, 0 to 1.
	UsedCPU    float64 `json:"used_cpu"`
	UsedMemory float64 `json:"used_memory"`
	UsedDisk   float64 `json:"used_disk"`
	// Address is where the node answers other members; empty where only its link to the server reaches it.
	Address     string   `json:"address,omitempty"`
	CPUFeatures []string `json:"cpu_features,omitempty"`
	// Machine is what the machine has, before over-commit and reserve.
	Machine Resources `json:"machine"`
	// Drain is set once the node was told to give its sandboxes to others.
	Drain *Drain `json:"drain,omitempty"`
}

// Sandbox is one entry of GET /v1/sandboxes, and GET /v1/sandboxes/{id}.
type Sandbox struct {
	ID            string            `json:"id"`
	NodeID        string            `json:"node_id"`
	TemplateID    string            `json:"template_id"`
	Template      string            `json:"template"`
	State         string            `json:"state"`
	Reason        string            `json:"reason,omitempty"`
	Generation    int64             `json:"generation"`
	Resources     Resources         `json:"resources"`
	Metadata      map[string]string `json:"metadata,omitempty"`
	StartedAt     time.Time         `json:"started_at"`
	EndAt         time.Time         `json:"end_at,omitzero"`
	EndedAt       time.Time         `json:"ended_at,omitzero"`
	Secure        bool              `json:"secure"`
	AllowInternet bool              `json:"allow_internet"`
	// AutoPause means that the timeout pauses the sandbox instead of ending it. "memory" or "files" is what that keeps.
	AutoPause     bool   `json:"auto_pause,omitempty"`
	AutoPauseKind string `json:"auto_pause_kind,omitempty"`
	// AutoResume means that a request makes it run again while it is paused; IdleTimeout that EndAt moves with its use.
	AutoResume  bool `json:"auto_resume,omitempty"`
	IdleTimeout bool `json:"idle_timeout,omitempty"`
	// PausedAt, PausedKind ("memory" or "files") and PausedBytes (on the disk) are set while it is paused.
	PausedAt    time.Time `json:"paused_at,omitzero"`
	PausedKind  string    `json:"paused_kind,omitempty"`
	PausedBytes int64     `json:"paused_bytes,omitempty"`
	// AccessToken opens the agent inside; only in the answer for one sandbox.
	AccessToken string `json:"access_token,omitempty"`
}

// CreateSandbox is the body of POST /v1/sandboxes; the answer is a Sandbox.
type CreateSandbox struct {
	Template string            `json:"template,omitempty"` // default "base"
	Metadata map[string]string `json:"metadata,omitempty"`
	Env      map[string]string `json:"env,omitempty"`
	// TimeoutSeconds: 0 means the default of 300; -1 means never.
	TimeoutSeconds int64 `json:"timeout_seconds,omitempty"`
	// MilliCPU, MemoryBytes and DiskBytes override the template's where they are not 0.
	Resources     Resources `json:"resources,omitzero"`
	AllowInternet *bool     `json:"allow_internet,omitempty"` // default true
	// AutoPause has the timeout pause the sandbox instead of ending it; AutoPauseKind is "memory" (default) or "files".
	AutoPause     bool   `json:"auto_pause,omitempty"`
	AutoPauseKind string `json:"auto_pause_kind,omitempty"`
	// AutoResume has a request make it run again while it is paused. IdleTimeout has the timeout count from its last use.
	AutoResume  bool `json:"auto_resume,omitempty"`
	IdleTimeout bool `json:"idle_timeout,omitempty"`
}

// LogEntry is one line of GET /v1/sandboxes/{id}/logs or of a build's log.
type LogEntry struct {
	Time    time.Time         `json:"time"`
	Level   string            `json:"level"`
	Logger  string            `json:"logger,omitempty"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields,omitempty"`
}

// Key is one entry of GET /v1/keys.
type Key struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Hint is the key's first and last characters, to recognise it by.
	Hint       string    `json:"hint"`
	CreatedAt  time.Time `json:"created_at"`
	LastUsedAt time.Time `json:"last_used_at,omitzero"`
}

// CreateKey is the body of POST /v1/keys.
type CreateKey struct {
	Name string `json:"name"`
}

// CreatedKey answers POST /v1/keys: the only time that the key itself is shown.
type CreatedKey struct {
	Key
	Secret string `json:"key"`
}

// Event is one entry of GET /v1/events?sandbox=&type=&since=RFC3339&limit=&after=ID.
type Event struct {
	ID        int64             `json:"id"`
	Time      time.Time         `json:"time"`
	Type      string            `json:"type"`
	NodeID    string            `json:"node_id,omitempty"`
	SandboxID string            `json:"sandbox_id,omitempty"`
	Message   string            `json:"message"`
	Fields    map[string]string `json:"fields,omitempty"`
}

// SetTimeout is the body of POST /v1/sandboxes/{id}/timeout; the answer is a Sandbox.
type SetTimeout struct {
	// TimeoutSeconds is from now. 0 ends the sandbox at once; -1 means never.
	TimeoutSeconds int64 `json:"timeout_seconds"`
	// ExtendOnly only ever moves the end later.
	ExtendOnly bool `json:"extend_only,omitempty"`
}

// Metric is one sample of GET /v1/sandboxes/{id}/metrics?start=RFC3339&end=RFC3339.
type Metric struct {
	Time     time.Time `json:"time"`
	CPUCount int64     `json:"cpu_count"`
	// CPUUsedPercent is of one core: 200 is two cores busy.
	CPUUsedPercent   float64 `json:"cpu_used_percent"`
	MemoryUsedBytes  int64   `json:"memory_used_bytes"`
	MemoryTotalBytes int64   `json:"memory_total_bytes"`
	MemoryCacheBytes int64   `json:"memory_cache_bytes"`
	DiskUsedBytes    int64   `json:"disk_used_bytes"`
	DiskTotalBytes   int64   `json:"disk_total_bytes"`
}

// NextTokenHeader carries the token of a list's next page: GET /v1/sandboxes?next=TOKEN. It is absent on the last page.
const NextTokenHeader = "X-Next-Token"
