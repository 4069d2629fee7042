package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/config"
)

var update = flag.Bool("update", false, "write docs/reference/cli.md anew")

const reference = "../../docs/reference/cli.md"

func TestReference(t *testing.T) {
	var b strings.Builder
	b.WriteString("# Commands\n\nGenerated from `internal/cli`; `go test ./internal/cli -update` writes it anew.\n")
	a := &app{out: &b, err: &b}
	root := a.root()
	fmt.Fprintf(&b, "\n%s\n\nEvery command takes these flags:\n\n```\n%s```\n", markdown(root.Long), root.PersistentFlags().FlagUsages())
	describe(&b, root)
	if *update {
		if err := os.WriteFile(reference, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), b.String()); d != "" {
		t.Errorf("docs/reference/cli.md is out of date; `go test ./internal/cli -update` writes it (-is +wanted):\n%s", d)
	}
}

func describe(b *strings.Builder, c *cobra.Command) {
	for _, sub := range c.Commands() {
		if !sub.IsAvailableCommand() || sub.Name() == "help" || sub.Parent().Name() == "completion" {
			continue
		}
		if sub.HasSubCommands() && sub.Name() != "completion" {
			fmt.Fprintf(b, "\n## %s\n\n%s.\n", sub.CommandPath(), sub.Short)
			if sub.Long != "" {
				fmt.Fprintf(b, "%s\n", sub.Long)
			}
			describe(b, sub)
			continue
		}
		heading := "##"
		if c.HasParent() {
			heading = "###"
		}
		long := sub.Long
		if long == "" || sub.Name() == "completion" {
			long = sub.Short + "."
		}
		fmt.Fprintf(b, "\n%s %s\n\n```\n%s\n```\n\n%s\n", heading, sub.CommandPath(), sub.UseLine(), markdown(long))
		if sub.Example != "" {
			fmt.Fprintf(b, "\n```sh\n%s\n```\n", strings.ReplaceAll(strings.TrimPrefix(sub.Example, "  "), "\n  ", "\n"))
		}
		if flags := ownFlags(sub); flags != "" {
			fmt.Fprintf(b, "\n```\n%s```\n", flags)
		}
	}
}

// ownFlags leaves out the settings of the daemon, which have a page of their own.
func ownFlags(c *cobra.Command) string {
	if c.Flags().Lookup("network-range") == nil {
		return c.LocalNonPersistentFlags().FlagUsages()
	}
	own, settings := pflag.NewFlagSet("", pflag.ContinueOnError), pflag.NewFlagSet("", pflag.ContinueOnError)
	config.Flags(settings)
	c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name == "config" || f.Name != "help" && settings.Lookup(f.Name) == nil {
			own.AddFlag(f)
		}
	})
	return own.FlagUsages() + "      and every setting of config.md\n"
}

func markdown(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s, "\nTiers:\n", "\nTiers:\n\n"), "\n  ", "\n- ")
}

func TestHelp(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" || strings.HasSuffix(c.Short, ".") && c.Parent().Name() != "completion" {
			t.Errorf("%s: short text %q: want one without a full stop", c.CommandPath(), c.Short)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
		args := append(strings.Fields(c.CommandPath())[1:], "--help")
		var out, errOut bytes.Buffer
		if code := run(t.Context(), &app{out: &out, err: &errOut, args: args}); code != 0 || !strings.Contains(out.String(), "Usage:") || errOut.Len() > 0 {
			t.Errorf("%q: code %d, %s", args, code, errOut.String())
		}
	}
	walk((&app{}).root())
}

