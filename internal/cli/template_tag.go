package cli

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

// atLeast wants a first argument and one or more of what follows.
func atLeast(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < 2 || slices.Contains(args, "") {
			return &usageError{fmt.Errorf("%s: want %s, got %s; see `%s --help`", strings.TrimPrefix(c.CommandPath(), "cloister "), what, quoted(args), c.CommandPath())}
		}
		return nil
	}
}

func (a *app) templateTag() *cobra.Command {
	return &cobra.Command{
		Use: "tag NAME[:TAG] NEW_TAG...", Short: "Let tags mean the build that another tag means", Args: atLeast("a template and one or more tags"),
		Long: "Let tags mean the build that another tag of the template means; without a tag that is `default`. A tag that exists moves.\n" +
			"Sandboxes are created from NAME:TAG.",
		Example:           "  cloister template tag app:v2 stable\n  cloister template tag app v3 latest",
		ValidArgsFunction: a.complete(1, templateNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			name, from := splitTag(args[0])
			t, err := cn.api.SetTags(c.Context(), name, client.SetTags{From: from, Tags: args[1:]})
			if err != nil {
				return cn.check(err)
			}
			return a.print(t, func(io.Writer) {})
		},
	}
}

// splitTag takes [namespace/]alias[:tag] apart.
func splitTag(ref string) (name, tag string) {
	name, tag, _ = strings.Cut(ref, ":")
	return name, tag
}

func (a *app) templateUntag() *cobra.Command {
	return &cobra.Command{
		Use: "untag NAME TAG...", Short: "Take tags away from a template", Args: atLeast("a template and one or more tags"),
		Long: "Take tags away. A build that no tag means any more is removed when nothing uses it.", ValidArgsFunction: a.completeTags,
		Example: "  cloister template untag app v1 v2",
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			removed := []string{}
			var failed []error
			for _, tag := range args[1:] {
				if err := cn.api.RemoveTag(c.Context(), args[0], tag); err != nil {
					failed = append(failed, cn.check(err))
					continue
				}
				removed = append(removed, tag)
			}
			err = a.print(removed, func(w io.Writer) {
				for _, tag := range removed {
					row(w, tag)
				}
			})
			return errors.Join(append(failed, err)...)
		},
	}
}

func (a *app) templatePublic(verb string, public bool) *cobra.Command {
	short := "Let every project use a template"
	if !public {
		short = "Keep a template to its own project"
	}
	return &cobra.Command{
		Use: verb + " NAME", Short: short, Args: exactly(1, "one template name or id"), ValidArgsFunction: a.complete(1, templateNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			t, err := cn.api.SetPublic(c.Context(), args[0], public)
			if err != nil {
				return cn.check(err)
			}
			return a.print(t, func(io.Writer) {})
		},
	}
}
