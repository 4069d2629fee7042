package cli

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

func (a *app) leaveCommand() *cobra.Command {
	var force bool
	var wait time.Duration
	c := &cobra.Command{
		Use: "leave", Short: "Take this machine out of the cluster that it joined", Args: exactly(0, "no arguments"),
		Long: "Take this machine out of its cluster, stop its role, and remove its identity and what it kept. A node that has sandboxes is\n" +
			"refused: `cloister node drain` on the server moves them away first. With --force they end, and a machine leaves also when no\n" +
			"server is reachable; `cloister node rm` there then forgets it.",
	}
	c.Flags().BoolVar(&force, "force", false, "leave although sandboxes are here, which end, or no server is reachable")
	c.Flags().DurationVar(&wait, "wait", 30*time.Second, "give the daemon this long to finish its requests, then kill it")
	config.Flags(c.Flags())
	c.Flags().VisitAll(func(f *pflag.Flag) {
		f.Hidden = f.Hidden || !slices.Contains([]string{"force", "wait", "data-dir", "config", "help"}, f.Name)
	})
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := config.Load(c.Flags(), a.environ)
		if err != nil {
			return &usageError{err}
		}
		if os.Geteuid() != 0 {
			return errors.New("`cloister leave` ends processes of root: run it as root (sudo cloister leave)")
		}
		m, err := daemon.Leave(c.Context(), cfg, force)
		if err != nil {
			return err
		}
		if _, err := stopDaemon(c.Context(), cfg.DataDir, wait); err != nil {
			return err
		}
		if err := daemon.Purge(c.Context(), cfg, daemon.Options{Version: version, LogTo: a.err}); err != nil {
			return err
		}
		if m.ClusterID == "" {
			_, _ = fmt.Fprintf(a.err, "%s had not finished joining; nothing of it is kept in %s\n", m.Name, cfg.DataDir)
			return nil
		}
		_, _ = fmt.Fprintf(a.err, "%s left cluster %s; nothing of it is kept in %s\n", m.Name, short(m.ClusterID), cfg.DataDir)
		return nil
	}
	return c
}
