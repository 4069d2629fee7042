package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) sandboxCommand() *cobra.Command {
	return group(&cobra.Command{
		Use: "sandbox", Aliases: []string{"sbx"}, Short: "Create, look into and end sandboxes",
	}, a.sandboxList(), a.sandboxShow(), a.sandboxCreate(), a.sandboxExec(), a.sandboxShell(), a.sandboxCopy(),
		a.sandboxLogs(), a.sandboxTimeout(), a.sandboxPause(), a.sandboxResume(), a.sandboxSnapshot(), a.sandboxFork(),
		a.sandboxRollback(), a.sandboxKill())
}

func (a *app) sandboxList() *cobra.Command {
	var states, metadata []string
	c := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List sandboxes, newest first", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			filter, err := parsePairs("metadata filter", metadata)
			if err != nil {
				return err
			}
			all, err := cn.sandboxes(c.Context(), client.ListSandboxes{States: states, Metadata: filter})
			if err != nil {
				return err
			}
			return a.print(all, func(w io.Writer) { sandboxTable(w, all) })
		},
	}
	c.Flags().StringSliceVar(&states, "state", nil, "only these `states` (running, paused, failed, lost, ...)")
	c.Flags().StringArrayVarP(&metadata, "metadata", "m", nil, "only those with this `KEY=VALUE`; may be given again")
	return c
}

// sandboxes returns every sandbox that the filter chooses.
func (c *conn) sandboxes(ctx context.Context, filter client.ListSandboxes) ([]client.Sandbox, error) {
	filter.Limit = 1000
	all := []client.Sandbox{}
	for s, err := range c.api.AllSandboxes(ctx, filter) {
		if err != nil {
			return nil, c.check(err)
		}
		all = append(all, s)
	}
	return all, nil
}

func sandboxTable(w io.Writer, all []client.Sandbox) {
	row(w, "ID", "TEMPLATE", "STATE", "CPU", "MEMORY", "STARTED", "ENDS", "NODE", "METADATA")
	for _, s := range all {
		row(w, s.ID, s.Template, stateOf(s), cpus(s.Resources.MilliCPU), size(s.Resources.MemoryBytes), ago(s.StartedAt), ends(s), s.NodeID, pairs(s.Metadata))
	}
}

// The states that commands tell apart.
const (
	stateRunning = "running"
	statePaused  = "paused"
)

// stateOf is a sandbox's state with what belongs to it: how much a paused one takes and since when, why one has ended.
func stateOf(s client.Sandbox) string {
	switch {
	case s.State == statePaused && s.PausedKind == keepFiles:
		return fmt.Sprintf("paused %s, files of %s", ago(s.PausedAt), size(s.PausedBytes))
	case s.State == statePaused:
		return fmt.Sprintf("paused %s, %s", ago(s.PausedAt), size(s.PausedBytes))
	case s.Reason != "":
		return s.State + ": " + s.Reason
	}
	return s.State
}

// ends is when a running sandbox ends or pauses.
func ends(s client.Sandbox) string {
	switch {
	case s.State != stateRunning:
		return "-"
	case s.AutoPause && !s.EndAt.IsZero():
		return "pauses " + in(s.EndAt)
	}
	return in(s.EndAt)
}

func (a *app) sandboxShow() *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show one sandbox", Args: exactly(1, "one sandbox id"), ValidArgsFunction: a.complete(1, keptNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			s, err := cn.api.GetSandbox(c.Context(), args[0])
			if err != nil {
				return cn.check(err)
			}
			return a.print(s, func(w io.Writer) { sandboxDetail(w, s) })
		},
	}
}

