package cli

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/auth"
)

// issued is what `cloister cert` made.
type issued struct {
	CA        string    `json:"ca"`
	Cert      string    `json:"cert"`
	Key       string    `json:"key"`
	Names     []string  `json:"names"`
	ExpiresAt time.Time `json:"expires_at"`
}

func (a *app) certCommand() *cobra.Command {
	var domains []string
	var dir string
	c := &cobra.Command{
		Use: "cert --domain DOMAIN", Short: "Make a certificate for API and proxy, signed by a local authority", Args: exactly(0, "no arguments"),
		Long: "Make a wildcard certificate for sandbox host names, signed by an authority that is made on first use and kept.\n" +
			"Calling it again issues a new certificate of the same authority; a running daemon picks it up.",
		Example: "  cloister cert --domain sandbox.example.org\n  cloister up --tls-cert DIR/server.pem --tls-key DIR/server-key.pem --domain sandbox.example.org",
		RunE: func(*cobra.Command, []string) error {
			if len(domains) == 0 {
				return &usageError{errors.New("cert: want at least one --domain")}
			}
			if dir == "" {
				dir = filepath.Join(a.target.dataDir, "tls")
			}
			ca, err := auth.OpenCA(dir, "Cloister")
			if err != nil {
				return err
			}
			leaf, err := ca.IssueServer(domains)
			if err != nil {
				return &usageError{err}
			}
			cert, key, err := leaf.Write(dir, "server")
			if err != nil {
				return err
			}
			out := issued{CA: ca.CertPath, Cert: cert, Key: key, Names: leaf.Names, ExpiresAt: leaf.ExpiresAt}
			return a.print(out, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "certificate  %s\nkey          %s\nauthority    %s\nfor          %s\nuntil        %s\n\n",
					cert, key, ca.CertPath, strings.Join(leaf.Names, ", "), leaf.ExpiresAt.Format(time.DateOnly))
				_, _ = fmt.Fprintf(w, "Start the daemon with it:\n\n  cloister up --tls-cert %s --tls-key %s --domain %s\n\n%s\n",
					cert, key, domains[0], auth.TrustInstructions(ca.CertPath))
			})
		},
	}
	c.Flags().StringSliceVar(&domains, "domain", nil, "`domain` that the certificate holds for, with everything one label below it; may be given again")
	c.Flags().StringVar(&dir, "dir", "", "`directory` for authority and certificate; default: tls in the data directory")
	return c
}
