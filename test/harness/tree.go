package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// tinyPrograms are those of a tiny tree.
func tinyPrograms() []string {
	return []string{"bash", "sh", "cat", "head", "sleep", "sync", "rm", "uname", "tail", "sha256sum", "mkdir", "mv"}
}

// TinyTree makes a root directory with a shell and little else, from this machine's own programs: a template in no time.
func TinyTree(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	put := func(from, to string) {
		to = filepath.Join(dir, to)
		raw, err := os.ReadFile(from) //nolint:gosec // a program of this machine
		if err == nil {
			err = os.MkdirAll(filepath.Dir(to), 0o755) //nolint:gosec // guests of any user look there
		}
		if err == nil {
			err = os.WriteFile(to, raw, 0o755) //nolint:gosec // in the test's own directory
		}
		if err != nil {
			tb.Fatal(err)
		}
	}
	library := regexp.MustCompile(`/\S+\.so\S*`)
	for _, name := range tinyPrograms() {
		path, err := exec.LookPath(name)
		if err != nil {
			tb.Fatal(err)
		}
		put(path, "bin/"+name)
		out, err := exec.CommandContext(tb.Context(), "ldd", path).Output() //nolint:gosec // a program of this machine
		if err != nil {
			tb.Fatalf("ldd %s: %v", path, err)
		}
		for _, lib := range library.FindAllString(string(out), -1) {
			put(lib, lib)
		}
	}
	for _, name := range []string{"etc", "tmp", "proc", "sys", "dev", "root", "home", "var"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil { //nolint:gosec // likewise
			tb.Fatal(err)
		}
	}
	return dir
}