func sandboxDetail(w io.Writer, s client.Sandbox) {
	row(w, "id", s.ID)
	row(w, "template", fmt.Sprintf("%s (%s)", s.Template, s.TemplateID))
	row(w, "state", s.State)
	if s.Reason != "" {
		row(w, "reason", s.Reason)
	}
	row(w, "node", s.NodeID)
	row(w, "cpu", cpus(s.Resources.MilliCPU))
	row(w, "memory", size(s.Resources.MemoryBytes))
	row(w, "disk", size(s.Resources.DiskBytes))
	row(w, "started", s.StartedAt.Local().Format(time.DateTime)+" ("+ago(s.StartedAt)+")")
	switch {
	case s.State == statePaused:
		row(w, "paused", s.PausedAt.Local().Format(time.DateTime)+" ("+ago(s.PausedAt)+")")
		row(w, "kept", fmt.Sprintf("%s, %s on disk", s.PausedKind, size(s.PausedBytes)))
	case s.EndedAt.IsZero():
		row(w, "ends", ends(s))
	default:
		row(w, "ended", s.EndedAt.Local().Format(time.DateTime)+" ("+ago(s.EndedAt)+")")
	}
	row(w, "internet", strconv.FormatBool(s.AllowInternet))
	row(w, "metadata", pairs(s.Metadata))
}

// createFlags are shared by the commands that make a sandbox.
type createFlags struct {
	template      string
	metadata, env []string
	timeout       time.Duration
	cpu           float64
	memory, disk  string
	noInternet    bool
	autoPause     bool
	autoPauseKind string
	autoResume    bool
	idle          bool
}

func (f *createFlags) add(c *cobra.Command, timeout time.Duration) {
	fl := c.Flags()
	fl.StringVarP(&f.template, "template", "t", "", "`name` or id of the template; default: the daemon's default template")
	fl.StringArrayVarP(&f.metadata, "metadata", "m", nil, "`KEY=VALUE` to find it by; may be given again")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "environment `KEY=VALUE` of its processes; may be given again")
	fl.DurationVar(&f.timeout, "timeout", timeout, "end it after this long; 0 means never")
	fl.Float64Var(&f.cpu, "cpu", 0, "processors; default: the template's")
	fl.StringVar(&f.memory, "memory", "", "memory, such as 1GiB; default: the template's")
	fl.StringVar(&f.disk, "disk", "", "disk, such as 20GiB; default: the template's")
	fl.BoolVar(&f.noInternet, "no-internet", false, "let it open no connections to the outside")
	fl.BoolVar(&f.autoPause, "auto-pause", false, "pause it at its timeout, in place of ending it")
	fl.BoolVar(&f.autoResume, "auto-resume", false, "let a request to it make it run again while it is paused")
	fl.BoolVar(&f.idle, "idle", false, "count the timeout from its last use: requests, commands, terminals, and what its processes compute")
	fl.StringVar(&f.autoPauseKind, "auto-pause-keeps", keepMemory, "`what` that keeps: memory (and files) or files")
}

// wireSeconds is a timeout as the API takes it, to which -1 means never.
func wireSeconds(d time.Duration) int64 {
	if d == 0 {
		return -1
	}
	return int64(d / time.Second)
}

func (f *createFlags) request() (client.CreateSandbox, error) {
	req := client.CreateSandbox{Template: f.template, TimeoutSeconds: wireSeconds(f.timeout)}
	if f.timeout < 0 || (f.timeout > 0 && f.timeout < time.Second) {
		return req, &usageError{fmt.Errorf("timeout %s: want 0 (never) or at least 1s", f.timeout)}
	}
	var err error
	if req.Metadata, err = parsePairs("metadata", f.metadata); err != nil {
		return req, err
	}
	if req.Env, err = parsePairs("environment variable", f.env); err != nil {
		return req, err
	}
	req.Resources.MilliCPU = int64(f.cpu * 1000)
	if req.Resources.MemoryBytes, err = parseSize("memory", f.memory); err != nil {
		return req, err
	}
	if req.Resources.DiskBytes, err = parseSize("disk", f.disk); err != nil {
		return req, err
	}
	if f.autoPauseKind != keepMemory && f.autoPauseKind != keepFiles {
		return req, &usageError{fmt.Errorf("auto-pause-keeps %q: want memory or files", f.autoPauseKind)}
	}
	if f.autoPause {
		req.AutoPause, req.AutoPauseKind = true, f.autoPauseKind
	}
	req.AutoResume, req.IdleTimeout = f.autoResume, f.idle
	if f.noInternet {
		req.AllowInternet = new(bool)
	}
	return req, nil
}

