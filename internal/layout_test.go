// Package internal_test holds the rules that the tree as a whole obeys.
package internal_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/cloister-dev/cloister/"

// mayImport says which of our packages each package may import; a trailing "/..." stands for everything below. Absent
// means nothing. Reasons for what is not obvious are in docs/ARCHITECTURE.md.
var mayImport = map[string][]string{
	"cmd/cloister":          {"internal/cli", "internal/engine/gvisor"},
	"cmd/cloister-sentry":   {"internal/engine/gvisor"},
	"cmd/cloister-guest":    {"internal/guest"},
	"internal/sandbox":      nil,
	"internal/gen/...":      {"internal/gen/..."},
	"internal/telemetry":    nil,
	"internal/client":       nil,
	"internal/config":       {"internal/sandbox"},
	"internal/auth":         {"internal/sandbox"},
	"internal/store":        {"internal/sandbox"},
	"internal/journal":      {"internal/sandbox"},
	"internal/snapshot":     {"internal/sandbox"},
	"internal/recipe":       {"internal/sandbox"},
	"internal/history":      {"internal/sandbox"},
	"internal/guestnet":     {"internal/sandbox"},
	"internal/image/...":    {"internal/sandbox", "internal/image/..."},
	"internal/engine":       {"internal/sandbox"},
	"internal/engine/...":   {"internal/sandbox", "internal/engine/..."},
	"internal/scheduler":    {"internal/sandbox"},
	"internal/proxy":        {"internal/sandbox", "internal/proxy/h1"},
	"internal/proxy/h1":     nil,
	"internal/link":         {"internal/sandbox"},
	"internal/bucket":       {"internal/sandbox"},
	"internal/routes":       {"internal/sandbox", "internal/gen/..."},
	"internal/lifecycle":    {"internal/sandbox", "internal/store"},
	"internal/install":      {"internal/sandbox"},
	"internal/guest":        {"internal/gen/..."},
	"internal/guest/binary": nil,
	"internal/control":      {"internal/sandbox", "internal/scheduler", "internal/store", "internal/history", "internal/recipe", "internal/gen/..."},
	"internal/agent":        {"internal/sandbox", "internal/gen/...", "internal/engine", "internal/image", "internal/guestnet", "internal/journal", "internal/snapshot", "internal/recipe"},
	"internal/api/...":      {"internal/sandbox", "internal/gen/...", "internal/auth", "internal/control", "internal/client", "internal/recipe", "internal/api/..."},
	"internal/daemon":       {"internal/..."},
	"internal/cli":          {"internal/gen/...", "internal/config", "internal/daemon", "internal/install", "internal/client", "internal/auth", "internal/recipe"},
	"internal/warm":         nil,
	"test/...":              {"internal/...", "test/..."},
}

// listed is the part of go list's answer that the rules look at.
type listed struct {
	ImportPath string
	Doc        string
	Imports    []string
	GoFiles    []string
}

func TestImports(t *testing.T) {
	for _, p := range listPackages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		if len(p.GoFiles) == 0 {
			continue // only tests, which may know everything
		}
		allowed, known := rulesFor(name)
		if !known {
			t.Errorf("%s: no import rule; add it to mayImport and to docs/ARCHITECTURE.md", name)
			continue
		}
		for _, imp := range p.Imports {
			if imp, ours := strings.CutPrefix(imp, module); ours && !matchesAny(allowed, imp) {
				t.Errorf("%s imports %s, which the rules forbid", name, imp)
			}
		}
		if name == "internal/daemon" && slices.Contains(p.Imports, module+"internal/cli") {
			t.Errorf("%s imports internal/cli, which the rules forbid", name)
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range listPackages(t) {
		if p.Doc == "" && len(p.GoFiles) > 0 && !strings.Contains(p.ImportPath, "/internal/gen/") {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

func listPackages(t *testing.T) []listed {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Doc,Imports,GoFiles", "../...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// rulesFor returns what the package may import: the rule of its own name, else that of the nearest "/..." above it.
func rulesFor(name string) (allowed []string, known bool) {
	if allowed, known = mayImport[name]; known {
		return allowed, true
	}
	for at := name; ; {
		if allowed, known = mayImport[at+"/..."]; known {
			return allowed, true
		}
		i := strings.LastIndexByte(at, '/')
		if i < 0 {
			return nil, false
		}
		at = at[:i]
	}
}

func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		if below, ok := strings.CutSuffix(p, "/..."); ok {
			return name == below || strings.HasPrefix(name, below+"/")
		}
		return p == name
	})
}
