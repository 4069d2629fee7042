package cli

import (
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) eventCommand() *cobra.Command {
	var filter client.ListEvents
	var since time.Duration
	c := &cobra.Command{
		Use: "events", Short: "Show what happened, oldest first", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			if since > 0 {
				filter.Since = time.Now().Add(-since)
			}
			all, err := cn.api.Events(c.Context(), filter)
			if err != nil {
				return cn.check(err)
			}
			return a.print(all, func(w io.Writer) {
				row(w, "TIME", "TYPE", "SANDBOX", "NODE", "MESSAGE")
				for _, e := range all {
					row(w, e.Time.Local().Format(time.DateTime), e.Type, orDash(e.SandboxID), orDash(e.NodeID), e.Message)
				}
			})
		},
	}
	f := c.Flags()
	f.StringVar(&filter.SandboxID, "sandbox", "", "only of the sandbox with this `id`")
	f.StringVar(&filter.Type, "type", "", "only of this `type` (created, killed, timed_out, failed, lost, ...)")
	f.DurationVar(&since, "since", 0, "only of this last `span`, such as 1h")
	f.IntVar(&filter.Limit, "limit", 100, "at most this `many`")
	return c
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
