package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

func (a *app) joinCommand() *cobra.Command {
	var detach, noStart bool
	var o daemon.JoinOptions
	c := &cobra.Command{
		Use: "join SERVER --token TOKEN", Short: "Make this machine a member of a cluster, and run its part",
		Args: exactly(1, "the server's address, as HOST or HOST:PORT"),
		Long: "Make this machine a node or a proxy of the cluster whose server is at SERVER, and run that role. The token, from `cloister token\n" +
			"create` on the server, also says which server is the right one. The machine keeps its identity in the data directory: repeating\n" +
			"the command goes on where it was, and `cloister node` or `cloister proxy` starts it again.",
		Example: "  cloister join 192.0.2.1 --token TOKEN --detach\n  cloister join 192.0.2.1 --token TOKEN --label rack=b --address 192.0.2.7\n" +
			"  cloister join 192.0.2.1 --token TOKEN --role proxy --proxy-addr 0.0.0.0:3002 --insecure-listen",
	}
	f := c.Flags()
	f.StringVar(&o.Token, "token", "", "join `token`, from `cloister token create` on the server [CLOISTER_JOIN_TOKEN]")
	f.StringVar(&o.Role, "role", "node", "what the machine becomes: `node` or proxy, as the token allows")
	f.StringVar(&o.Name, "name", "", "`name` in lists; default: node-name, which is the host name")
	f.StringArrayVar(&o.Labels, "label", nil, "label of the node, as `KEY=VALUE`; may be given again")
	f.StringVar(&o.Address, "address", "", "`IP` or HOST:PORT by which other machines reach this node; default: its address on the way to the server")
	f.BoolVar(&noStart, "no-start", false, "only keep the identity; cloister node or cloister proxy starts the role")
	detachFlag(c, &detach)
	config.Flags(f)
	f.VisitAll(func(f *pflag.Flag) { // every setting of the role is known here, the page of settings tells of them
		own := []string{"token", "role", "name", "label", "address", "no-start", "detach", "data-dir", "config", "help"}
		f.Hidden = f.Hidden || !slices.Contains(own, f.Name)
	})
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"node", "proxy"}, cobra.ShellCompDirectiveNoFileComp))
	c.RunE = func(c *cobra.Command, args []string) error {
		o.Server = args[0]
		return a.join(c, o, detach, noStart)
	}
	return c
}

func (a *app) join(c *cobra.Command, o daemon.JoinOptions, detach, noStart bool) error {
	cfg, err := config.Load(c.Flags(), a.environ)
	if err != nil {
		return &usageError{err}
	}
	if err := (daemon.Roles{Node: o.Role == "node", Proxy: o.Role == "proxy"}).Check(cfg); err != nil {
		return &usageError{err}
	}
	if o.Token == "" {
		o.Token = config.JoinToken(a.environ)
	}
	if o.Token == "" {
		return &usageError{errors.New("join: want --token TOKEN; `cloister token create` on the server makes one")}
	}
	if os.Geteuid() != 0 {
		return errors.New("`cloister join` keeps an identity in " + cfg.DataDir + " and makes network namespaces: run it as root (sudo cloister join)")
	}
	o.Version, o.Notify = version, func(message string) { _, _ = fmt.Fprintln(a.err, message) }
	m, err := daemon.Join(c.Context(), cfg, o)
	if err != nil {
		return err
	}
	switch {
	case m.Running:
		return a.print(m, func(w io.Writer) {
			row(w, fmt.Sprintf("already %s %s (%s) of cluster %s, and running", m.Role, m.ID, m.Name, short(m.ClusterID)))
		})
	case noStart:
		return a.print(m, func(w io.Writer) {
			row(w, fmt.Sprintf("joined as %s %s (%s) of cluster %s; `cloister %s` starts it", m.Role, m.ID, m.Name, short(m.ClusterID), m.Role))
		})
	case detach:
		return a.startDetached(c.Context(), cfg, append(append([]string{m.Role}, settingArgs(c)...), "--"+eventsFlag))
	}
	return a.startHere(c, cfg, daemon.Roles{Node: m.Role == "node", Proxy: m.Role == "proxy"}, false)
}
