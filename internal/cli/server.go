package cli

import (
	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

func (a *app) serverCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "server", Short: "Run a server whose sandboxes run on other machines", Args: exactly(0, "no arguments"),
		Example: "  cloister server --detach\n  cloister server --proxy-addr '' # its proxies are other machines\n  cloister token create # and then, on the others: cloister join",
		Long: "Run what answers the API and decides, with a proxy for sandbox traffic unless --proxy-addr is empty. It opens --cluster-addr,\n" +
			"where machines join and members come in. Sandboxes run on the machines that joined; the default template is built by the first.",
	}
	return a.starts(c, func(cfg *config.Config) (daemon.Roles, error) {
		return daemon.Roles{Server: true, Proxy: cfg.ProxyAddr != ""}, nil
	})
}
