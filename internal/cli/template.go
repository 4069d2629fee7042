package cli

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) templateCommand() *cobra.Command {
	return group(&cobra.Command{
		Use: "template", Aliases: []string{"tpl"}, Short: "Make and list what sandboxes start from",
	}, a.templateList(), a.templateShow(), a.templateBuild(), a.templateCreate(), a.templateFollow(), a.templatePull(),
		a.templatePush(), a.templateTag(), a.templateUntag(), a.templatePlacement(), a.templateSelector(), a.templateIdle(), a.templatePublic("publish", true),
		a.templatePublic("unpublish", false), a.templateRemove())
}

// kindSnapshot is the kind of template that a snapshot is.
const kindSnapshot = "snapshot"

func (a *app) templateList() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List templates", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			list, err := cn.api.ListTemplates(c.Context())
			if err != nil {
				return cn.check(err)
			}
			if !all {
				list = slices.DeleteFunc(list, func(t client.Template) bool { return t.Kind == kindSnapshot })
			}
			return a.print(list, func(w io.Writer) { templateTable(w, list) })
		},
	}
	c.Flags().BoolVar(&all, "all", false, "snapshots too")
	return c
}

func templateTable(w io.Writer, list []client.Template) {
	row(w, "NAME", "ID", "STATE", "CPU", "MEMORY", "DISK", "SIZE", "PROCESSES", "TAGS", "UPDATED", "ERROR")
	for _, t := range list {
		b := current(t)
		row(w, orDash(strings.Join(t.Names, ",")), t.ID, orDash(b.State), cpus(b.Resources.MilliCPU), sizeOrDash(b.Resources.MemoryBytes),
			sizeOrDash(b.Resources.DiskBytes), sizeOrDash(b.ImageBytes), sizeOrDash(b.CheckpointBytes),
			orDash(strings.Join(slices.Sorted(maps.Keys(t.Tags)), ",")), ago(t.UpdatedAt), orDash(newestError(t)))
	}
}

// current is the build that the template's name without a tag means, else the newest; its zero value where there is none.
func current(t client.Template) client.TemplateBuild {
	tag := t.Tags["default"]
	if i := slices.IndexFunc(t.Builds, func(b client.TemplateBuild) bool { return b.ID == tag.BuildID }); i >= 0 {
		return t.Builds[i]
	}
	if len(t.Builds) > 0 {
		return t.Builds[0]
	}
	return client.TemplateBuild{}
}

func newestError(t client.Template) string {
	if len(t.Builds) == 0 {
		return ""
	}
	return t.Builds[0].Error
}

func (a *app) templateShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show one template, its tags and builds", Args: exactly(1, "one template name or id"),
		ValidArgsFunction: a.complete(1, templateNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			t, err := cn.api.GetTemplate(c.Context(), args[0])
			if err != nil {
				return cn.check(err)
			}
			return a.print(t, func(w io.Writer) { templateDetail(w, t) })
		},
	}
}

func templateDetail(w io.Writer, t client.Template) {
	b := current(t)
	row(w, "name", orDash(strings.Join(t.Names, ", ")))
	row(w, "id", t.ID)
	row(w, "kind", t.Kind)
	row(w, "public", strconv.FormatBool(t.Public))
	if t.SourceSandbox != "" {
		row(w, "of sandbox", t.SourceSandbox)
	}
	row(w, "cpu", cpus(b.Resources.MilliCPU))
	row(w, "memory", sizeOrDash(b.Resources.MemoryBytes))
	row(w, "disk", sizeOrDash(b.Resources.DiskBytes))
	row(w, "user", orDash(b.Guest.User))
	row(w, "directory", orDash(b.Guest.WorkDir))
	row(w, "environment", pairs(b.Guest.Env))
	row(w, "start command", orDash(b.StartCommand))
	row(w, "ready command", orDash(b.ReadyCommand))
	for _, tag := range slices.Sorted(maps.Keys(t.Tags)) {
		row(w, "tag "+tag, fmt.Sprintf("build %s, %s", t.Tags[tag].BuildID, ago(t.Tags[tag].At)))
	}
	for _, b := range t.Builds {
		text := fmt.Sprintf("%s, %s, image %s", b.State, ago(cmp.Or(b.FinishedAt, b.CreatedAt)), sizeOrDash(b.ImageBytes))
		if b.Checkpoint != "" {
			text += fmt.Sprintf(", %s %s", b.Checkpoint, size(b.CheckpointBytes))
		}
		if b.Source != "" {
			text += ", from " + b.Source
		}
		if b.Error != "" {
			text += ": " + b.Error
		}
		row(w, "build "+b.ID, text)
	}
}

// resourceFlags are how large a template's sandboxes are.
type resourceFlags struct {
	cpu          float64
	memory, disk string
}

