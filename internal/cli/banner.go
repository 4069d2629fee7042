package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/daemon"
)

// banner prints what to paste; the key itself only on the start that made it.
func (a *app) banner(r *daemon.Ready) {
	if a.output == "json" {
		_ = json.NewEncoder(a.out).Encode(r) // a closed standard output is no reason to stop
		return
	}
	var b strings.Builder
	if r.Member != nil {
		memberBanner(&b, r)
		_, _ = io.WriteString(a.out, b.String())
		return
	}
	if r.Sandbox == "" && r.NoRoom == "" {
		fmt.Fprintf(&b, "\nCloister's server is ready (%s). Sandboxes run on the machines that join it:\n\n  cloister token create\n\n", r.Took.Round(time.Millisecond))
	} else if r.NoRoom == "" {
		fmt.Fprintf(&b, "\nCloister is ready (%s): sandbox %s ran `%s` and said %q.\n\n", r.Took.Round(time.Millisecond), r.Sandbox, r.Command, r.Output)
	} else {
		fmt.Fprintf(&b, "\nCloister runs (%s), but there is no room for another sandbox: %s.\n\n", r.Took.Round(time.Millisecond), r.NoRoom)
	}
	b.WriteString("Point the E2B SDK or CLI at it:\n\n")
	fmt.Fprintf(&b, "  export E2B_API_URL=%s\n  export E2B_SANDBOX_URL=%s\n", r.APIURL, r.ProxyURL)
	if r.AdminKey != "" {
		fmt.Fprintf(&b, "  export E2B_API_KEY=%s\n\n", r.AdminKey)
		fmt.Fprintf(&b, "The key is shown this once; it is also in %s (mode 0600).\n", r.KeyFile)
	} else {
		fmt.Fprintf(&b, "  export E2B_API_KEY=$(cat %s)\n\n", r.KeyFile)
	}
	b.WriteString("On this machine, as root: cloister status; cloister sandbox create; cloister sandbox shell ID\n")
	_, _ = io.WriteString(a.out, b.String())
}

// memberBanner says what a joined machine is now, and what to type next.
func memberBanner(b *strings.Builder, r *daemon.Ready) {
	m := r.Member
	fmt.Fprintf(b, "\n%s is ready (%s): %s %s of cluster %s.\n", m.Name, r.Took.Round(time.Millisecond), m.Role, m.ID, short(m.ClusterID))
	if !m.Connected {
		fmt.Fprintf(b, "No server is reached yet (%s); it goes on trying, and works by itself until then.\n", strings.Join(m.Servers, ", "))
	}
	b.WriteString("\n")
	if m.Role == "proxy" {
		fmt.Fprintf(b, "Sandbox traffic: export E2B_SANDBOX_URL=%s\nOn this machine: cloister status\n", r.ProxyURL)
		return
	}
	b.WriteString("On the server: cloister node ls; cloister sandbox create\nOn this machine, as root: cloister status; cloister sandbox ls\n")
}

// short is the beginning of a long id, for people.
func short(id string) string { return id[:min(len(id), 8)] }

// memberTable says who this machine is.
func memberTable(w io.Writer, m *client.Member) {
	row(w, "member", fmt.Sprintf("%s %s (%s) of cluster %s", m.Role, m.ID, m.Name, short(m.ClusterID)))
	reach := "connected"
	if !m.Connected {
		reach = "not reached; works by itself"
	}
	row(w, "servers", fmt.Sprintf("%s: %s", strings.Join(m.Servers, ", "), reach))
	row(w, "certificate", "ends "+in(m.CertificateExpiresAt))
}
