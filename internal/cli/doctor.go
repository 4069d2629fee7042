package cli

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
	"github.com/cloister-dev/cloister/internal/install"
)

func (a *app) doctorCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "doctor", Short: "Check whether this machine is fit to run sandboxes", Args: exactly(0, "no arguments"),
		Long: "Check kernel, control groups, namespaces, nftables, disk, memory, ports and address ranges. Each finding that is not ok\n" +
			"comes with its remedy. The exit code is 1 when something keeps sandboxes from running.",
	}
	config.Flags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := config.Load(c.Flags(), a.environ)
		if err != nil {
			return &usageError{err}
		}
		findings := daemon.Preflight(c.Context(), cfg)
		if err := a.print(findings, func(w io.Writer) {
			for _, f := range findings {
				row(w, string(f.Level), f.Check, f.Detail)
				if f.Remedy != "" {
					row(w, "", "", "-> "+f.Remedy)
				}
			}
		}); err != nil {
			return err
		}
		if install.Worst(findings) == install.LevelFail {
			return &exitError{exitFailure}
		}
		return nil
	}
	return c
}
