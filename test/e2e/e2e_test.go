// Package e2e_test drives the real daemon with the official, unmodified npm packages.
package e2e_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/test/harness"
)

// TestSDK runs every file of sdk/ against one daemon with node's own test runner.
func TestSDK(t *testing.T) {
	t.Parallel()
	d := harness.Start(t, "--pool-min", "1", "--pool-max", "8") // filling pools for templates that live for seconds would take most of the time
	here := filepath.Join(harness.Root(), "test", "e2e")
	install(t, here)
	env := append(d.Env(), registries(t)...)
	files, err := filepath.Glob(filepath.Join(here, "sdk", "*.test.mjs"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no test files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel() // half of the time they wait
			ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "node", "--test", "--test-concurrency=1", "--test-reporter=spec", file)
			cmd.Dir = here
			cmd.Env = env
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			t.Logf("%s", out)
		})
	}
}

// install puts the pinned packages in place, once.
func install(t *testing.T, dir string) {
	t.Helper()
	if info, err := os.Stat(filepath.Join(dir, "node_modules", ".package-lock.json")); err == nil {
		if lock, err := os.Stat(filepath.Join(dir, "package-lock.json")); err == nil && !info.ModTime().Before(lock.ModTime()) {
			return
		}
	}
	cmd := exec.CommandContext(t.Context(), "npm", "ci", "--no-fund", "--no-audit")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v\n%s", err, out)
	}
}
