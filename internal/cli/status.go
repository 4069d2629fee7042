package cli

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what runs and what room is left", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			st, err := cn.api.Status(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.print(st, func(w io.Writer) { statusTable(w, st) })
		},
	}
}

func statusTable(w io.Writer, st client.Status) {
	ready := "starting"
	switch {
	case st.Ready:
		ready = "ready"
	case len(st.Nodes) > 0 && st.Nodes["ready"] == 0:
		ready = "no node is ready"
	}
	if st.Member != nil {
		memberTable(w, st.Member)
	}
	row(w, "state", fmt.Sprintf("%s, up %s", ready, strings.TrimSuffix(ago(st.StartedAt), " ago")))
	row(w, "version", st.Version)
	if st.APIURL != "" {
		row(w, "API", st.APIURL)
	}
	if st.ProxyURL != "" {
		row(w, "proxy", st.ProxyURL)
	}
	if st.Member != nil && st.Member.Role == "proxy" {
		return // it has nothing else
	}
	row(w, "nodes", counts(st.Nodes))
	row(w, "sandboxes", counts(st.Sandboxes))
	row(w, "templates", strconv.Itoa(st.Templates))
	row(w, "cpu", fmt.Sprintf("%s of %s admitted", cpus(st.Allocated.MilliCPU), cpus(st.Capacity.MilliCPU)))
	row(w, "memory", fmt.Sprintf("%s of %s admitted", size(st.Allocated.MemoryBytes), size(st.Capacity.MemoryBytes)))
	row(w, "disk", fmt.Sprintf("%s of %s admitted", size(st.Allocated.DiskBytes), size(st.Capacity.DiskBytes)))
}

func counts(m map[string]int) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if m[k] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", m[k], k))
		}
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}
