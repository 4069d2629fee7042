package cli

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

func (a *app) upCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "up", Short: "Run a whole cluster of one machine", Args: exactly(0, "no arguments"),
		Example: "  cloister up --detach\n  cloister up --config /etc/cloister.yaml",
		Long: "Run server, node and proxy on this machine. The first start makes the admin key and builds the template that sandboxes\n" +
			"start from; each start ends with a sandbox that ran a command. Stopping it leaves sandboxes running; the next start finds them.\n" +
			"Other machines join with `cloister token create` here and `cloister join` there.",
	}
	return a.starts(c, func(cfg *config.Config) (daemon.Roles, error) {
		if cfg.ProxyAddr == "" {
			return daemon.Roles{}, &usageError{errors.New("proxy-addr is empty: `cloister up` runs a proxy; `cloister server` runs without one")}
		}
		return daemon.Roles{Server: true, Node: true, Proxy: true}, nil
	})
}
