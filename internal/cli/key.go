package cli

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

func (a *app) keyCommand() *cobra.Command {
	return group(&cobra.Command{
		Use: "key", Short: "Make, list and revoke API keys",
	}, a.keyCreate(), a.keyList(), a.keyRevoke())
}

func (a *app) keyCreate() *cobra.Command {
	return &cobra.Command{
		Use: "create NAME", Short: "Make an API key and show it, once", Args: exactly(1, "a name that tells what the key is for"),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			k, err := cn.api.CreateKey(c.Context(), args[0])
			if err != nil {
				return cn.check(err)
			}
			return a.print(k, func(w io.Writer) {
				row(w, k.Secret)
				_, _ = fmt.Fprintln(a.err, "Keep it now: only its hash is stored.")
			})
		},
	}
}

func (a *app) keyList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List API keys", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.api.Keys(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.print(all, func(w io.Writer) {
				row(w, "ID", "NAME", "KEY", "CREATED")
				for _, k := range all {
					row(w, k.ID, k.Name, k.Hint, ago(k.CreatedAt))
				}
			})
		},
	}
}

func (a *app) keyRevoke() *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID", Aliases: []string{"rm"}, Short: "Make an API key worthless at once",
		Args: exactly(1, "one key id, as `key ls` shows it"), ValidArgsFunction: a.complete(1, keyNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			if err := cn.api.RevokeKey(c.Context(), args[0]); err != nil {
				return cn.check(err)
			}
			return a.print(map[string]string{"revoked": args[0]}, func(io.Writer) {})
		},
	}
}
