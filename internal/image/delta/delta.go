// Package delta finds what changed between two archives of one sandbox's changes, and writes it as a layer.
//
// An archive, in the form of an OCI layer, says everything that a sandbox has changed since it started. Read makes an
// Archive of it, in which contents are hashed and those that the archive before had already are left out; Write writes
// what is different as a layer of its own, so that the layers one by one give the same files as the last archive alone.
// The same changes give the same bytes: names are sorted, and the first name of a file with several holds its contents.
//
// It owns the rules of what differs and of what the node itself writes into a sandbox, which is never part of a layer. It
// must not know where layers are kept. An Archive is used by one goroutine at a time.
package delta

import (
	"archive/tar"
	"maps"
	"slices"
	"strings"

	"github.com/cloister-dev/cloister/internal/image/tree"
)

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	reserved = ".wh..wh."

	maxName  = 255
	maxPath  = 4096
	maxDepth = 1024

	// typeWhiteout is the type of an inode that says that there is nothing.
	typeWhiteout = 'w'
	// typeImplied is that of a directory that is only known from the names below it.
	typeImplied = 'i'
)

// header is what of an entry can change, besides its contents.
type header struct {
	kind         byte
	mode         int64
	uid, gid     int
	sec          int64
	nsec         int
	target       string
	major, minor int64
	// xattrs are the extended attributes, sorted and quoted, to compare them.
	xattrs string
	size   int64
}

// inode is a file, directory or whiteout of an archive. Several names may lead to one file.
type inode struct {
	header
	// records are the extended attributes as PAX has them.
	records map[string]string
	sum     [32]byte
	// content is a file's contents while the archive is new; kept where they lie in the layer that they went into.
	content, kept tree.Content
	// opaque says that the directory hides what lies below it.
	opaque bool
	// kids are a directory's names.
	kids map[string]*inode
	// names are the paths of a file, in the order in which they are written.
	names []string
}

// Archive is everything that a sandbox had changed at one moment.
type Archive struct{ root *inode }

// Empty is the archive of a sandbox that has changed nothing yet.
func Empty() *Archive { return &Archive{root: &inode{header: header{kind: typeImplied}}} }

func (n *inode) isDir() bool { return n != nil && (n.kind == tar.TypeDir || n.kind == typeImplied) }

func (n *inode) isFile() bool { return n != nil && n.kind == tar.TypeReg }

// lookup returns what the path leads to, or nil.
func (a *Archive) lookup(parts []string) *inode {
	n := a.root
	for _, name := range parts {
		if n = n.kids[name]; n == nil {
			return nil
		}
	}
	return n
}

// name tells each file its names, without those that are never part of a layer.
func (a *Archive) name() {
	var visit func(string, *inode)
	visit = func(at string, dir *inode) {
		for _, base := range dir.sorted() {
			n, name := dir.kids[base], at+"/"+base
			switch {
			case ours(name):
			case n.isDir():
				visit(name, n)
			case n.kind != typeWhiteout:
				n.names = append(n.names, name)
			}
		}
	}
	visit("", a.root)
}

func (n *inode) sorted() []string { return slices.Sorted(maps.Keys(n.kids)) }

// ours reports whether the node writes what the path names, in every sandbox.
func ours(name string) bool {
	switch name {
	case "/run/e2b", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf":
		return true
	}
	for _, dir := range []string{"/proc/", "/sys/", "/dev/"} {
		if strings.HasPrefix(name, dir) {
			return true
		}
	}
	return false
}

// touched reports whether the node itself changes the directory when it writes what is its own, so that its time says
// nothing.
func touched(name string) bool {
	switch name {
	case "", "/etc", "/run", "/proc", "/sys", "/dev":
		return true
	}
	return false
}
