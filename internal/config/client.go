package config

import "strings"

// Client is what a command that talks to a running daemon takes from its environment.
type Client struct {
	// DataDir is the data directory of the daemon on this machine, which holds its unix socket.
	DataDir string
	// APIURL and Key reach a daemon by network; an APIURL set by the user goes before the socket.
	APIURL string
	Key    string
	// SandboxURL is the base URL of the proxy; empty means the one that the daemon names.
	SandboxURL string
}

// ClientFromEnvironment reads CLOISTER_DATA_DIR, CLOISTER_API_URL, CLOISTER_API_KEY and CLOISTER_SANDBOX_URL; the last three fall
// back to the names that the E2B SDKs use.
func ClientFromEnvironment(environ []string) Client {
	env := make(map[string]string, len(environ))
	for _, kv := range environ {
		if k, v, ok := strings.Cut(kv, "="); ok {
			env[k] = v
		}
	}
	first := func(names ...string) string {
		for _, n := range names {
			if env[n] != "" {
				return env[n]
			}
		}
		return ""
	}
	c := Client{
		DataDir:    first("CLOISTER_DATA_DIR"),
		APIURL:     first("CLOISTER_API_URL", "E2B_API_URL"),
		Key:        first("CLOISTER_API_KEY", "E2B_API_KEY"),
		SandboxURL: first("CLOISTER_SANDBOX_URL", "E2B_SANDBOX_URL"),
	}
	if c.DataDir == "" {
		c.DataDir = "/var/lib/cloister"
	}
	return c
}

// JoinToken returns the join token of the environment, CLOISTER_JOIN_TOKEN, or "".
func JoinToken(environ []string) string {
	token := ""
	for _, kv := range environ {
		if v, ok := strings.CutPrefix(kv, "CLOISTER_JOIN_TOKEN="); ok {
			token = v
		}
	}
	return token
}
