package recipe

import (
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const base = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

func recipeOf(change func(steps []Step)) []Step {
	steps := []Step{
		{Type: Env, Args: []string{"A", "1", "B", "2"}},
		{Type: Copy, Args: []string{"app", "/app/"}, FilesHash: "abc"},
		{Type: Run, Args: []string{"make"}},
		{Type: User, Args: []string{"root"}},
		{Type: Run, Args: []string{"make install"}},
	}
	if change != nil {
		change(steps)
	}
	return steps
}

func keysOf(t *testing.T, from string, g sandbox.GuestSettings, steps []Step) []string {
	t.Helper()
	keys, err := Keys(from, g, steps)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func TestKeys(t *testing.T) {
	g := sandbox.GuestSettings{Env: map[string]string{"X": "1", "Y": "2"}, User: "user"}
	want := keysOf(t, base, g, recipeOf(nil))
	if slices.Sort(want); len(slices.Compact(slices.Clone(want))) != 5 {
		t.Errorf("not all different: %v", want)
	}
	want = keysOf(t, base, g, recipeOf(nil))
	if diff := cmp.Diff(want, keysOf(t, base, sandbox.GuestSettings{Env: maps.Clone(g.Env), User: "user"}, recipeOf(nil))); diff != "" {
		t.Errorf("the same recipe:\n%s", diff)
	}
	for name, test := range map[string]struct {
		change func([]Step)
		same   int // how many keys from the first on stay
	}{
		"force":             {func(s []Step) { s[2].Force = true }, 5},
		"an early variable": {func(s []Step) { s[0].Args[1] = "3" }, 0},
		"files":             {func(s []Step) { s[1].FilesHash = "abd" }, 1},
		"destination":       {func(s []Step) { s[1].Args[1] = "/app2/" }, 1},
		"a command":         {func(s []Step) { s[2].Args[0] = "make x" }, 2},
		"arguments moved":   {func(s []Step) { s[2].Args = []string{"ma", "ke"} }, 2},
		"the user":          {func(s []Step) { s[3].Args[0] = "app" }, 3},
		"the last":          {func(s []Step) { s[4].Args[0] = "true" }, 4},
	} {
		got := keysOf(t, base, g, recipeOf(test.change))
		same := 0
		for same < 5 && got[same] == want[same] {
			same++
		}
		if same != test.same {
			t.Errorf("%s: %d keys are the same, want %d", name, same, test.same)
		}
	}
	for name, keys := range map[string][]string{
		"another image": keysOf(t, base+"1", g, recipeOf(nil)),
		"another user":  keysOf(t, base, sandbox.GuestSettings{Env: g.Env, User: "root"}, recipeOf(nil)),
		"another env":   keysOf(t, base, sandbox.GuestSettings{Env: map[string]string{"X": "1"}, User: "user"}, recipeOf(nil)),
		"another place": keysOf(t, base, sandbox.GuestSettings{Env: g.Env, User: "user", WorkDir: "/x"}, recipeOf(nil)),
	} {
		if keys[0] == want[0] {
			t.Errorf("%s: the same key", name)
		}
	}
	if _, err := Keys(base, g, []Step{{Type: "ADD"}}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("an unknown step: %v", err)
	}
}

func TestFinalKey(t *testing.T) {
	g := sandbox.GuestSettings{User: "user"}
	size := sandbox.Resources{MilliCPU: 1, MemoryBytes: 2, DiskBytes: 3}
	all := []string{
		FinalKey("a", g, size, "start", "ready"),
		FinalKey("b", g, size, "start", "ready"),
		FinalKey("a", sandbox.GuestSettings{}, size, "start", "ready"),
		FinalKey("a", g, sandbox.Resources{MilliCPU: 1, MemoryBytes: 3, DiskBytes: 2}, "start", "ready"),
		FinalKey("a", g, size, "startready", ""),
		FinalKey("a", g, size, "", "startready"),
	}
	if slices.Sort(all); len(slices.Compact(all)) != 6 {
		t.Error("not all different")
	}
}

func TestAfter(t *testing.T) {
	g := sandbox.GuestSettings{Env: map[string]string{"BASE": "b"}}
	for _, s := range []Step{
		{Type: Env, Args: []string{"A", "$BASE/x", "PATH", "/opt/bin:$PATH", "SEEN", "$A"}},
		{Type: User, Args: []string{"app:staff"}},
		{Type: WorkDir, Args: []string{"/srv/$A"}},
		{Type: WorkDir, Args: []string{"sub"}},
		{Type: Run, Args: []string{"exit 1"}},
	} {
		var err error
		if g, err = After(g, s); err != nil {
			t.Fatal(err)
		}
	}
	want := sandbox.GuestSettings{
		Env:  map[string]string{"BASE": "b", "A": "b/x", "PATH": "/opt/bin:" + defaultPath, "SEEN": ""},
		User: "app", WorkDir: "/srv/b/x/sub",
	}
	if diff := cmp.Diff(want, g); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCheck(t *testing.T) {
	for name, s := range map[string]Step{
		"type":            {Type: "run", Args: []string{"x"}},
		"no command":      {Type: Run},
		"empty command":   {Type: Run, Args: []string{" "}},
		"run user":        {Type: Run, Args: []string{"x", "a b"}},
		"zero byte":       {Type: Run, Args: []string{"x\x00"}},
		"much":            {Type: Run, Args: []string{strings.Repeat("x", maxArgBytes+1)}},
		"no files":        {Type: Copy, Args: []string{"a", "b"}},
		"bad hash":        {Type: Copy, Args: []string{"a", "b"}, FilesHash: "../x"},
		"no destination":  {Type: Copy, Args: []string{"a", ""}, FilesHash: "a"},
		"owner":           {Type: Copy, Args: []string{"a", "b", "a:b:c"}, FilesHash: "a"},
		"mode":            {Type: Copy, Args: []string{"a", "b", "", "rwx"}, FilesHash: "a"},
		"odd environment": {Type: Env, Args: []string{"A"}},
		"no environment":  {Type: Env},
		"name":            {Type: Env, Args: []string{"A=B", "x"}},
		"workdir":         {Type: WorkDir, Args: []string{""}},
		"user":            {Type: User},
	} {
		if err := Check(s); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, user := range []string{"$NOBODY", "a b", "-x"} {
		if _, err := After(sandbox.GuestSettings{}, Step{Type: User, Args: []string{user}}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("user %q: %v", user, err)
		}
	}
}

func TestExpand(t *testing.T) {
	g := sandbox.GuestSettings{Env: map[string]string{"A": "1", "E": "", "A_B": "3"}, User: "root"}
	for text, want := range map[string]string{
		"":                     "",
		"$A":                   "1",
		"x${A}y":               "x1y",
		"$A_B$A-B":             "31-B",
		"$MISSING!":            "!",
		"${E:-none}":           "none",
		"${A:-none}":           "1",
		"${A:+some}${E:+some}": "some",
		"${E:-${A}}":           "1",
		`\$A \\$A \x`:          `$A \1 \x`,
		"100%$":                "100%$",
		"$1 $ ${ ${} ${A":      "$1 $ ${ ${} ${A",
		"${A?no}":              "${A?no}",
		"$HOME":                "/root",
	} {
		if got, err := Expand(text, g); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", text, got, err, want)
		}
	}
}

func TestExpandBounds(t *testing.T) {
	g := sandbox.GuestSettings{Env: map[string]string{"A": strings.Repeat("x", 1000)}}
	if _, err := Expand(strings.Repeat("$A", 1000), g); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a long result: %v", err)
	}
	var err error
	for range 40 {
		if g, err = After(g, Step{Type: Env, Args: []string{"A", "$A$A"}}); err != nil {
			break
		}
	}
	if !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("doubling: %v", err)
	}
	var args []string
	for i := range 200 {
		args = append(args, "V"+strconv.Itoa(i), strings.Repeat("x", 5000))
	}
	g = sandbox.GuestSettings{Env: map[string]string{"A": strings.Repeat("x", 100_000)}}
	if _, err := After(g, Step{Type: Env, Args: args}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a large environment: %v", err)
	}
}

func FuzzAfter(f *testing.F) {
	f.Add(Env, "A", "${A:-${B:+$C}}", "h")
	f.Add(User, "a:b", "", "")
	f.Add(WorkDir, "../$A/", "", "")
	f.Add(Copy, "a", "b", "hash")
	f.Fuzz(func(t *testing.T, kind, a, b, files string) {
		g := sandbox.GuestSettings{Env: map[string]string{"A": "1"}, WorkDir: "/w"}
		s := Step{Type: kind, Args: []string{a, b}, FilesHash: files}
		if kind == WorkDir || kind == User {
			s.Args = s.Args[:1]
		}
		after, err := After(g, s)
		if err != nil {
			return
		}
		if after.User != "" && !userForm.MatchString(after.User) {
			t.Errorf("user %q", after.User)
		}
		for name := range after.Env {
			if name == "" || strings.Contains(name, "=") {
				t.Errorf("variable %q", name)
			}
		}
		if _, err := Keys(base, g, []Step{s}); err != nil {
			t.Errorf("keys: %v", err)
		}
	})
}
