package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) templateCommand() *cobra.Command {
	return group(&cobra.Command{
		Use: "template", Aliases: []string{"tpl"}, Short: "Make and list what sandboxes start from",
	}, a.templateList(), a.templateCreate(), a.templateRemove())
}

func (a *app) templateList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List templates", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.api.Templates(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.print(all, func(w io.Writer) {
				row(w, "NAME", "ID", "STATE", "CPU", "MEMORY", "DISK", "IMAGE", "SIZE", "UPDATED", "ERROR")
				for _, t := range all {
					b := newestBuild(t)
					row(w, strings.Join(t.Names, ","), t.ID, b.State, cpus(b.Resources.MilliCPU), size(b.Resources.MemoryBytes),
						size(b.Resources.DiskBytes), shortDigest(b.ImageDigest), sizeOrDash(b.ImageBytes), ago(t.UpdatedAt), orDash(b.Error))
				}
			})
		},
	}
}

// newestBuild is the build that was begun last; empty where there is none.
func newestBuild(t client.Template) client.TemplateBuild {
	if len(t.Builds) == 0 {
		return client.TemplateBuild{}
	}
	return t.Builds[0]
}

func shortDigest(d string) string {
	if hex, ok := strings.CutPrefix(d, "sha256:"); ok && len(hex) > 12 {
		return hex[:12]
	}
	if d == "" {
		return "-"
	}
	return d
}

func (a *app) templateCreate() *cobra.Command {
	var req client.CreateTemplate
	var cpu float64
	var memory, disk string
	c := &cobra.Command{
		Use: "create NAME --from SOURCE", Short: "Make a template from an image, or make it anew", Args: exactly(1, "one template name"),
		Long: "Make a template from the first source that works: a registry reference (python:3.13), oci:PATH, docker-archive:PATH,\n" +
			"dir:PATH or debian:SUITE. PATH is one on the daemon's machine.",
		Example: "  cloister template create tools --from registry.example.org/tools:1 --memory 1GiB",
		RunE: func(c *cobra.Command, args []string) error {
			if len(req.Sources) == 0 {
				return &usageError{fmt.Errorf("template create %s: want at least one --from", args[0])}
			}
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			req.Name = args[0]
			req.Resources.MilliCPU = int64(cpu * 1000)
			if req.Resources.MemoryBytes, err = parseSize("memory", memory); err != nil {
				return err
			}
			if req.Resources.DiskBytes, err = parseSize("disk", disk); err != nil {
				return err
			}
			return a.buildTemplate(c, cn, req)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&req.Sources, "from", nil, "`source` of the root file system; may be given again, tried in order")
	f.StringVar(&req.Username, "registry-username", "", "user `name` at the registry")
	f.StringVar(&req.Password, "registry-password", "", "`password` or token at the registry")
	f.Float64Var(&cpu, "cpu", 0, "processors of its sandboxes; default: the daemon's")
	f.StringVar(&memory, "memory", "", "memory of its sandboxes, such as 1GiB; default: the daemon's")
	f.StringVar(&disk, "disk", "", "disk of its sandboxes, such as 20GiB; default: the daemon's")
	return c
}

func (a *app) buildTemplate(c *cobra.Command, cn *conn, req client.CreateTemplate) error {
	t, err := cn.api.CreateTemplate(c.Context(), req)
	if err != nil {
		return cn.check(err)
	}
	show := newProgress(a.err)
	var last client.Build
	for b, err := range cn.api.FollowBuild(c.Context(), t.BuildID) {
		if err != nil {
			show.end()
			if c.Context().Err() != nil {
				show.line("the daemon goes on with the build; `cloister template ls` shows its state")
			}
			return cn.check(err)
		}
		last = b
		show.update(b.Step, b.Progress)
		for _, e := range b.Entries {
			show.line(e.Message)
		}
	}
	show.end()
	if last.State == client.BuildFailed {
		return fmt.Errorf("build template %s: %s", req.Name, last.Error)
	}
	return a.print(last, func(w io.Writer) {
		made := last.Result
		row(w, fmt.Sprintf("template %s is ready: %s from %s, %s", req.Name, shortDigest(made.ImageDigest), made.Source, size(made.ImageBytes)))
	})
}

func (a *app) templateRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME", Short: "Remove a template and free what only it used",
		Args: exactly(1, "one template name or id"), ValidArgsFunction: a.complete(1, templateNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			if err := cn.api.DeleteTemplate(c.Context(), args[0]); err != nil {
				return cn.check(err)
			}
			return a.print(map[string]string{"removed": args[0]}, func(io.Writer) {})
		},
	}
}
