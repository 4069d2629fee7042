package cli

import (
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) nodeCommand() *cobra.Command {
	return group(&cobra.Command{Use: "node", Short: "Look at the machines that run sandboxes"}, &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List nodes", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.api.Nodes(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.print(all, func(w io.Writer) {
				row(w, "ID", "NAME", "STATE", "SANDBOXES", "WARM", "CPU", "MEMORY", "DISK", "ENGINES", "SEEN")
				for _, n := range all {
					row(w, n.ID, n.Name, n.State, strconv.Itoa(n.Sandboxes), strconv.Itoa(n.Warm),
						cpus(n.Allocated.MilliCPU)+"/"+cpus(n.Capacity.MilliCPU),
						size(n.Allocated.MemoryBytes)+"/"+size(n.Capacity.MemoryBytes),
						size(n.Allocated.DiskBytes)+"/"+size(n.Capacity.DiskBytes),
						strings.Join(n.Engines, ","), ago(n.LastSeenAt))
				}
			})
		},
	})
}
