package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) tokenCommand() *cobra.Command {
	return group(&cobra.Command{
		Use: "token", Short: "Make, list and revoke the tokens by which machines join",
	}, a.tokenCreate(), a.tokenList(), a.tokenRevoke())
}

func (a *app) tokenCreate() *cobra.Command {
	role, ttl, uses, replace := "node", time.Hour, 1, false
	c := &cobra.Command{
		Use: "create", Short: "Make a join token and show the command that uses it, once", Args: exactly(0, "no arguments"),
		Long: "Make a join token and show, once, the command that lets another machine into this cluster. The token also says which\n" +
			"cluster it is for, so that the other machine talks to no other server. The first token opens the port by which\n" +
			"machines join, `cluster-addr`.",
		Example: "  cloister token create\n  cloister token create --role proxy --ttl 10m\n  cloister token create --uses 0 --ttl 24h --replace",
		RunE: func(c *cobra.Command, _ []string) error {
			if ttl < time.Second {
				return &usageError{fmt.Errorf("ttl %s: want 1s to 720h", ttl)}
			}
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			t, err := cn.api.CreateToken(c.Context(), client.CreateToken{Role: role, TTLSeconds: int64(ttl / time.Second), Uses: &uses, Replace: replace})
			if err != nil {
				return cn.check(err)
			}
			return a.printNewToken(t)
		},
	}
	c.Flags().StringVar(&role, "role", role, "what the machine is to be: node or proxy")
	c.Flags().DurationVar(&ttl, "ttl", ttl, "how long the token lets machines in: 1s to 720h")
	c.Flags().IntVar(&uses, "uses", uses, "how many machines it lets in; 0 for any number")
	c.Flags().BoolVar(&replace, "replace", false, "a machine with the name of a node that is down takes its place: that node is taken out of the cluster,\nand its paused sandboxes are brought back from their copies first")
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"node", "proxy"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// printNewToken shows the command alone on standard output, so that a script can take it from there.
func (a *app) printNewToken(t client.CreatedToken) error {
	return a.print(t, func(w io.Writer) {
		server := "SERVER:3003"
		if len(t.Servers) > 0 {
			server = t.Servers[0]
		}
		role := ""
		if t.Role != "node" {
			role = " --role " + t.Role
		}
		row(w, "cloister join "+server+" --token "+t.Text+role)
		_, _ = fmt.Fprintf(a.err, "Run it as root on the other machine: it becomes a %s. The token is good for %s until %s, and is shown this once.\n",
			t.Role, machines(t.Uses), t.ExpiresAt.Local().Format(time.DateTime))
	})
}

func machines(uses int) string {
	switch uses {
	case 0:
		return "any number of machines"
	case 1:
		return "one machine"
	}
	return strconv.Itoa(uses) + " machines"
}

func (a *app) tokenList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List join tokens", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.api.Tokens(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.print(all, func(w io.Writer) {
				row(w, "ID", "ROLE", "STATE", "USED", "LAST USED BY", "EXPIRES", "CREATED")
				for _, t := range all {
					row(w, t.ID, t.Role, t.State, used(t), lastUse(t), expiry(t), ago(t.CreatedAt))
				}
			})
		},
	}
}

// expiry writes when a token ends; one that lets nobody in any more has no end to wait for.
func expiry(t client.Token) string {
	if t.State != "valid" {
		return "-"
	}
	return in(t.ExpiresAt)
}

func used(t client.Token) string {
	if t.Uses == 0 {
		return strconv.Itoa(t.Used)
	}
	return fmt.Sprintf("%d/%d", t.Used, t.Uses)
}

func lastUse(t client.Token) string {
	if len(t.UsedBy) == 0 {
		return "-"
	}
	return t.UsedBy[len(t.UsedBy)-1].Name
}

func (a *app) tokenRevoke() *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID", Aliases: []string{"rm"}, Short: "Make a join token worthless at once; whom it let in stays",
		Args: exactly(1, "one token id, as `token ls` shows it"), ValidArgsFunction: a.complete(1, tokenNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			if err := cn.api.RevokeToken(c.Context(), args[0]); err != nil {
				return cn.check(err)
			}
			return a.print(map[string]string{"revoked": args[0]}, func(io.Writer) {})
		},
	}
}

func tokenNames(ctx context.Context, cn *conn) ([]string, error) {
	all, err := cn.api.Tokens(ctx)
	out := make([]string, 0, len(all))
	for _, t := range all {
		if t.State == "valid" {
			out = append(out, t.ID+"\t"+printable(t.Role+" "+used(t)))
		}
	}
	return out, err
}