func (a *app) sandboxCreate() *cobra.Command {
	var flags createFlags
	c := &cobra.Command{
		Use: "create", Short: "Create a sandbox and print its id", Args: exactly(0, "no arguments"),
		Example: "  cloister sandbox create --timeout 1h --memory 1GiB -m user=ada",
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			req, err := flags.request()
			if err != nil {
				return err
			}
			s, err := cn.api.CreateSandbox(c.Context(), req)
			if err != nil {
				return cn.check(err)
			}
			return a.print(s, func(w io.Writer) { row(w, s.ID) })
		},
	}
	flags.add(c, 5*time.Minute)
	_ = c.RegisterFlagCompletionFunc("template", a.complete(0, templateNames)) // the flag exists: it was made on the line before
	return c
}

func (a *app) sandboxTimeout() *cobra.Command {
	return &cobra.Command{
		Use: "timeout ID DURATION", Short: "End a sandbox this long from now; 0 means never",
		Args: exactly(2, "a sandbox id and a duration such as 30m"), ValidArgsFunction: a.complete(1, sandboxNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			d, err := time.ParseDuration(args[1])
			if err != nil || d < 0 || (d > 0 && d < time.Second) {
				return &usageError{fmt.Errorf("duration %q: want something like 90s, 30m or 2h, or 0 for never", args[1])}
			}
			s, err := cn.api.SetTimeout(c.Context(), args[0], client.SetTimeout{TimeoutSeconds: wireSeconds(d)})
			if err != nil {
				return cn.check(err)
			}
			return a.print(s, func(io.Writer) {})
		},
	}
}

func (a *app) sandboxKill() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "kill ID...", Aliases: []string{"rm"}, Short: "End sandboxes and print their ids", ValidArgsFunction: a.complete(0, keptNames),
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) || slices.Contains(args, "") {
				return &usageError{errors.New("sandbox kill: want one or more sandbox ids, or --all")}
			}
			return nil
		},
		RunE: func(c *cobra.Command, ids []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			if all {
				if ids, err = runningIDs(c.Context(), cn); err != nil {
					return err
				}
			}
			return a.kill(c.Context(), cn, ids, all)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "end every running sandbox")
	return c
}

// kill ends each sandbox, also when another could not be ended; with gone it does not matter that one has ended by itself.
func (a *app) kill(ctx context.Context, cn *conn, ids []string, gone bool) error {
	ended := []string{}
	var failed []error
	for _, id := range ids {
		err := cn.api.KillSandbox(ctx, id)
		switch {
		case err == nil:
			ended = append(ended, id)
		case !gone || !client.IsNotFound(err):
			failed = append(failed, cn.check(err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	err := a.print(ended, func(w io.Writer) {
		for _, id := range ended {
			row(w, id)
		}
	})
	return errors.Join(append(failed, err)...)
}

func runningIDs(ctx context.Context, cn *conn) ([]string, error) {
	list, err := cn.sandboxes(ctx, client.ListSandboxes{States: []string{stateRunning}})
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(list))
	for _, s := range list {
		ids = append(ids, s.ID)
	}
	return ids, nil
}

func (a *app) sandboxLogs() *cobra.Command {
	return &cobra.Command{
		Use: "logs ID", Short: "Print what happened in a sandbox", Args: exactly(1, "one sandbox id"), ValidArgsFunction: a.complete(1, sandboxNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			entries, err := cn.api.Logs(c.Context(), args[0], time.Time{}, 0)
			if err != nil {
				return cn.check(err)
			}
			return a.print(entries, func(w io.Writer) {
				for _, e := range entries {
					line := fmt.Sprintf("%s  %-5s  %s %s", e.Time.Local().Format("2006-01-02 15:04:05.000"), e.Level, e.Message, fields(e.Fields))
					row(w, strings.TrimRight(line, " "))
				}
			})
		},
	}
}

func fields(m map[string]string) string {
	if len(m) == 0 {
		return ""
	}
	return pairs(m)
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
