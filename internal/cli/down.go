package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

func (a *app) downCommand() *cobra.Command {
	var purge bool
	var wait time.Duration
	c := &cobra.Command{
		Use: "down", Short: "Stop the daemon of this machine; sandboxes go on unless --purge", Args: exactly(0, "no arguments"),
		Long: "Stop the daemon of this machine. Sandboxes go on running, and the next `cloister up` finds them.\n" +
			"With --purge end every sandbox and remove all that Cloister owns here: processes, namespaces, links, nftables tables,\n" +
			"cgroups, and the data directory with templates, keys and history.",
	}
	c.Flags().BoolVar(&purge, "purge", false, "end every sandbox and remove everything that Cloister owns on this machine")
	c.Flags().DurationVar(&wait, "wait", 30*time.Second, "give the daemon this long to finish its requests, then kill it")
	config.Flags(c.Flags())
	c.Flags().VisitAll(func(f *pflag.Flag) { // every setting of `up` is known here, so that its arguments can be given again
		f.Hidden = f.Hidden || !slices.Contains([]string{"purge", "wait", "data-dir", "config"}, f.Name)
	})
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := config.Load(c.Flags(), a.environ)
		if err != nil {
			return &usageError{err}
		}
		if os.Geteuid() != 0 {
			return errors.New("`cloister down` ends processes of root: run it as root (sudo cloister down)")
		}
		stopped, err := stopDaemon(c.Context(), cfg.DataDir, wait)
		if err != nil {
			return err
		}
		_, gone := os.Stat(cfg.DataDir)
		switch {
		case purge && errors.Is(gone, os.ErrNotExist):
			_, _ = fmt.Fprintf(a.err, "nothing to remove: %s does not exist\n", cfg.DataDir)
		case purge:
			if err := daemon.Purge(c.Context(), cfg, daemon.Options{Version: version, LogTo: a.err}); err != nil {
				return err
			}
			_, _ = fmt.Fprintf(a.err, "removed everything of %s\n", cfg.DataDir)
		case stopped:
			_, _ = fmt.Fprintln(a.err, "stopped; sandboxes go on running")
		default:
			_, _ = fmt.Fprintf(a.err, "no daemon runs on %s\n", cfg.DataDir)
		}
		return nil
	}
	return c
}

// stopDaemon ends the daemon that holds dir, by force after wait, and reports whether there was one.
func stopDaemon(ctx context.Context, dir string, wait time.Duration) (bool, error) {
	h, held := daemon.HolderOf(dir)
	if !held {
		return false, nil
	}
	if h.PID <= 1 {
		return false, fmt.Errorf("data directory %s is in use, but its lock does not say by whom", dir)
	}
	if err := syscall.Kill(h.PID, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) { // it may be ending by itself
		return false, fmt.Errorf("stop daemon %d: %w", h.PID, err)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if waitFree(ctx, dir) {
		return true, nil
	}
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return false, ctx.Err()
	}
	if err := syscall.Kill(h.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return false, fmt.Errorf("kill daemon %d: %w", h.PID, err)
	}
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if !waitFree(ctx, dir) {
		return false, fmt.Errorf("daemon %d still holds %s after SIGKILL", h.PID, dir)
	}
	return true, nil
}

// waitFree waits until nobody holds dir.
func waitFree(ctx context.Context, dir string) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, held := daemon.HolderOf(dir); !held {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}
