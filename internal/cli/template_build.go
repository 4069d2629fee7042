package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/recipe"
)

// buildFlags are what `template build` is called with.
type buildFlags struct {
	req          client.CreateTemplate
	res          resourceFlags
	context      string
	args         []string
	start, ready string
	noWait       bool
}

const buildHelp = `Make a template from a Dockerfile: of a directory, which is the build context too, or the file itself. Each RUN, COPY, ENV,
WORKDIR and USER is a step in a sandbox; steps that did not change come from the cache. Steps begin as root in /; unless the
file says otherwise, sandboxes of the template run as "user" in /home/user.

CMD and ENTRYPOINT become the start command: it runs when the template is made, and sandboxes start with its processes as they
are once the ready command succeeds. A .dockerignore beside the file keeps files out of the context.

Not possible, and refused: several stages, COPY --from, ADD of URLs and archives, RUN with secrets or bind mounts. LABEL,
EXPOSE, VOLUME, HEALTHCHECK, STOPSIGNAL, ONBUILD and MAINTAINER mean nothing here; a warning says so.`

const buildExample = `  cloister template build . --name app:v2 --tag latest --memory 1GiB
  cloister template build docker/Dockerfile --context . --name app --build-arg VERSION=3
  cloister template build web --name web --ready-cmd 'curl -sf http://127.0.0.1:8080'
  cloister template build . --name tools --from-template base`

func (a *app) templateBuild() *cobra.Command {
	f := &buildFlags{}
	c := &cobra.Command{
		Use: "build [DIRECTORY|DOCKERFILE] --name NAME[:TAG]", Short: "Make a template from a Dockerfile", Long: buildHelp, Example: buildExample,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 || slices.Contains(args, "") {
				return &usageError{fmt.Errorf("template build: want one directory or Dockerfile, got %s", quoted(args))}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			at := "."
			if len(args) == 1 {
				at = args[0]
			}
			return a.buildFrom(c, f, at)
		},
	}
	fl := c.Flags()
	fl.StringVarP(&f.req.Name, "name", "n", "", "`name` of the template, with a tag or without")
	fl.StringArrayVarP(&f.req.Tags, "tag", "t", nil, "`tag` that means the new build too; may be given again")
	fl.StringVar(&f.context, "context", "", "`directory` that COPY takes files from; default: that of the Dockerfile")
	fl.StringVar(&f.req.FromTemplate, "from-template", "", "template to build on, in place of the image that FROM names")
	fl.StringArrayVar(&f.args, "build-arg", nil, "`NAME=VALUE` of an ARG; may be given again")
	fl.StringVar(&f.start, "start-cmd", "", "`command` that runs in the template; default: that of CMD and ENTRYPOINT; empty: none")
	fl.StringVar(&f.ready, "ready-cmd", "", "`command` that succeeds once the start command is ready; default: wait 20 s")
	fl.BoolVar(&f.req.Force, "force", false, "run every step, also those whose results are cached")
	fl.BoolVar(&f.noWait, "no-wait", false, "print the build's id as soon as it has begun")
	f.res.add(c, "the daemon's, or those of the template to build on")
	registryFlags(c, &f.req.Username, &f.req.Password)
	_ = c.RegisterFlagCompletionFunc("from-template", a.complete(0, templateNames)) // the flag exists: it was made above
	return c
}

// defaultReady gives a start command time, as E2B's command line does.
const defaultReady = "sleep 20"

// buildFrom reads what is to be built, sends the files, and starts the build.
func (a *app) buildFrom(c *cobra.Command, f *buildFlags, at string) (err error) {
	ctx := c.Context()
	if f.req.Name == "" {
		return &usageError{errors.New("template build: want --name, such as --name app or --name app:v2")}
	}
	if f.req.Resources, err = f.res.read(); err != nil {
		return err
	}
	src, err := f.read(at)
	if err != nil {
		return err
	}
	defer func() { _ = src.context.Close() }() // it was only read
	for _, w := range src.file.Warnings {
		_, _ = fmt.Fprintf(a.err, "warning: %s: %s\n", src.name, w)
	}
	if src.file.Image != "" {
		f.req.Sources = []string{src.file.Image}
	}
	f.req.StartCommand, f.req.ReadyCommand = src.file.StartCommand, f.ready
	if c.Flags().Changed("start-cmd") {
		f.req.StartCommand = f.start
	}
	if f.req.StartCommand != "" && f.ready == "" {
		f.req.ReadyCommand = defaultReady
		_, _ = fmt.Fprintf(a.err, "warning: no --ready-cmd: the template is taken as ready 20 s after the start command began\n")
	}
	cn, err := a.target.connect()
	if err != nil {
		return err
	}
	if f.req.Steps, err = a.sendFiles(ctx, cn, src); err != nil {
		return err
	}
	return a.startBuild(ctx, f.req, !f.noWait)
}

// buildSource is a Dockerfile that was read, and its context.
type buildSource struct {
	name    string
	file    *recipe.Dockerfile
	context *recipe.Context
}

