package client

import "time"

// PauseSandbox is the body of POST /v1/sandboxes/{id}/pause; the answer is a Sandbox.
type PauseSandbox struct {
	// Kind is "memory" (default) or "files".
	Kind string `json:"kind,omitempty"`
}

// ResumeSandbox is the body of POST /v1/sandboxes/{id}/resume; the answer is a Sandbox.
type ResumeSandbox struct {
	// TimeoutSeconds: 0 means the default of 300; -1 means never.
	TimeoutSeconds int64 `json:"timeout_seconds,omitempty"`
	// Cold boots anew from the files; 501 where memory was kept.
	Cold bool `json:"cold,omitempty"`
}

// CreateSnapshot is the body of POST /v1/sandboxes/{id}/snapshots; the answer (201) is a Snapshot.
type CreateSnapshot struct {
	// Name is [namespace/]alias[:tag]; empty makes a snapshot that only its id finds.
	Name string `json:"name,omitempty"`
	// Kind is "memory" (default) or "files".
	Kind string `json:"kind,omitempty"`
}

// Snapshot is one entry of GET /v1/snapshots?sandbox=&name=&limit=&next=. DELETE /v1/snapshots/{id} deletes it.
type Snapshot struct {
	// ID is a name or a template id with its tag; sandboxes can be created from it.
	ID         string    `json:"id"`
	TemplateID string    `json:"template_id"`
	BuildID    string    `json:"build_id"`
	Names      []string  `json:"names"`
	SandboxID  string    `json:"sandbox_id,omitempty"`
	Kind       string    `json:"kind"`
	Bytes      int64     `json:"bytes"`
	Resources  Resources `json:"resources"`
	CreatedAt  time.Time `json:"created_at"`
}

// ForkSandbox is the body of POST /v1/sandboxes/{id}/fork; the answer (201) is a list of Fork.
type ForkSandbox struct {
	// Count is 1 to 100; 0 means 1.
	Count int `json:"count,omitempty"`
	// TimeoutSeconds: 0 means the default of 300; -1 means never.
	TimeoutSeconds int64 `json:"timeout_seconds,omitempty"`
}

// Fork is the outcome of one fork: a sandbox or an error.
type Fork struct {
	Sandbox *Sandbox `json:"sandbox,omitempty"`
	Error   *Error   `json:"error,omitempty"`
}

// RollbackSandbox is the body of POST /v1/sandboxes/{id}/rollback; the answer is a Sandbox.
type RollbackSandbox struct {
	// Snapshot is the id or name of one of the sandbox's own snapshots.
	Snapshot string `json:"snapshot"`
}
