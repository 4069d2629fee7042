package daemon

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/install"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Preflight checks whether this machine is fit for the settings. What a running daemon of the same data directory holds
// counts as free.
func Preflight(ctx context.Context, cfg *config.Config) []install.Finding {
	s := install.Settings{
		DataDir: cfg.DataDir, NodeDir: filepath.Join(cfg.DataDir, "node"), Image: imageWanted(cfg), Range: cfg.Range(),
		Overlaps:  func() ([]install.Overlap, error) { return overlaps(ctx, cfg) },
		Resolvers: func() []netip.Addr { return resolvers(cfg) },
	}
	if _, running := HolderOf(cfg.DataDir); !running {
		for setting, addr := range portsOf(cfg) {
			if addr != "" {
				s.Listeners = append(s.Listeners, install.Listener{Setting: setting, Addr: addr})
			}
		}
	}
	return install.Preflight(ctx, s)
}

// portsOf returns what the role of the data directory listens on, by setting: what a member has where the machine joined, else
// what a server has. The cluster port is not among them: cloister up opens it later, and says then who holds it.
func portsOf(cfg *config.Config) map[string]string {
	ports := map[string]string{"debug-addr": cfg.DebugAddr}
	id, err := openIdentity(cfg.DataDir)
	switch {
	case err != nil:
		ports["api-addr"], ports["proxy-addr"] = cfg.APIAddr, cfg.ProxyAddr
	case id.Member().Role == sandbox.RoleNode:
		ports["node-addr"] = cfg.NodeAddr
	default:
		ports["proxy-addr"] = cfg.ProxyAddr
	}
	return ports
}

// overlaps returns what else uses addresses of the sandboxes' range.
func overlaps(ctx context.Context, cfg *config.Config) ([]install.Overlap, error) {
	found, err := guestnet.Conflicts(cfg.Range(), nodeName(ctx, cfg))
	if err != nil {
		return nil, err
	}
	out := make([]install.Overlap, 0, len(found))
	for _, c := range found {
		out = append(out, install.Overlap{Kind: c.Kind, Text: c.Text, Remedy: c.Remedy})
	}
	return out, nil
}

// nodeName is the id of the node of the data directory, or "" where there is none yet.
func nodeName(ctx context.Context, cfg *config.Config) string {
	if h, running := HolderOf(cfg.DataDir); running {
		return string(h.Node)
	}
	path := journalPath(cfg.DataDir)
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	jr, err := journal.Open(ctx, path, journal.Options{})
	if err != nil {
		return ""
	}
	defer func() { _ = jr.Close() }() // nothing was written
	return string(jr.NodeID())
}
