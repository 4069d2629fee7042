package cli

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

// completeWithin is how long a shell waits for suggestions.
const completeWithin = 2 * time.Second

// names returns what an argument can be, each with a description behind a tab.
type names func(context.Context, *conn) ([]string, error)

// complete suggests names for the first most arguments; 0 means for all. A daemon that does not answer suggests nothing.
func (a *app) complete(most int, list names) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.suggest(c.Context(), typed, list), cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) suggest(ctx context.Context, typed string, list names) []string {
	cn, err := a.target.connect()
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, completeWithin)
	defer cancel()
	all, err := list(ctx, cn)
	if err != nil {
		return nil
	}
	var out []string
	for _, s := range all {
		if strings.HasPrefix(s, typed) {
			out = append(out, s)
		}
	}
	return out
}

// completeCopy suggests ID: beside the files of this machine.
func (a *app) completeCopy(c *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	if strings.ContainsAny(typed, "/.:") {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var out []string
	for _, s := range a.suggest(c.Context(), typed, sandboxNames) {
		id, about, _ := strings.Cut(s, "\t")
		out = append(out, id+":\t"+about)
	}
	return out, cobra.ShellCompDirectiveNoSpace
}

func sandboxNames(ctx context.Context, cn *conn) ([]string, error) {
	return sandboxesIn(ctx, cn, stateRunning)
}

func pausedNames(ctx context.Context, cn *conn) ([]string, error) {
	return sandboxesIn(ctx, cn, statePaused)
}

func keptNames(ctx context.Context, cn *conn) ([]string, error) {
	return sandboxesIn(ctx, cn, stateRunning, statePaused)
}

func sandboxesIn(ctx context.Context, cn *conn, states ...string) ([]string, error) {
	all, err := cn.sandboxes(ctx, client.ListSandboxes{States: states})
	out := make([]string, 0, len(all))
	for _, s := range all {
		out = append(out, s.ID+"\t"+printable(s.Template+" "+pairs(s.Metadata)))
	}
	return out, err
}

func templateNames(ctx context.Context, cn *conn) ([]string, error) {
	all, err := cn.api.ListTemplates(ctx)
	var out []string
	for _, t := range all {
		for _, n := range t.Names {
			out = append(out, n+"\t"+current(t).State)
		}
	}
	return out, err
}

func keyNames(ctx context.Context, cn *conn) ([]string, error) {
	all, err := cn.api.Keys(ctx)
	out := make([]string, 0, len(all))
	for _, k := range all {
		out = append(out, k.ID+"\t"+printable(k.Name))
	}
	return out, err
}
