package daemon_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestContradictions refuses settings by which a proxy and its server would wait for each other, or both dial.
func TestContradictions(t *testing.T) {
	up, server := daemon.Roles{Server: true, Node: true, Proxy: true}, daemon.Roles{Server: true}
	node, proxy := daemon.Roles{Node: true}, daemon.Roles{Proxy: true}
	for name, tt := range map[string]struct {
		set     func(*config.Config)
		allowed []daemon.Roles
		refused []daemon.Roles
	}{
		"proxies":   {func(c *config.Config) { c.Proxies = []string{"https://edge-1:3005"} }, []daemon.Roles{up, server}, []daemon.Roles{node, proxy}},
		"link-addr": {func(c *config.Config) { c.LinkAddr = ":3005" }, []daemon.Roles{proxy}, []daemon.Roles{up, server, node}},
	} {
		cfg := config.Default()
		tt.set(cfg)
		for _, r := range tt.allowed {
			if err := r.Check(cfg); err != nil {
				t.Errorf("%s, %+v: %v", name, r, err)
			}
		}
		for _, r := range tt.refused {
			if err := r.Check(cfg); !errors.Is(err, sandbox.ErrInvalid) || !strings.HasPrefix(err.Error(), name) || !strings.Contains(err.Error(), ":3005") {
				t.Errorf("%s, %+v: %v", name, r, err)
			}
		}
	}
}
