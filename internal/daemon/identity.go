package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// identityDir is the directory, in the data directory, of who a machine that joined is.
const identityDir = "identity"

// choices are what a join said of the machine; later starts take them where no setting says otherwise.
type choices struct {
	Name    string            `json:"name"`
	Labels  map[string]string `json:"labels,omitempty"`
	Address string            `json:"address,omitempty"`
	// Fingerprint is that of the authority of the cluster that was asked for, before the first answer too.
	Fingerprint string `json:"fingerprint"`
	// Server is where the join was asked for.
	Server string `json:"server"`
}

func choicesPath(dataDir string) string { return filepath.Join(dataDir, identityDir, "choices.json") }

func readChoices(dataDir string) (choices, error) {
	var c choices
	text, err := os.ReadFile(choicesPath(dataDir))
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil {
		return c, fmt.Errorf("read %s: %w", choicesPath(dataDir), err)
	}
	return c, nil
}

func (c *choices) write(dataDir string) error {
	text, err := json.Marshal(c)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(choicesPath(dataDir)), 0o700)
	}
	if err == nil {
		err = writeSecret(choicesPath(dataDir), string(text)+"\n")
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", choicesPath(dataDir), err)
	}
	return nil
}

// openIdentity returns who the machine is, if it has joined or begun to. Errors: ErrNotFound.
func openIdentity(dataDir string) (*auth.Identity, error) {
	return auth.OpenIdentity(filepath.Join(dataDir, identityDir))
}

// joinedAs returns the identity of a machine that has joined in a role. Errors: ErrConflict where it has not, with what to do.
func joinedAs(cfg *config.Config, role sandbox.Role) (*auth.Identity, error) {
	id, err := openIdentity(cfg.DataDir)
	switch {
	case errors.Is(err, sandbox.ErrNotFound) && isServer(cfg.DataDir):
		return nil, serverHere(cfg.DataDir)
	case errors.Is(err, sandbox.ErrNotFound):
		return nil, sandbox.Conflictf("%s has no identity: this machine has not joined a cluster; `cloister join SERVER --token TOKEN --role %s` does that", cfg.DataDir, role)
	case err != nil:
		return nil, err
	case !id.Joined():
		return nil, sandbox.Conflictf("this machine has not finished joining: repeat `cloister join` with a token")
	case id.Member().Role != role:
		return nil, sandbox.Conflictf("this machine joined as a %s: `cloister %s` runs it, or `cloister leave` takes it out of the cluster", id.Member().Role, id.Member().Role)
	}
	return id, nil
}

// refuseMember refuses a server on the data directory of a machine that joined another. Errors: ErrConflict.
func refuseMember(dataDir string) error {
	id, err := openIdentity(dataDir)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	role := id.Member().Role
	return sandbox.Conflictf("%s belongs to a %s that joined a cluster: `cloister %s` runs it; `cloister leave` takes it out, or --data-dir names another directory",
		dataDir, role, role)
}

// isServer reports whether a server, alone or within `cloister up`, has kept something in the data directory.
func isServer(dataDir string) bool {
	_, err := os.Stat(filepath.Join(dataDir, "server")) //nolint:gosec // the operator names the directory
	return err == nil
}

func serverHere(dataDir string) error {
	return sandbox.Conflictf("%s belongs to a server (`cloister up` or `cloister server`), which has a cluster of its own: "+
		"`cloister down --purge` removes that with all its sandboxes, or --data-dir names another directory", dataDir)
}