func (f *resourceFlags) add(c *cobra.Command, otherwise string) {
	c.Flags().Float64Var(&f.cpu, "cpu", 0, "processors of its sandboxes; default: "+otherwise)
	c.Flags().StringVar(&f.memory, "memory", "", "memory of its sandboxes, such as 1GiB; default: "+otherwise)
	c.Flags().StringVar(&f.disk, "disk", "", "disk of its sandboxes, such as 20GiB; default: "+otherwise)
}

func (f *resourceFlags) read() (r client.Resources, err error) {
	if f.cpu < 0 {
		return r, &usageError{fmt.Errorf("cpu %g: want a number of processors, such as 2 or 0.5", f.cpu)}
	}
	r.MilliCPU = int64(f.cpu * 1000)
	if r.MemoryBytes, err = parseSize("memory", f.memory); err != nil {
		return r, err
	}
	r.DiskBytes, err = parseSize("disk", f.disk)
	return r, err
}

// registryFlags are who to be at a registry.
func registryFlags(c *cobra.Command, user, password *string) {
	c.Flags().StringVar(user, "registry-username", "", "user `name` at the registry")
	c.Flags().StringVar(password, "registry-password", "", "`password` or token at the registry")
}

func (a *app) templateCreate() *cobra.Command {
	var req client.CreateTemplate
	var res resourceFlags
	c := &cobra.Command{
		Use: "create NAME --from SOURCE", Short: "Make a template from an image, or make it anew", Args: exactly(1, "one template name"),
		Long: "Make a template from the first source that works: a registry reference (python:3.13), oci:PATH, docker-archive:PATH,\n" +
			"dir:PATH or debian:SUITE. PATH is one on the daemon's machine. `template build` makes one from a Dockerfile.",
		Example: "  cloister template create tools --from registry.example.org/tools:1 --memory 1GiB",
		RunE: func(c *cobra.Command, args []string) (err error) {
			if len(req.Sources) == 0 {
				return &usageError{fmt.Errorf("template create %s: want at least one --from", args[0])}
			}
			req.Name = args[0]
			if req.Resources, err = res.read(); err != nil {
				return err
			}
			return a.startBuild(c.Context(), req, true)
		},
	}
	c.Flags().StringArrayVar(&req.Sources, "from", nil, "`source` of the root file system; may be given again, tried in order")
	registryFlags(c, &req.Username, &req.Password)
	res.add(c, "the daemon's")
	return c
}

func (a *app) templatePull() *cobra.Command {
	var req client.CreateTemplate
	var res resourceFlags
	c := &cobra.Command{
		Use: "pull SOURCE --name NAME", Short: "Take a template from a registry or archive", Args: exactly(1, "one source"),
		Long: "Take a template that `template push` wrote, here or in another cluster: from a registry (registry.example.org/app:1),\n" +
			"oci:PATH or docker-archive:PATH. PATH is one on the daemon's machine.",
		Example: "  cloister template pull registry.example.org/app:1 --name app",
		RunE: func(c *cobra.Command, args []string) (err error) {
			if req.Name == "" {
				return &usageError{fmt.Errorf("template pull %s: want --name, the name of the template that it becomes", args[0])}
			}
			req.Sources = args
			if req.Resources, err = res.read(); err != nil {
				return err
			}
			return a.startBuild(c.Context(), req, true)
		},
	}
	c.Flags().StringVar(&req.Name, "name", "", "`name` of the template, with a tag or without")
	registryFlags(c, &req.Username, &req.Password)
	res.add(c, "those that it was pushed with, else the daemon's")
	return c
}

func (a *app) templatePush() *cobra.Command {
	var req client.PushTemplate
	c := &cobra.Command{
		Use: "push NAME[:TAG] DESTINATION", Short: "Write a template to a registry or archive", Args: exactly(2, "a template and a destination"),
		Long: "Write a template to a registry (registry.example.org/app:1), oci:PATH or docker-archive:PATH, from where `template pull`\n" +
			"takes it. PATH is one on the daemon's machine.",
		Example:           "  cloister template push app:v2 registry.example.org/app:2\n  cloister template push app oci:/var/tmp/app",
		ValidArgsFunction: a.complete(1, templateNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			req.Destination = args[1]
			started, err := cn.api.PushTemplate(c.Context(), args[0], req)
			if err != nil {
				return cn.check(err)
			}
			last, err := a.followBuild(c.Context(), cn, started.BuildID)
			if err != nil {
				return err
			}
			if last.State == client.BuildFailed {
				return fmt.Errorf("push template %s to %s: %s", args[0], args[1], last.Error)
			}
			return a.print(last, func(w io.Writer) { row(w, fmt.Sprintf("template %s is at %s", args[0], args[1])) })
		},
	}
	registryFlags(c, &req.Username, &req.Password)
	return c
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
