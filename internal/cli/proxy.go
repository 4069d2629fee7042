package cli

import (
	"context"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

func (a *app) proxyCommand() *cobra.Command {
	c := group(&cobra.Command{
		Use: "proxy", Short: "Run this machine's proxy, and look at all proxies",
		Example: "  cloister join 192.0.2.1 --token TOKEN --role proxy\n  cloister proxy --detach",
		Long: "Without a command: run the proxy that `cloister join --role proxy` made of this machine. It takes the routing table from\n" +
			"the server and goes on with what it has while no server is reachable. GET /readyz on its address says whether it should\n" +
			"get requests; on SIGTERM it first stops saying so and leaves the list of proxies, after proxy-drain-delay takes no more\n" +
			"connections, then ends what is open. Where it cannot dial the server, it waits on --link-addr for the server to dial it, which\n" +
			"lists it in --proxies.",
	}, a.proxyList(), a.proxyRemove())
	return a.starts(c, func(*config.Config) (daemon.Roles, error) { return daemon.Roles{Proxy: true}, nil })
}

func (a *app) proxyList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List proxies", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.api.Proxies(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.print(all, func(w io.Writer) {
				row(w, "ID", "NAME", "STATE", "ADDRESS", "VERSION", "STARTED", "HEARD", "BEHIND", "CONNECTIONS", "REQUESTS")
				for _, p := range all {
					row(w, orDash(p.ID), orDash(p.Name), p.State, orDash(p.Address), p.Version, ago(p.Since), ago(p.HeardAt), behind(p),
						strconv.Itoa(p.Connections), strconv.Itoa(p.Requests))
				}
			})
		},
	}
}

// behind writes how many changes a proxy has not taken.
func behind(p client.Proxy) string {
	if p.Behind == nil {
		return "-"
	}
	return strconv.FormatInt(*p.Behind, 10)
}

func (a *app) proxyRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm PROXY", Aliases: []string{"remove"}, Short: "Take a proxy out of the cluster; its certificates are worth nothing from then on",
		Example: "  cloister proxy rm edge-1", Args: exactly(1, "one proxy, by name or id"), ValidArgsFunction: a.complete(1, proxyNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			if err := cn.api.RemoveProxy(c.Context(), args[0]); err != nil {
				return cn.check(err)
			}
			return a.print(map[string]string{"removed": args[0]}, func(io.Writer) {})
		},
	}
}

func proxyNames(ctx context.Context, cn *conn) ([]string, error) {
	all, err := cn.api.Proxies(ctx)
	out := make([]string, 0, len(all))
	for _, p := range all {
		if p.ID != "local" && p.ID != "" {
			out = append(out, p.Name+"\t"+printable(p.State+" "+p.ID))
		}
	}
	return out, err
}
