package guest

import (
	"fmt"
	"path/filepath"
	"strings"
)

// maxPath is Linux's own limit.
const maxPath = 4096

// resolvePath returns the absolute, clean path that a client means: relative ones and those under ~ start at the
// user's home, an empty one is the working directory.
func resolvePath(path string, a *account, workdir string) (string, error) {
	switch {
	case len(path) >= maxPath:
		return "", fmt.Errorf("path of %d bytes is too long: at most %d", len(path), maxPath-1)
	case strings.ContainsRune(path, 0):
		return "", fmt.Errorf("path %q contains a zero byte", path)
	case path == "" && workdir != "":
		return resolvePath(workdir, a, "")
	case strings.HasPrefix(path, "~") && path != "~" && !strings.HasPrefix(path, "~/"):
		return "", fmt.Errorf("path %q: the home of another user cannot be named with ~; give the full path", path)
	}
	path = expandHome(path, a)
	if filepath.IsAbs(path) {
		return filepath.Clean(path), nil
	}
	return filepath.Join(a.home, path), nil
}

// expandHome replaces a leading ~.
func expandHome(path string, a *account) string {
	if path == "~" || strings.HasPrefix(path, "~/") {
		return filepath.Join(a.home, path[1:])
	}
	return path
}
