package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) snapshotCommand() *cobra.Command {
	return group(&cobra.Command{
		Use: "snapshot", Aliases: []string{"snap"}, Short: "List and remove what was kept of sandboxes",
		Long: "List and remove what was kept of sandboxes; `sandbox snapshot` makes one.",
	}, a.snapshotList(), a.snapshotShow(), a.snapshotRemove())
}

// snapshots returns every snapshot that the filter chooses.
func (c *conn) snapshots(ctx context.Context, filter client.ListSnapshots) ([]client.Snapshot, error) {
	filter.Limit = 1000
	all := []client.Snapshot{}
	for s, err := range c.api.AllSnapshots(ctx, filter) {
		if err != nil {
			return nil, c.check(err)
		}
		all = append(all, s)
	}
	return all, nil
}

func (a *app) snapshotList() *cobra.Command {
	var filter client.ListSnapshots
	c := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List snapshots, newest first", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.snapshots(c.Context(), filter)
			if err != nil {
				return err
			}
			return a.print(all, func(w io.Writer) {
				row(w, "ID", "NAMES", "SANDBOX", "KEPT", "SIZE", "CPU", "MEMORY", "CREATED")
				for _, s := range all {
					row(w, s.ID, orDash(strings.Join(s.Names, ",")), orDash(s.SandboxID), s.Kind, size(s.Bytes),
						cpus(s.Resources.MilliCPU), size(s.Resources.MemoryBytes), ago(s.CreatedAt))
				}
			})
		},
	}
	c.Flags().StringVar(&filter.SandboxID, "sandbox", "", "only those of this sandbox `id`")
	c.Flags().StringVar(&filter.Name, "name", "", "only those of this `name`")
	_ = c.RegisterFlagCompletionFunc("sandbox", a.complete(0, sandboxNames)) // the flag exists: it was made above
	return c
}

func (a *app) snapshotShow() *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show one snapshot", Args: exactly(1, "one snapshot id or name"), ValidArgsFunction: a.complete(1, snapshotNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.snapshots(c.Context(), client.ListSnapshots{})
			if err != nil {
				return err
			}
			i := slices.IndexFunc(all, func(s client.Snapshot) bool { return calledSo(s, args[0]) })
			if i < 0 {
				return &client.APIError{Code: 404, Message: fmt.Sprintf("snapshot %q does not exist; `cloister snapshot ls` lists them", args[0])}
			}
			return a.print(all[i], func(w io.Writer) { snapshotDetail(w, all[i]) })
		},
	}
}

// calledSo reports whether ref is an id or a name of the snapshot; without a tag it means that of name:default.
func calledSo(s client.Snapshot, ref string) bool {
	return slices.ContainsFunc(append([]string{s.ID, s.TemplateID}, s.Names...), func(name string) bool {
		return name == ref || name == ref+":default"
	})
}

func snapshotDetail(w io.Writer, s client.Snapshot) {
	row(w, "id", s.ID)
	row(w, "names", orDash(strings.Join(s.Names, ", ")))
	row(w, "sandbox", orDash(s.SandboxID))
	row(w, "kept", s.Kind)
	row(w, "size", size(s.Bytes))
	row(w, "cpu", cpus(s.Resources.MilliCPU))
	row(w, "memory", size(s.Resources.MemoryBytes))
	row(w, "disk", size(s.Resources.DiskBytes))
	row(w, "created", s.CreatedAt.Local().Format(time.DateTime)+" ("+ago(s.CreatedAt)+")")
}

func (a *app) snapshotRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm ID...", Short: "Remove snapshots and print their ids", ValidArgsFunction: a.complete(0, snapshotNames),
		Long: "Remove snapshots. What a running or paused sandbox was made of is kept on disk until that ends.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 || slices.Contains(args, "") {
				return &usageError{fmt.Errorf("snapshot rm: want one or more snapshot ids or names, got %s", quoted(args))}
			}
			return nil
		},
		RunE: func(c *cobra.Command, ids []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			removed := []string{}
			var failed []error
			for _, id := range ids {
				if err := cn.api.DeleteSnapshot(c.Context(), id); err != nil {
					failed = append(failed, cn.check(err))
				} else {
					removed = append(removed, id)
				}
				if c.Context().Err() != nil {
					break
				}
			}
			err = a.print(removed, func(w io.Writer) {
				for _, id := range removed {
					row(w, id)
				}
			})
			return errors.Join(append(failed, err)...)
		},
	}
}

func snapshotNames(ctx context.Context, cn *conn) ([]string, error) {
	return snapshotsOf(ctx, cn, client.ListSnapshots{})
}

func snapshotsOf(ctx context.Context, cn *conn, filter client.ListSnapshots) ([]string, error) {
	all, err := cn.snapshots(ctx, filter)
	out := make([]string, 0, len(all))
	for _, s := range all {
		out = append(out, s.ID+"\t"+printable(fmt.Sprintf("%s of %s, %s", s.Kind, orDash(s.SandboxID), ago(s.CreatedAt))))
	}
	return out, err
}
