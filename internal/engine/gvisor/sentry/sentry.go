// Package sentry carries the program that each sandbox runs in, so that one file is all there is to install.
//
// A sandbox's start executes that program three times over. As a program of its own it holds nothing but gVisor, and begins
// in a third of the time that the whole of Cloister takes. `make sentry` puts it into bin, which is not under version
// control. The package holds no state.
package sentry

import (
	"bytes"
	"compress/gzip"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

//go:embed all:bin
var files embed.FS

const (
	prefix = "cloister-sentry-"
	// digestLen is how much of the digest, in hex, names a version.
	digestLen = 16
	// maxSize bounds the unpacked program, in bytes.
	maxSize = 256 << 20
)

// Install puts the program into dir, unless it is there already, and returns its path. Other versions are removed; sandboxes
// that run them are not touched. It must not run twice at the same time on one dir.
func Install(dir string) (string, error) {
	name := "bin/" + prefix + runtime.GOARCH
	digest, err := files.ReadFile(name + ".sha256") // the archive itself would stay in memory once it was looked at
	if err != nil || len(digest) < digestLen {
		return "", fmt.Errorf("this program was built without the sentry for %s: build it with `make build`", runtime.GOARCH)
	}
	path := filepath.Join(dir, prefix+string(digest[:digestLen]))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	packed, err := files.ReadFile(name + ".gz")
	if err != nil {
		return "", fmt.Errorf("install sentry: %w", err)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil { //nolint:gosec // the sentry, which is nobody, executes it
		return "", fmt.Errorf("install sentry: %w", err)
	}
	if err := unpack(packed, path); err != nil {
		return "", fmt.Errorf("install sentry: %w", err)
	}
	return path, removeOthers(dir, filepath.Base(path))
}

// unpack writes the program under a temporary name and renames it when it is whole.
func unpack(packed []byte, path string) (err error) {
	zr, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return err
	}
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755) //nolint:gosec // a program
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.LimitReader(zr, maxSize))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, path)
}

func removeOthers(dir, keep string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look for old sentries: %w", err)
	}
	for _, e := range entries {
		if e.Name() != keep && strings.HasPrefix(e.Name(), prefix) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("remove old sentry: %w", err)
			}
		}
	}
	return nil
}