// read finds and reads the Dockerfile, and opens the context. Close the context after use.
func (f *buildFlags) read(at string) (*buildSource, error) {
	name, err := dockerfile(at)
	if err != nil {
		return nil, err
	}
	args, err := parsePairs("build argument", f.args)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(name) //nolint:gosec // G304: the user named it.
	if err != nil {
		return nil, err // names the file
	}
	file, err := recipe.ParseDockerfile(text, recipe.Options{Args: args, FromTemplate: f.req.FromTemplate != ""})
	if err != nil {
		return nil, &usageError{fmt.Errorf("%s: %w", name, err)}
	}
	dir := f.context
	if dir == "" {
		dir = filepath.Dir(name)
	}
	within, err := filepath.Rel(dir, name)
	if err != nil {
		within = ""
	}
	files, err := recipe.OpenContext(dir, within)
	if err != nil {
		return nil, &usageError{fmt.Errorf("build context: %w", err)}
	}
	return &buildSource{name, file, files}, nil
}

// dockerfile finds the file that a directory or file name means.
func dockerfile(at string) (string, error) {
	info, err := os.Stat(at)
	if err != nil {
		return "", &usageError{fmt.Errorf("template build: %w; want a directory with a Dockerfile, or a Dockerfile", err)}
	}
	if !info.IsDir() {
		return at, nil
	}
	names := []string{"Dockerfile", "e2b.Dockerfile"}
	for _, n := range names {
		full := filepath.Join(at, n)
		if _, err := os.Stat(full); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return full, err
		}
	}
	return "", &usageError{fmt.Errorf("template build: %s has no %s; give the file's own name", at, strings.Join(names, " and no "))}
}

// startBuild begins to make a template and, with wait, shows how that goes until its end.
func (a *app) startBuild(ctx context.Context, req client.CreateTemplate, wait bool) error {
	cn, err := a.target.connect()
	if err != nil {
		return err
	}
	started, err := cn.api.CreateTemplate(ctx, req)
	if err != nil {
		return cn.check(err)
	}
	if !wait {
		return a.print(started, func(w io.Writer) { row(w, started.BuildID) })
	}
	last, err := a.followBuild(ctx, cn, started.BuildID)
	if err != nil {
		return err
	}
	return a.printBuild(req.Name, last)
}

// printBuild ends a command with what a build came to.
func (a *app) printBuild(name string, b client.Build) error {
	if b.State == client.BuildFailed {
		if a.output == "json" {
			_ = a.print(b, nil) // the error says that it failed
		}
		return fmt.Errorf("build template %s: %s", name, b.Error)
	}
	return a.print(b, func(w io.Writer) {
		text := fmt.Sprintf("template %s is ready: build %s", name, b.ID)
		if r := b.Result; r != nil {
			text += ", " + size(r.ImageBytes)
			if r.Source != "" {
				text += " from " + r.Source
			}
			if r.CheckpointBytes > 0 {
				text += ", with running processes of " + size(r.CheckpointBytes)
			}
		}
		row(w, text)
	})
}

// cancelWithin bounds the request that cancels a build.
const cancelWithin = 10 * time.Second

// followBuild shows a build until it ends. An interrupt cancels it.
func (a *app) followBuild(ctx context.Context, cn *conn, id string) (client.Build, error) {
	show := newProgress(a.err)
	defer show.end()
	var last client.Build
	for b, err := range cn.api.FollowBuild(ctx, id) {
		if err != nil {
			if ctx.Err() == nil {
				return last, cn.check(err)
			}
			after, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelWithin)
			defer cancel()
			if err := cn.api.CancelBuild(after, id); err != nil {
				show.line(fmt.Sprintf("build %s goes on: %v", id, err))
			} else {
				show.line("build " + id + " was cancelled")
			}
			return last, ctx.Err()
		}
		last = b
		show.update(stepName(b.Step), b.Progress)
		for _, e := range b.Entries {
			for line := range strings.Lines(e.Message) {
				show.line(printable(strings.TrimRight(line, " \r\n")))
			}
		}
	}
	return last, nil
}

// stepName says what the number of a step is.
func stepName(step string) string {
	if _, err := strconv.Atoi(step); err == nil {
		return "step " + step
	}
	return step
}

func (a *app) templateFollow() *cobra.Command {
	return &cobra.Command{
		Use: "follow BUILD", Short: "Show a build's log until its end", Args: exactly(1, "one build id"),
		Long:              "Show the log of a build that `template build --no-wait` or an SDK began, until its end. An interrupt cancels the build.",
		ValidArgsFunction: a.complete(1, buildIDs),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			last, err := a.followBuild(c.Context(), cn, args[0])
			if err != nil {
				return err
			}
			return a.printBuild(cmp.Or(last.TemplateID, "of build "+args[0]), last)
		},
	}
}

// buildIDs are the builds under way.
func buildIDs(ctx context.Context, cn *conn) ([]string, error) {
	all, err := cn.api.ListTemplates(ctx)
	var out []string
	for _, t := range all {
		for _, b := range t.Builds {
			if b.State == client.BuildBuilding || b.State == client.BuildWaiting {
				out = append(out, b.ID+"\t"+printable(strings.Join(t.Names, ",")))
			}
		}
	}
	return out, err
}

// completeTags suggests a template, and then its tags.
func (a *app) completeTags(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.suggest(c.Context(), typed, templateNames), cobra.ShellCompDirectiveNoFileComp
	}
	return a.suggest(c.Context(), typed, func(ctx context.Context, cn *conn) ([]string, error) {
		t, err := cn.api.GetTemplate(ctx, args[0])
		return slices.Sorted(maps.Keys(t.Tags)), err
	}), cobra.ShellCompDirectiveNoFileComp
}
