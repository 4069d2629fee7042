package install

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// needRoot skips a test that changes namespaces, or fails it where a machine that can was promised.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the switch of the test run
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

// TestGatherFirewalls reads real rules, in a network namespace of its own.
func TestGatherFirewalls(t *testing.T) {
	needRoot(t)
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs the nft tool")
	}
	const docker = "table ip filter {\nchain FORWARD {\ntype filter hook forward priority 0; policy drop;\n}\nchain DOCKER-USER {\n}\n}\n"
	for name, tc := range map[string]struct {
		rules  string
		level  Level
		detail string
	}{
		"none":        {"", LevelOK, "no other firewall"},
		"accepting":   {"table ip filter {\nchain FORWARD {\ntype filter hook forward priority 0; policy accept;\n}\n}\n", LevelOK, "no other"},
		"input alone": {"table ip filter {\nchain INPUT {\ntype filter hook input priority 0; policy drop;\n}\n}\n", LevelOK, "no other"},
		"another node": {
			"table inet cloister_abc123 {\nchain forward {\ntype filter hook forward priority 0; policy drop;\n}\n}\n", LevelOK, "no other",
		},
		"docker": {docker, LevelWarn, "Docker's firewall"},
		"docker, told": {
			docker + "table ip filter {\nchain DOCKER-USER {\niifname \"clo*\" accept\n}\n}\n", LevelOK, "no other",
		},
		"docker, told of another": {
			docker + "table ip filter {\nchain DOCKER-USER {\niifname \"clothes0\" accept\n}\n}\n", LevelWarn, "Docker",
		},
		"firewalld": {
			"table inet firewalld {\nchain filter_FORWARD {\ntype filter hook forward priority 10; policy accept;\nreject\n}\n}\n", LevelWarn, "firewalld",
		},
	} {
		err := inFreshNetwork(func() error {
			cmd := exec.CommandContext(t.Context(), nft, "-f", "-")
			cmd.Stdin = strings.NewReader(tc.rules)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: nft: %v: %s", name, err, out)
			}
			walls, err := gatherFirewalls()
			got := judgeFirewalls(walls, Settings{}.Range, err)
			if len(got) != 1 || got[0].Level != tc.level || !strings.Contains(got[0].Detail, tc.detail) {
				t.Errorf("%s: %+v, want level %s and %q", name, got, tc.level, tc.detail)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestNetworkProbes runs the probes where they should work, and leaves nothing on the machine.
func TestNetworkProbes(t *testing.T) {
	needRoot(t)
	for _, f := range checkNftables(t.Context(), Settings{}) {
		if f.Level != LevelOK {
			t.Errorf("%+v", f)
		}
	}
}
