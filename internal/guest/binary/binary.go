// Package binary carries the compiled agent that runs inside each sandbox, so that one file installs both.
//
// The build puts it into bin before this package is compiled; a plain "go build" of a clean checkout works, too, and
// Bytes then says what is missing. The package has no state and is safe for concurrent use.
package binary

import (
	"bytes"
	"compress/gzip"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
)

//go:embed all:bin
var files embed.FS

// Bytes returns the agent's executable for the architecture that this program runs on. It is unpacked on each call:
// callers keep it, or better a file of it.
func Bytes() ([]byte, error) {
	return read(files, runtime.GOARCH)
}

// read takes a plain agent, or one that was compressed to make this program smaller.
func read(from fs.FS, arch string) ([]byte, error) {
	name := "bin/cloister-guest-" + arch
	if plain, err := fs.ReadFile(from, name); err == nil {
		return plain, nil
	}
	packed, err := fs.ReadFile(from, name+".gz")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the sandbox agent for %s is not part of this binary: build it with \"make build\"", arch)
	}
	if err != nil {
		return nil, fmt.Errorf("read the sandbox agent: %w", err)
	}
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("unpack the sandbox agent: %w", err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		return nil, fmt.Errorf("unpack the sandbox agent: %w", err)
	}
	return plain, nil
}
