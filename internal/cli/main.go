// Package cli is the command line: one file per command, each a thin layer over the /v1 API, the daemon or the checks.
//
// It owns flags, texts, tables and exit codes, and holds no logic of the cluster. A command runs on the goroutine of
// Main and ends when its context does.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

// version is set at link time.
var version = "dev"

// The exit codes of every command but `sandbox exec` and `sandbox shell`, which end with the code of what they ran.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitUnavailable = 4
	exitDenied      = 5
	exitConflict    = 6
	exitExhausted   = 7
	exitInterrupted = 130
)

const exitCodeHelp = `
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 the daemon does not answer, 5 not allowed,
6 not possible in the present state, 7 no room now, 130 interrupted. ` + "`sandbox exec`" + ` ends with the exit code of its command,
128 + N where signal N ended it.`

// app is what every command shares.
type app struct {
	in       io.Reader
	out, err io.Writer
	environ  []string
	args     []string
	output   string // table or json
	began    bool   // flags and arguments were right, the command itself has begun
	target   target
}

// Main runs the command line args and returns the process's exit code.
func Main(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	return run(ctx, &app{in: in, out: out, err: errOut, environ: os.Environ(), args: args})
}

func run(ctx context.Context, a *app) int {
	defer a.target.close()
	root := a.root()
	root.SetArgs(a.args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if ended, ok := errors.AsType[*exitError](err); ok {
		return ended.code
	}
	interrupted := ctx.Err() != nil
	if interrupted && (errors.Is(err, ctx.Err()) || errors.Is(err, context.Cause(ctx))) {
		err = errors.New("interrupted")
	}
	_, _ = fmt.Fprintf(a.err, "cloister: %v\n", err)
	switch {
	case interrupted:
		return exitInterrupted
	case !a.began:
		return exitUsage
	}
	return exitCode(err)
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "cloister",
		Short: "Run untrusted code in sandboxes on your own machines",
		Long: "Cloister runs untrusted code in sandboxes on your own Linux machines, driven by the E2B SDKs.\n" +
			"`cloister up` is a whole cluster of one machine.\n" + exitCodeHelp,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noCommand,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return &usageError{fmt.Errorf("%w; see `%s --help`", err, c.CommandPath())}
	})
	a.target.flags(root, a.environ)
	root.PersistentFlags().StringVarP(&a.output, "output", "o", "table", "output `format`: table or json")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if a.output != "table" && a.output != "json" {
			return &usageError{fmt.Errorf("output format %q: want table or json", a.output)}
		}
		a.began = true
		return nil
	}
	root.AddCommand(a.upCommand(), a.joinCommand(), a.leaveCommand(), a.serverCommand(), a.proxyCommand(), a.downCommand(), a.statusCommand(), a.doctorCommand(), a.sandboxCommand(),
		a.templateCommand(), a.snapshotCommand(), a.keyCommand(), a.tokenCommand(), a.eventCommand(), a.nodeCommand(), a.scheduleCommand(), a.certCommand(), a.benchCommand(), a.versionCommand())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd("completion") // the argument only says that there is one
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Args = helpTopic
		case "completion":
			c.Args, c.RunE = noCommand, func(c *cobra.Command, _ []string) error { return c.Help() }
		}
	}
	return root
}

// group is a command that only holds others.
func group(c *cobra.Command, commands ...*cobra.Command) *cobra.Command {
	c.Args, c.RunE = noCommand, func(c *cobra.Command, _ []string) error { return c.Help() }
	c.AddCommand(commands...)
	return c
}

// noCommand refuses what is left after the name of a group: it should have been one of its commands.
func noCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	c.SuggestionsMinimumDistance = 2
	hint := fmt.Sprintf("see `%s --help`", c.CommandPath())
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		hint = fmt.Sprintf("did you mean `%s %s`?", c.CommandPath(), near[0])
	}
	return &usageError{fmt.Errorf("%s has no command %q; %s", c.CommandPath(), args[0], hint)}
}

func helpTopic(c *cobra.Command, args []string) error {
	if found, rest, err := c.Root().Find(args); found == nil || err != nil || len(rest) > 0 {
		return &usageError{fmt.Errorf("there is no command `cloister %s`; see `cloister --help`", strings.Join(args, " "))}
	}
	return nil
}

// usageError is a mistake in how a command was called.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// exitError ends the program with a code and no message.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// exitCode maps an error to the code that scripts can act on.
func exitCode(err error) int {
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[*unreachableError](err); ok {
		return exitUnavailable
	}
	api, ok := errors.AsType[*client.APIError](err)
	if !ok {
		return exitFailure
	}
	switch api.Code {
	case http.StatusNotFound:
		return exitNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		return exitDenied
	case http.StatusConflict:
		return exitConflict
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return exitExhausted
	case http.StatusBadGateway:
		return exitUnavailable
	case http.StatusBadRequest:
		return exitUsage
	}
	return exitFailure
}

// exactly is cobra.ExactArgs with an error that names what is wanted.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		name := strings.TrimPrefix(c.CommandPath(), "cloister ")
		if len(args) != n {
			return &usageError{fmt.Errorf("%s: want %s, got %s; see `%s --help`", name, what, quoted(args), c.CommandPath())}
		}
		if slices.Contains(args, "") {
			return &usageError{fmt.Errorf("%s: want %s, got an empty argument", name, what)}
		}
		return nil
	}
}

// quoted names arguments in an error.
func quoted(args []string) string {
	if len(args) == 0 {
		return "nothing"
	}
	return fmt.Sprintf("%q", args)
}
