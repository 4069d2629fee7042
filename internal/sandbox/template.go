package sandbox

import (
	"slices"
	"time"
)

// CheckpointKind is what a checkpoint keeps of a sandbox.
type CheckpointKind string

// The kinds of checkpoint.
const (
	// CheckpointMemory keeps processes, memory and files.
	CheckpointMemory CheckpointKind = "memory"
	// CheckpointFiles keeps files: a sandbox boots anew from them.
	CheckpointFiles CheckpointKind = "files"
)

// GuestSettings is what every process of a sandbox starts with.
type GuestSettings struct {
	Env map[string]string `json:"env,omitempty"`
	// User is "user" where it is empty, WorkDir that user's home.
	User    string `json:"user,omitempty"`
	WorkDir string `json:"work_dir,omitempty"`
}

// TemplateKind says how a template came to be.
type TemplateKind string

// The kinds of template.
const (
	// TemplateBuilt was built from an image or a recipe.
	TemplateBuilt TemplateKind = "template"
	// TemplateSnapshot was saved from a running sandbox.
	TemplateSnapshot TemplateKind = "snapshot"
)

// The states of a build.
const (
	// BuildWaiting is announced: its files may be uploaded, its steps are not known yet.
	BuildWaiting  = "waiting"
	BuildBuilding = "building"
	BuildReady    = "ready"
	BuildFailed   = "failed"
)

// DefaultTag is the tag of a name without one.
const DefaultTag = "default"

// Template is what sandboxes start from: names, and behind each of its tags a build.
type Template struct {
	ID   TemplateID   `json:"id"`
	Kind TemplateKind `json:"kind"`
	// Names are the aliases that find the template, the first being its main one; a snapshot may have none.
	Names  []string `json:"names"`
	Public bool     `json:"public"`
	// Tags says which build each tag means.
	Tags map[string]Tag `json:"tags"`
	// Builds are those that a tag means, those under way and the newest others; the newest first.
	Builds []Build `json:"builds"`
	// SourceSandbox is what a snapshot was saved from last.
	SourceSandbox ID `json:"source_sandbox,omitempty"`
	// Placement is how many nodes have it before it is asked for there: 0 for none, -1 for all; nil is as the cluster says.
	Placement *int `json:"placement,omitempty"`
	// NodeSelector, NodeAffinity and Tolerations say where its sandboxes may go, in the words of a create's metadata, which
	// goes before them.
	NodeSelector string `json:"node_selector,omitempty"`
	NodeAffinity string `json:"node_affinity,omitempty"`
	Tolerations  string `json:"tolerations,omitempty"`
	// IdleTimeout has the timeouts of its sandboxes count from their last use.
	IdleTimeout bool      `json:"idle_timeout,omitempty"`
	CreatedAt   time.Time `json:"created_at"`
	UpdatedAt   time.Time `json:"updated_at"`
}

// Tag is what one tag of a template means.
type Tag struct {
	BuildID string    `json:"build_id"`
	At      time.Time `json:"at"`
}

// Build is one state of a template: what a sandbox from it starts with.
type Build struct {
	// ID is a UUID; the checkpoint of a build has it too.
	ID    string `json:"id"`
	State string `json:"state"`
	// Error says why it failed, FailedStep where: a number from 1 on, "base" or "finalize".
	Error      string `json:"error,omitempty"`
	FailedStep string `json:"failed_step,omitempty"`
	// Tags are those that the build gets when it is ready.
	Tags []string `json:"tags,omitempty"`
	// ImageDigest is the content address (sha256:...) of the root file system.
	ImageDigest string `json:"image_digest,omitempty"`
	ImageBytes  int64  `json:"image_bytes,omitempty"`
	// Checkpoint is empty for a build that is a root file system alone.
	Checkpoint      CheckpointKind `json:"checkpoint,omitempty"`
	CheckpointBytes int64          `json:"checkpoint_bytes,omitempty"`
	// MadeOn is where the checkpoint was made; nil where that is not known.
	MadeOn       *Origin       `json:"made_on,omitempty"`
	Resources    Resources     `json:"resources"`
	Guest        GuestSettings `json:"guest,omitzero"`
	StartCommand string        `json:"start_command,omitempty"`
	ReadyCommand string        `json:"ready_command,omitempty"`
	// Sources are what it was built from, the one that worked being Source.
	Sources []string `json:"sources,omitempty"`
	Source  string   `json:"source,omitempty"`
	// Secure is set for a snapshot of a sandbox whose agent demands a token.
	Secure     bool      `json:"secure,omitempty"`
	CreatedAt  time.Time `json:"created_at"`
	FinishedAt time.Time `json:"finished_at,omitzero"`
}

// Build returns the build with the id.
func (t *Template) Build(id string) (Build, bool) {
	i := slices.IndexFunc(t.Builds, func(b Build) bool { return b.ID == id })
	if i < 0 {
		return Build{}, false
	}
	return t.Builds[i], true
}

// Tagged returns the build that a tag means.
func (t *Template) Tagged(tag string) (Build, bool) {
	at, ok := t.Tags[tag]
	if !ok {
		return Build{}, false
	}
	return t.Build(at.BuildID)
}

// Newest returns the build that was begun last.
func (t *Template) Newest() (Build, bool) {
	if len(t.Builds) == 0 {
		return Build{}, false
	}
	return t.Builds[0], true
}
