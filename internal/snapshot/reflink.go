package snapshot

import (
	"os"

	"golang.org/x/sys/unix"
)

// Reflinks reports whether files in dir can share their blocks (XFS, btrfs). It tries it.
func Reflinks(dir string) bool {
	from, err := os.CreateTemp(dir, newPrefix+"reflink-*")
	if err != nil {
		return false
	}
	defer discard(from)
	to, err := os.CreateTemp(dir, newPrefix+"reflink-*")
	if err != nil {
		return false
	}
	defer discard(to)
	if _, err := from.Write(make([]byte, 4096)); err != nil {
		return false
	}
	return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) == nil
}

func discard(f *os.File) {
	_ = f.Close() // of no use any more
	_ = os.Remove(f.Name())
}
