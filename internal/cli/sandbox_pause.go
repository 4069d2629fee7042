package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

// The kinds of what is kept of a sandbox.
const (
	keepMemory = "memory"
	keepFiles  = "files"
)

// kind is what --files chooses.
func kind(files bool) string {
	if files {
		return keepFiles
	}
	return keepMemory
}

const filesHelp = "keep the files alone; processes end, and begin anew when it goes on"

// someIDs wants one or more sandbox ids.
func someIDs(c *cobra.Command, args []string) error {
	if len(args) == 0 || slices.Contains(args, "") {
		return &usageError{fmt.Errorf("sandbox %s: want one or more sandbox ids, got %s", c.Name(), quoted(args))}
	}
	return nil
}

// each does something with each sandbox, also when it failed with another, and prints the ids of those where it worked.
func (a *app) each(ctx context.Context, ids []string, do func(*conn, string) (client.Sandbox, error)) error {
	cn, err := a.target.connect()
	if err != nil {
		return err
	}
	done := []client.Sandbox{}
	var failed []error
	for _, id := range ids {
		s, err := do(cn, id)
		if err != nil {
			failed = append(failed, cn.check(err))
		} else {
			done = append(done, s)
		}
		if ctx.Err() != nil {
			break
		}
	}
	err = a.print(done, func(w io.Writer) {
		for _, s := range done {
			row(w, s.ID)
		}
	})
	return errors.Join(append(failed, err)...)
}

func (a *app) sandboxPause() *cobra.Command {
	var files bool
	c := &cobra.Command{
		Use: "pause ID...", Short: "Pause sandboxes and print their ids", Args: someIDs, ValidArgsFunction: a.complete(0, sandboxNames),
		Long: "Pause sandboxes: memory and files are kept on disk, and nothing of them runs or takes memory until `sandbox resume` or a\n" +
			"connecting client lets them go on. A paused sandbox stays until it is killed.",
		Example: "  cloister sandbox pause 3k9x2m\n  cloister sandbox pause 3k9x2m --files",
		RunE: func(c *cobra.Command, ids []string) error {
			return a.each(c.Context(), ids, func(cn *conn, id string) (client.Sandbox, error) {
				return cn.api.PauseSandbox(c.Context(), id, kind(files))
			})
		},
	}
	c.Flags().BoolVar(&files, "files", false, filesHelp)
	return c
}

// lifeFlag reads --timeout as the API takes it.
func lifeFlag(d time.Duration) (int64, error) {
	if d < 0 || d > 0 && d < time.Second {
		return 0, &usageError{fmt.Errorf("timeout %s: want 0 (never) or at least 1s", d)}
	}
	return wireSeconds(d), nil
}

