package cli

import (
	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

// nodeRun makes the group `cloister node` start a node where no other command of it is named.
func (a *app) nodeRun(c *cobra.Command) *cobra.Command {
	c.Long = "Without a command: run the node that `cloister join` made of this machine. It starts also when no server is reachable, with\n" +
		"the sandboxes that it has; `cloister sandbox ls|create|exec|kill` on it then work for the node alone."
	c.Example = "  cloister node --detach"
	return a.starts(c, func(*config.Config) (daemon.Roles, error) { return daemon.Roles{Node: true}, nil })
}
