package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

// defaultPlacement is the word for a template that is placed as the cluster says.
const defaultPlacement = "default"

func (a *app) templatePlacement() *cobra.Command {
	return &cobra.Command{
		Use: "placement NAME on_demand|all|NUMBER|default", Short: "Say how many nodes have a template before it is asked for there",
		Args: exactly(2, "a template and on_demand, all, a number of nodes, or default"), ValidArgsFunction: a.complete(1, templateNames),
		Long: "Say how many nodes have a template before a sandbox from it is asked for there: none (on_demand), all, or a number. Nodes get it in\n" +
			"the background, those that join later too. default goes back to the setting template-placement.",
		Example: "  cloister template placement app all\n  cloister template placement app 3\n  cloister template placement app default",
		RunE: func(c *cobra.Command, args []string) error {
			word := args[1]
			if word == defaultPlacement {
				word = ""
			}
			return a.updateTemplate(c, args[0], client.UpdateTemplate{Placement: &word})
		},
	}
}

func (a *app) templateSelector() *cobra.Command {
	var affinity, tolerations string
	c := &cobra.Command{
		Use: "node-selector NAME [SELECTOR]", Short: "Say on which nodes a template's sandboxes may run",
		Args: between("a template and, unless nothing is to be demanded, a selector"), ValidArgsFunction: a.complete(1, templateNames),
		Long: "Say which labels nodes must have for a template's sandboxes; without a selector any node will do. A create's own metadata goes before\n" +
			"it. --affinity and --tolerations change what is preferred and tolerated; empty takes that away.",
		Example: "  cloister template node-selector app 'disk=ssd,zone in (a,b)'\n  cloister template node-selector app --tolerations gpu=only:NoSchedule",
		RunE: func(c *cobra.Command, args []string) error {
			in := client.UpdateTemplate{}
			if c.Flags().Changed("affinity") {
				in.NodeAffinity = &affinity
			}
			if c.Flags().Changed("tolerations") {
				in.Tolerations = &tolerations
			}
			if len(args) > 1 {
				in.NodeSelector = &args[1]
			} else if in == (client.UpdateTemplate{}) {
				in.NodeSelector = new(string)
			}
			return a.updateTemplate(c, args[0], in)
		},
	}
	c.Flags().StringVar(&affinity, "affinity", "", "preferred nodes: `SELECTOR*WEIGHT;...`")
	c.Flags().StringVar(&tolerations, "tolerations", "", "tolerated taints: `KEY=VALUE:EFFECT,...`")
	return c
}

func (a *app) templateIdle() *cobra.Command {
	return &cobra.Command{
		Use: "idle NAME on|off", Short: "Say whether the timeouts of a template's sandboxes count from their last use",
		Args: exactly(2, "a template and on or off"), ValidArgsFunction: a.complete(1, templateNames),
		RunE: func(c *cobra.Command, args []string) error {
			on := args[1] == "on"
			if !on && args[1] != "off" {
				return &usageError{fmt.Errorf("%q: want on or off", args[1])}
			}
			return a.updateTemplate(c, args[0], client.UpdateTemplate{IdleTimeout: &on})
		},
	}
}

// between wants one argument or two.
func between(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < 1 || len(args) > 2 || args[0] == "" {
			return &usageError{fmt.Errorf("%s: want %s, got %s; see `%s --help`", strings.TrimPrefix(c.CommandPath(), "cloister "), what, quoted(args), c.CommandPath())}
		}
		return nil
	}
}

func (a *app) updateTemplate(c *cobra.Command, name string, in client.UpdateTemplate) error {
	cn, err := a.target.connect()
	if err != nil {
		return err
	}
	t, err := cn.api.UpdateTemplate(c.Context(), name, in)
	if err != nil {
		return cn.check(err)
	}
	return a.print(t, func(io.Writer) {})
}
