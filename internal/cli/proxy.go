package cli

import (
	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

func (a *app) proxyCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "proxy", Short: "Run the proxy that this machine joined as", Args: exactly(0, "no arguments"),
		Example: "  cloister join 192.0.2.1 --token TOKEN --role proxy\n  cloister proxy --detach",
		Long: "Run the proxy that `cloister join --role proxy` made of this machine. It takes the routing table from the server and goes on\n" +
			"with what it has while no server is reachable.",
	}
	return a.starts(c, func(*config.Config) (daemon.Roles, error) { return daemon.Roles{Proxy: true}, nil })
}
