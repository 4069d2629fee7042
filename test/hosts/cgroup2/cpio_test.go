package cgroup2_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path"
)

// archive writes the first file system of a kernel: a gzipped cpio archive in the format "newc", which is described in the
// kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Close ends it.
type archive struct {
	zip   *gzip.Writer
	inode int
	dirs  map[string]bool
}

func newArchive(w io.Writer) *archive {
	return &archive{zip: gzip.NewWriter(w), dirs: map[string]bool{"/": true, ".": true}}
}

// add writes a program or another file, and before it the directories that lead to it.
func (a *archive) add(name string, content []byte) error {
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	const executable = 0o100755
	return a.entry(name, executable, content)
}

func (a *archive) dir(name string) error {
	if a.dirs[name] {
		return nil
	}
	if err := a.dir(path.Dir(name)); err != nil {
		return err
	}
	a.dirs[name] = true
	const directory = 0o040755
	return a.entry(name, directory, nil)
}

func (a *archive) entry(name string, mode int, content []byte) error {
	a.inode++
	var b bytes.Buffer
	fields := [13]int{0: a.inode, 1: mode, 4: 1, 6: len(content), 11: len(name) + 1}
	b.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(&b, "%08x", f)
	}
	b.WriteString(name + "\x00")
	pad(&b)
	b.Write(content)
	pad(&b)
	_, err := a.zip.Write(b.Bytes())
	return err
}

// pad fills an entry up to a multiple of four bytes, at which each entry begins.
func pad(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

func (a *archive) Close() error {
	if err := a.entry("TRAILER!!!", 0, nil); err != nil {
		return err
	}
	return a.zip.Close()
}

func (a *archive) addFile(name, source string) error {
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	return a.add(name, content)
}
