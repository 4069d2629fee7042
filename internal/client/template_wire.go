package client

import "time"

// Template is one entry of GET /v1/templates, and GET /v1/templates/{id or name}.
type Template struct {
	ID     string   `json:"id"`
	Kind   string   `json:"kind"` // template, snapshot
	Names  []string `json:"names"`
	Public bool     `json:"public"`
	// Tags says which build each tag means; "default" is that of a name without a tag.
	Tags map[string]Tag `json:"tags"`
	// Builds are the newest first.
	Builds        []TemplateBuild `json:"builds"`
	SourceSandbox string          `json:"source_sandbox,omitempty"`
	// Placement, NodeSelector, NodeAffinity, Tolerations and IdleTimeout are as in UpdateTemplate; empty where nothing is set.
	Placement    string    `json:"placement,omitempty"`
	NodeSelector string    `json:"node_selector,omitempty"`
	NodeAffinity string    `json:"node_affinity,omitempty"`
	Tolerations  string    `json:"tolerations,omitempty"`
	IdleTimeout  bool      `json:"idle_timeout,omitempty"`
	CreatedAt    time.Time `json:"created_at"`
	UpdatedAt    time.Time `json:"updated_at"`
}

// Tag is what one tag of a template means.
type Tag struct {
	BuildID string    `json:"build_id"`
	At      time.Time `json:"at"`
}

// TemplateBuild is one build in a Template.
type TemplateBuild struct {
	ID              string        `json:"id"`
	State           string        `json:"state"` // waiting, building, ready, failed
	Error           string        `json:"error,omitempty"`
	FailedStep      string        `json:"failed_step,omitempty"`
	ImageDigest     string        `json:"image_digest,omitempty"`
	ImageBytes      int64         `json:"image_bytes,omitempty"`
	Checkpoint      string        `json:"checkpoint,omitempty"` // memory, files; absent for a root file system alone
	CheckpointBytes int64         `json:"checkpoint_bytes,omitempty"`
	Resources       Resources     `json:"resources"`
	Guest           GuestSettings `json:"guest,omitzero"`
	StartCommand    string        `json:"start_command,omitempty"`
	ReadyCommand    string        `json:"ready_command,omitempty"`
	Source          string        `json:"source,omitempty"`
	CreatedAt       time.Time     `json:"created_at"`
	FinishedAt      time.Time     `json:"finished_at,omitzero"`
}

// GuestSettings is what every process of a sandbox starts with.
type GuestSettings struct {
	Env     map[string]string `json:"env,omitempty"`
	User    string            `json:"user,omitempty"`
	WorkDir string            `json:"work_dir,omitempty"`
}

// CreateTemplate is the body of POST /v1/templates: make or rebuild a template. The answer (202) is a StartedBuild, to
// be followed with GET /v1/builds/{id}.
type CreateTemplate struct {
	// Name is [namespace/]alias[:tag].
	Name string   `json:"name"`
	Tags []string `json:"tags,omitempty"`
	// Either Sources (an image reference, oci:PATH, docker-archive:PATH, dir:PATH or debian:SUITE, tried in order) or
	// FromTemplate, a name or id.
	Sources      []string  `json:"sources,omitempty"`
	FromTemplate string    `json:"from_template,omitempty"`
	Resources    Resources `json:"resources,omitzero"`
	Username     string    `json:"registry_username,omitempty"`
	Password     string    `json:"registry_password,omitempty"`
	// Steps run in order, in a sandbox.
	Steps        []BuildStep `json:"steps,omitempty"`
	StartCommand string      `json:"start_command,omitempty"`
	ReadyCommand string      `json:"ready_command,omitempty"`
	// Force uses nothing from the step cache.
	Force bool `json:"force,omitempty"`
}

// BuildStep is one step of a recipe: COPY [src, dest, owner, mode], ENV [name, value, ...], RUN [command, user],
// WORKDIR [directory] or USER [user].
type BuildStep struct {
	Type string   `json:"type"`
	Args []string `json:"args"`
	// FilesHash names the archive that COPY takes its files from, see UploadFile.
	FilesHash string `json:"files_hash,omitempty"`
	Force     bool   `json:"force,omitempty"`
}

// StartedBuild answers POST /v1/templates and POST /v1/templates/{id}/push.
type StartedBuild struct {
	TemplateID string `json:"template_id"`
	BuildID    string `json:"build_id"`
}

// Build is GET /v1/builds/{id}?offset=N&wait=SECONDS. DELETE /v1/builds/{id} cancels it.
type Build struct {
	ID         string     `json:"id"`
	TemplateID string     `json:"template_id,omitempty"`
	State      string     `json:"state"` // waiting, building, ready, failed
	Step       string     `json:"step,omitempty"`
	Progress   float64    `json:"progress"`
	Entries    []LogEntry `json:"entries"`
	Error      string     `json:"error,omitempty"`
	FailedStep string     `json:"failed_step,omitempty"`
	// Result is what the build made; absent until it is ready.
	Result *TemplateBuild `json:"result,omitempty"`
}

// Upload is GET /v1/files/{hash}, and answers PUT /v1/files/{hash}?offset=N&complete=BOOL, whose body is a part of the
// gzipped tar archive that belongs at the offset.
type Upload struct {
	Hash     string `json:"hash"`
	Bytes    int64  `json:"bytes"`
	Complete bool   `json:"complete"`
}

// SetTags is the body of PUT /v1/templates/{id or name}/tags: Name with its tag says which build gets the Tags. DELETE
// /v1/templates/{id or name}/tags/{tag} takes one away.
type SetTags struct {
	From string   `json:"from,omitempty"` // default "default"
	Tags []string `json:"tags"`
}

// UpdateTemplate is the body of PATCH /v1/templates/{id or name}; the answer is a Template.
type UpdateTemplate struct {
	Public *bool `json:"public,omitempty"`
	// Placement is how many nodes have it before it is asked for there: on_demand, all or a number from 1 on; empty is as the
	// cluster says.
	Placement *string `json:"placement,omitempty"`
	// NodeSelector, NodeAffinity and Tolerations say where its sandboxes may go, in the words of a create's metadata.
	NodeSelector *string `json:"node_selector,omitempty"`
	NodeAffinity *string `json:"node_affinity,omitempty"`
	Tolerations  *string `json:"tolerations,omitempty"`
	// IdleTimeout has the timeouts of its sandboxes count from their last use.
	IdleTimeout *bool `json:"idle_timeout,omitempty"`
}

// PushTemplate is the body of POST /v1/templates/{id or name[:tag]}/push. The answer (202) is a StartedBuild.
type PushTemplate struct {
	// Destination is a registry reference, oci:PATH or docker-archive:PATH.
	Destination string `json:"destination"`
	Username    string `json:"registry_username,omitempty"`
	Password    string `json:"registry_password,omitempty"`
}