func (a *app) sandboxResume() *cobra.Command {
	var timeout time.Duration
	var cold bool
	c := &cobra.Command{
		Use: "resume ID...", Short: "Let paused sandboxes go on and print their ids", Args: someIDs, ValidArgsFunction: a.complete(0, pausedNames),
		Long: "Let paused sandboxes go on where they were: processes, open files and listening sockets; connections over the network\n" +
			"are closed. A sandbox that runs keeps running, with its end no earlier than asked for.",
		Example: "  cloister sandbox resume 3k9x2m --timeout 1h",
		RunE: func(c *cobra.Command, ids []string) error {
			life, err := lifeFlag(timeout)
			if err != nil {
				return err
			}
			return a.each(c.Context(), ids, func(cn *conn, id string) (client.Sandbox, error) {
				return cn.api.ResumeSandbox(c.Context(), id, client.ResumeSandbox{TimeoutSeconds: life, Cold: cold})
			})
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "end or pause it after this long; 0 means never")
	c.Flags().BoolVar(&cold, "cold", false, "start anew from the files, without the processes that were kept")
	return c
}

func (a *app) sandboxSnapshot() *cobra.Command {
	var req client.CreateSnapshot
	var files bool
	c := &cobra.Command{
		Use: "snapshot ID", Short: "Keep what a sandbox is now and print the snapshot's id", Args: exactly(1, "one sandbox id"),
		Long: "Keep what a sandbox is at this moment; it goes on running. `sandbox create --template SNAPSHOT` starts from it,\n" +
			"`sandbox rollback` puts the sandbox back to it.",
		Example:           "  cloister sandbox snapshot 3k9x2m --name before-upgrade\n  cloister sandbox create -t before-upgrade",
		ValidArgsFunction: a.complete(1, sandboxNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			req.Kind = kind(files)
			s, err := cn.api.CreateSnapshot(c.Context(), args[0], req)
			if err != nil {
				return cn.check(err)
			}
			return a.print(s, func(w io.Writer) { row(w, s.ID) })
		},
	}
	c.Flags().StringVarP(&req.Name, "name", "n", "", "`name` of the snapshot, with a tag or without; default: only its id")
	c.Flags().BoolVar(&files, "files", false, "keep the files alone, without memory and processes")
	return c
}

func (a *app) sandboxFork() *cobra.Command {
	var req client.ForkSandbox
	var timeout time.Duration
	c := &cobra.Command{
		Use: "fork ID", Short: "Make copies of a running sandbox and print their ids", Args: exactly(1, "one sandbox id"),
		Long:              "Make copies of a sandbox with its memory, processes and files as they are now; the sandbox itself goes on running.",
		Example:           "  cloister sandbox fork 3k9x2m --count 10 --timeout 1h",
		ValidArgsFunction: a.complete(1, sandboxNames),
		RunE: func(c *cobra.Command, args []string) (err error) {
			if req.Count < 1 || req.Count > 100 {
				return &usageError{fmt.Errorf("count %d: want 1 to 100", req.Count)}
			}
			if req.TimeoutSeconds, err = lifeFlag(timeout); err != nil {
				return err
			}
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			forks, err := cn.api.ForkSandbox(c.Context(), args[0], req)
			if err != nil {
				return cn.check(err)
			}
			err = a.print(forks, func(w io.Writer) { forkTable(w, forks) })
			return errors.Join(append(forkErrors(forks), err)...)
		},
	}
	c.Flags().IntVar(&req.Count, "count", 1, "`how` many, 1 to 100")
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "end each after this long; 0 means never")
	return c
}

func forkTable(w io.Writer, forks []client.Fork) {
	for _, f := range forks {
		if f.Sandbox != nil {
			row(w, f.Sandbox.ID)
		}
	}
}

// forkErrors are those of the copies that could not be made.
func forkErrors(forks []client.Fork) []error {
	var out []error
	for i, f := range forks {
		if f.Error != nil {
			out = append(out, fmt.Errorf("fork %d: %w", i+1, &client.APIError{Code: f.Error.Code, Message: f.Error.Message}))
		}
	}
	return out
}

func (a *app) sandboxRollback() *cobra.Command {
	return &cobra.Command{
		Use: "rollback ID SNAPSHOT", Short: "Put a sandbox back to one of its own snapshots", Args: exactly(2, "a sandbox id and a snapshot"),
		Long:              "Put a sandbox back to what it was when one of its own snapshots was made. It keeps its id; what happened since is lost.",
		Example:           "  cloister sandbox rollback 3k9x2m before-upgrade",
		ValidArgsFunction: a.completeRollback,
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			s, err := cn.api.RollbackSandbox(c.Context(), args[0], client.RollbackSandbox{Snapshot: args[1]})
			if err != nil {
				return cn.check(err)
			}
			return a.print(s, func(w io.Writer) { row(w, s.ID) })
		},
	}
}

// completeRollback suggests a sandbox, and then its snapshots.
func (a *app) completeRollback(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	list := names(sandboxNames)
	switch len(args) {
	case 0:
	case 1:
		list = func(ctx context.Context, cn *conn) ([]string, error) {
			return snapshotsOf(ctx, cn, client.ListSnapshots{SandboxID: args[0]})
		}
	default:
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.suggest(c.Context(), typed, list), cobra.ShellCompDirectiveNoFileComp
}