func TestMistakes(t *testing.T) {
	w := newWorld(t)
	for _, tc := range []struct {
		args string
		code int
		says string
	}{
		{"foo", 2, `cloister has no command "foo"; see`},
		{"statsu", 2, "did you mean `cloister status`?"},
		{"sandbox crate", 2, "did you mean `cloister sandbox create`?"},
		{"help foo", 2, "no command `cloister foo`"},
		{"completion foo", 2, "no command"},
		{"--bad", 2, "unknown flag: --bad"},
		{"status -o xml", 2, `output format "xml": want table or json`},
		{"status x", 2, `status: want no arguments, got ["x"]`},
		{"sandbox show", 2, "want one sandbox id, got nothing"},
		{"sandbox show ''", 2, "got an empty argument"},
		{"sandbox show nope", 3, "sandbox nope was not found"},
		{"sandbox show ../keys", 3, "was not found"},
		{"sandbox create --timeout -1s", 2, "want 0 (never) or at least 1s"},
		{"sandbox create --timeout 999h", 2, "timeout"},
		{"sandbox create --memory 1Q", 2, `size "1Q"`},
		{"sandbox create --env A", 2, "want KEY=VALUE"},
		{"sandbox create -t nope", 3, "nope"},
		{"sandbox ls --state odd", 2, "odd"},
		{"sandbox timeout ID 500ms", 2, "want something like"},
		{"sandbox timeout nope 5m", 3, "not found"},
		{"sandbox kill", 2, "or --all"},
		{"sandbox kill --all x", 2, "or --all"},
		{"sandbox kill nope", 3, "not found"},
		{"sandbox exec ID", 2, "want a sandbox id and a command"},
		{"sandbox exec nope true", 3, "not found"},
		{"sandbox exec -e A ID true", 2, "want KEY=VALUE"},
		{"sandbox shell ID", 2, "no terminal"},
		{"sandbox cp a b", 2, "exactly one side"},
		{"sandbox cp ID:a ID:b", 2, "exactly one side"},
		{"sandbox cp /nonexistent ID:b", 1, "no such file"},
		{"sandbox cp ID:nope .", 1, "does not exist"},
		{"sandbox cp - ID:dir/", 2, "want the path of a file"},
		{"template create x", 2, "--from"},
		{"template rm nope", 3, "does not exist"},
		{"template rm base", 6, "base"},
		{"template pull x", 2, "want --name"},
		{"template push x", 2, "want a template and a destination"},
		{"template tag x", 2, "one or more tags"},
		{"template show nope", 3, "does not exist"},
		{"sandbox pause", 2, "want one or more sandbox ids"},
		{"sandbox pause nope", 3, "nope"},
		{"sandbox resume nope", 3, "nope"},
		{"sandbox resume ID --timeout -1s", 2, "want 0 (never) or at least 1s"},
		{"sandbox snapshot nope", 3, "nope"},
		{"sandbox snapshot ID --name ..", 2, ".."},
		{"sandbox fork ID --count 0", 2, "count 0: want 1 to 100"},
		{"sandbox fork nope", 3, "nope"},
		{"sandbox rollback ID", 2, "a sandbox id and a snapshot"},
		{"sandbox rollback ID nope", 3, "nope"},
		{"sandbox create --auto-pause-keeps all", 2, "want memory or files"},
		{"snapshot rm", 2, "one or more snapshot ids"},
		{"snapshot rm nope", 3, "does not exist"},
		{"snapshot show nope", 3, "cloister snapshot ls"},
		{"key revoke nope", 3, "nope"},
		{"events --since x", 2, "invalid duration"},
		{"events --limit 5000", 2, "1 to 1000"},
		{"cert", 2, "--domain"},
		{"cert --domain bad..name", 2, "bad..name"},
		{"bench --tier nope", 2, `tier "nope"`},
		{"bench --count 0", 2, "at least 1"},
		{"up --api-addr foo", 2, "want HOST:PORT"},
		{"status --api-url ftp://x", 2, "want http://HOST:PORT"},
		{"status --api-url http://127.0.0.1:1", 4, "no daemon answers at http://127.0.0.1:1"},
		{"status --api-key e2b_bad", 5, "key"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			args := strings.Fields(strings.ReplaceAll(tc.args, "ID", w.id))
			for i := range args {
				args[i] = strings.Trim(args[i], "'")
			}
			r := w.do(args...)
			if r.code != tc.code || !strings.Contains(r.err, tc.says) || !strings.HasPrefix(r.err, "cloister: ") || r.out != "" {
				t.Errorf("code %d, out %q, err %q; want code %d and %q", r.code, r.out, r.err, tc.code, tc.says)
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	for status, want := range map[int]int{400: 2, 401: 5, 403: 5, 404: 3, 409: 6, 429: 7, 500: 1, 502: 4, 503: 7} {
		if got := exitCode(fmt.Errorf("op: %w", &client.APIError{Code: status})); got != want {
			t.Errorf("HTTP %d: exit code %d, want %d", status, got, want)
		}
	}
}

func TestInterrupted(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, args := range [][]string{{"status"}, {"sandbox", "ls"}, {"bench", "--tier", "command"}} {
		if r := w.doContext(ctx, args...); r.code != exitInterrupted || !strings.HasSuffix(r.err, "cloister: interrupted\n") {
			t.Errorf("%q: %+v", args, r)
		}
	}
}

func TestCommands(t *testing.T) {
	w := newWorld(t)
	id := strings.TrimSpace(w.must("sandbox", "create", "--timeout", "1h", "-m", "user=ada\x1b[2J"))
	if list := w.must("sandbox", "ls", "-m", "user=ada\x1b[2J"); !strings.Contains(list, id) || strings.ContainsRune(list, '\x1b') {
		t.Errorf("%q", list)
	}
	if d := w.must("sandbox", "timeout", id, "0") + w.must("sandbox", "show", id); !strings.Contains(d, "never") {
		t.Error(d)
	}
	if r := w.do("sandbox", "kill", "nope", id); r.code != 3 || r.out != id+"\n" {
		t.Errorf("%+v", r)
	}
	if all := w.must("sandbox", "kill", "--all"); !strings.Contains(all, w.id) {
		t.Error(all)
	}
	w.must("key", "create", "ci")
	w.must("template", "ls")
	w.must("node", "ls")
	w.must("events")
}

func TestJSON(t *testing.T) {
	w := newWorld(t)
	for _, args := range []string{
		"status", "node ls", "sandbox ls", "sandbox ls -m no=body", "sandbox show ID", "sandbox logs ID", "sandbox timeout ID 5m",
		"sandbox create", "template ls", "key ls", "key create ci", "events", "events --type nothing", "version", "sandbox kill --all",
		"sandbox kill --all", "cert --domain a.test",
	} {
		out := w.must(append(strings.Fields(strings.ReplaceAll(args, "ID", w.id)), "-o", "json")...)
		var v any
		if err := json.Unmarshal([]byte(out), &v); err != nil || v == nil {
			t.Errorf("%s: %v: %s", args, err, out)
		}
		keysOf(t, args, v)
	}
}

// keysOf checks the keys of a JSON value, but not of maps that users fill.
func keysOf(t *testing.T, what string, v any) {
	t.Helper()
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			keysOf(t, what, e)
		}
	case map[string]any:
		for k, e := range v {
			if strings.Trim(k, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
				t.Errorf("%s: key %q is not in snake_case", what, k)
			}
			if e == nil {
				t.Errorf("%s: %s is null", what, k)
			}
			if k == "labels" {
				continue
			}
			keysOf(t, what, e)
		}
	}
}

func TestComplete(t *testing.T) {
	w := newWorld(t)
	for args, want := range map[string]string{
		"sandbox show ":        w.id + "\tbase -",
		"sandbox kill a ":      w.id + "\tbase -",
		"sandbox cp ":          w.id + ":\tbase -",
		"template rm ba":       "base\tready",
		"sandbox create -t ":   "base\tready",
		"key revoke ":          "key1\t",
		"sandbox show x ":      ":4\n",
		"sandbox cp ./":        ":0\n",
		"status --output ":     "json",
		"sandbox timeout odd":  ":4\n",
		"sandbox timeout id 3": ":4\n",
	} {
		if out := w.must(append([]string{"__complete"}, strings.Split(args, " ")...)...); !strings.Contains(out, want) {
			t.Errorf("%q: %q, want %q", args, out, want)
		}
	}
}

func TestTarget(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cloister.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	empty := t.TempDir()
	for _, tc := range []struct {
		name   string
		root   bool
		env    []string
		args   []string
		socket bool
		fails  bool
	}{
		{name: "root", root: true, env: []string{"CLOISTER_DATA_DIR=" + dir}, socket: true},
		{name: "root, no daemon", root: true, env: []string{"CLOISTER_DATA_DIR=" + empty}, socket: true},
		{name: "root with a key and a daemon", root: true, env: []string{"CLOISTER_DATA_DIR=" + dir, "E2B_API_KEY=k"}, socket: true},
		{name: "root with a key and no daemon", root: true, env: []string{"CLOISTER_DATA_DIR=" + empty, "E2B_API_KEY=k"}},
		{name: "root elsewhere", root: true, env: []string{"CLOISTER_DATA_DIR=" + dir, "E2B_API_KEY=k", "E2B_API_URL=http://h:1"}},
		{name: "root elsewhere without a key", root: true, env: []string{"CLOISTER_DATA_DIR=" + dir, "E2B_API_URL=http://h:1"}, fails: true},
		{name: "flag before environment", root: true, env: []string{"E2B_API_KEY=k", "E2B_API_URL=http://h:1"}, args: []string{"--data-dir", dir}, socket: true},
		{name: "URL flag before directory flag", root: true, args: []string{"--data-dir", dir, "--api-url", "http://h:1", "--api-key", "k"}},
		{name: "user", env: []string{"E2B_API_KEY=k", "CLOISTER_DATA_DIR=" + dir}},
		{name: "user without a key", env: []string{"CLOISTER_DATA_DIR=" + dir}, fails: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var tg target
			c := &cobra.Command{}
			tg.flags(c, tc.env)
			tg.root = tc.root
			if err := c.ParseFlags(tc.args); err != nil {
				t.Fatal(err)
			}
			cn, err := tg.connect()
			if (err != nil) != tc.fails {
				t.Fatal(err)
			}
			if err == nil && cn.local != tc.socket {
				t.Errorf("goes to %s", cn.where)
			}
		})
	}
}

func TestPurgeOfNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may")
	}
	w := newWorld(t)
	if r := w.do("down", "--purge", "--data-dir", filepath.Join(t.TempDir(), "none")); r.code != 0 || !strings.HasPrefix(r.err, "nothing to remove: ") {
		t.Errorf("%+v", r)
	}
}

func TestDetachedArgs(t *testing.T) {
	got := detachedArgs([]string{"up", "-d", "--detach", "--detach=true", "--data-dir", "/x"})
	if d := cmp.Diff([]string{"up", "--data-dir", "/x", "--start-events"}, got); d != "" {
		t.Error(d)
	}
}

func TestTail(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	if err := os.WriteFile(name, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(tail(name), "\n")
	if len(lines) != 10 || lines[0] != "line 4990" || lines[9] != "line 4999" {
		t.Error(lines)
	}
	if got := tail(filepath.Join(t.TempDir(), "nope")); !strings.Contains(got, "no such file") {
		t.Error(got)
	}
}
