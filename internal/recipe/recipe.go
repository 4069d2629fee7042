// Package recipe is what a template is built by: steps on top of an image, and what they mean.
//
// It owns the form of a step, the keys by which the results of steps are cached, and the reading of Dockerfiles and build
// contexts. It runs nothing and keeps nothing; its values are safe to share.
package recipe

// The types of step.
const (
	Copy    = "COPY"
	Env     = "ENV"
	Run     = "RUN"
	WorkDir = "WORKDIR"
	User    = "USER"
)

// Step is one step of a recipe.
type Step struct {
	// Type is one of the five above.
	Type string `json:"type"`
	// Args are, by type: COPY source, destination, owner or "", octal mode or ""; ENV name, value, name, value and so on;
	// RUN command, and the user that runs it or ""; WORKDIR directory; USER user.
	Args []string `json:"args"`
	// FilesHash names the gzipped tar archive that COPY takes its files from.
	FilesHash string `json:"files_hash,omitempty"`
	// Force runs the step, and so all that follow, though its result is cached.
	Force bool `json:"force,omitempty"`
}
