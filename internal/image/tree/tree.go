// Package tree is a Unix file tree held in memory: names and attributes in nodes, contents by reference.
//
// Layers, archives and directories are applied to a Tree, and paths are resolved in it as a chroot would, so nothing that
// an image says can reach the machine's own files: there are none involved. It owns the rules of tar layers (whiteouts,
// opaque directories, hard links) and the limits on what an image may hold. It must not know what an image is for. A Tree
// is used by one goroutine at a time.
package tree

import (
	"io"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	maxName   = 255
	maxPath   = 4096
	maxTarget = 4095
	maxLinks  = 40
	maxDepth  = 1024
)

// Limits bound what a tree may hold.
type Limits struct {
	// Entries is the number of names that may be added, those that are replaced later included.
	Entries int
	// Bytes is the sum of the sizes of the files that may be added, those that are replaced later included.
	Bytes int64
}

// DefaultLimits is generous for images that people make and small enough for the machine to survive others.
func DefaultLimits() Limits { return Limits{Entries: 1_000_000, Bytes: 64 << 30} }

// Content is the bytes of a regular file, read when they are needed.
type Content interface {
	Size() int64
	Open() (io.ReadCloser, error)
}

// Node is one inode. Several names may lead to the same Node.
type Node struct {
	// Mode holds the type and permission bits as in stat(2).
	Mode     uint32
	UID, GID uint32
	// Rdev is the device number in the encoding of Device.
	Rdev uint32
	// Sec and Nsec are the time of the last modification.
	Sec  int64
	Nsec uint32
	// Target is a symbolic link's.
	Target string
	// Content is a regular file's; nil means empty.
	Content Content

	children map[string]entry
}

// entry is a name's meaning, and the layer that gave it.
type entry struct {
	node  *Node
	layer int
}

// Type returns the type bits, such as unix.S_IFDIR.
func (n *Node) Type() uint32 { return n.Mode & unix.S_IFMT }

// IsDir reports whether n is a directory.
func (n *Node) IsDir() bool { return n.Type() == unix.S_IFDIR }

// Size is the number of bytes that a regular file or symbolic link holds.
func (n *Node) Size() int64 {
	switch {
	case n.Type() == unix.S_IFLNK:
		return int64(len(n.Target))
	case n.Content == nil:
		return 0
	default:
		return n.Content.Size()
	}
}

// Names returns the names in a directory in byte order.
func (n *Node) Names() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Child returns what the name in directory n leads to, or nil.
func (n *Node) Child(name string) *Node { return n.children[name].node }

// Device encodes a device number as Linux keeps it on disk: 12 bits of major, 20 of minor.
func Device(major, minor uint32) uint32 { return minor&0xff | major<<8 | (minor&^0xff)<<12 }

// Tree is a file tree under construction.
type Tree struct {
	Root *Node

	limits  Limits
	entries int
	bytes   int64
	layer   int
	// dropped counts extended attributes that were left out.
	dropped int
}

// New returns a tree that has only its root directory.
func New(limits Limits) *Tree {
	return &Tree{Root: &Node{Mode: unix.S_IFDIR | 0o755, children: map[string]entry{}}, limits: limits}
}

// DroppedXattrs is how many extended attributes the sources had. A tree keeps none.
func (t *Tree) DroppedXattrs() int { return t.dropped }

// place is where a path leads: the directory and name that hold it, and the node unless nothing is there yet. The root
// has neither directory nor name.
type place struct {
	dir  *Node
	name string
	node *Node
}

// walker resolves one path.
type walker struct {
	tree   *Tree
	stack  []*Node
	todo   []string
	links  int
	follow bool // also a symbolic link at the end
	create bool // missing directories on the way
	path   string
}

func (t *Tree) locate(path string, follow, create bool) (place, error) {
	if len(path) > maxPath || strings.IndexByte(path, 0) >= 0 {
		return place{}, sandbox.Invalidf("path %.64q... has %d bytes or a zero byte; at most %d bytes are allowed",
			path, len(path), maxPath)
	}
	w := walker{tree: t, stack: []*Node{t.Root}, todo: split(path), follow: follow, create: create, path: path}
	for len(w.todo) > 0 {
		at, done, err := w.step()
		if err != nil || done {
			return at, err
		}
	}
	return place{node: w.top()}, nil
}

func (w *walker) top() *Node { return w.stack[len(w.stack)-1] }

// step resolves one component; done means that it was the last and at is the answer.
func (w *walker) step() (at place, done bool, err error) {
	name := w.todo[0]
	w.todo = w.todo[1:]
	if name == ".." {
		w.stack = w.stack[:max(1, len(w.stack)-1)]
		return place{}, false, nil
	}
	if len(name) > maxName {
		return place{}, false, sandbox.Invalidf("name %.32q... has %d bytes; at most %d are allowed", name, len(name), maxName)
	}
	if len(w.stack) > maxDepth {
		return place{}, false, sandbox.Invalidf("path %.64q... is more than %d directories deep", w.path, maxDepth)
	}
	dir, last := w.top(), len(w.todo) == 0
	if !dir.IsDir() {
		return place{}, false, sandbox.Invalidf("path %q goes through something that is not a directory", w.path)
	}
	child := dir.Child(name)
	switch {
	case child == nil && last:
		return place{dir: dir, name: name}, true, nil
	case child == nil && !w.create:
		return place{}, false, sandbox.NotFoundf("path %q does not exist", w.path)
	case child == nil && strings.HasPrefix(name, whiteout):
		return place{}, false, sandbox.Invalidf("path %.256q needs a directory named like a whiteout, %.256q", w.path, name)
	case child == nil:
		child = &Node{Mode: unix.S_IFDIR | 0o755}
		if err := w.tree.set(dir, name, child); err != nil {
			return place{}, false, err
		}
	case child.Type() == unix.S_IFLNK && (!last || w.follow):
		return place{}, false, w.enterLink(child.Target)
	case last:
		return place{dir: dir, name: name, node: child}, true, nil
	}
	w.stack = append(w.stack, child)
	return place{}, false, nil
}

func (w *walker) enterLink(target string) error {
	if w.links++; w.links > maxLinks {
		return sandbox.Invalidf("path %q goes through more than %d symbolic links", w.path, maxLinks)
	}
	if strings.HasPrefix(target, "/") {
		w.stack = w.stack[:1]
	}
	w.todo = append(split(target), w.todo...)
	return nil
}

// split returns the components of a path that mean something.
func split(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" || s == "." })
}

// set makes name in dir lead to n, in place of what was there.
func (t *Tree) set(dir *Node, name string, n *Node) error {
	if t.entries++; t.entries > t.limits.Entries {
		return sandbox.Invalidf("the image has more than %d entries", t.limits.Entries)
	}
	if dir.children == nil {
		dir.children = map[string]entry{}
	}
	dir.children[name] = entry{node: n, layer: t.layer}
	return nil
}

// charge counts the bytes of a file that is about to be added.
func (t *Tree) charge(size int64) error {
	if size < 0 || size > math.MaxInt64-t.bytes || t.bytes+size > t.limits.Bytes {
		return sandbox.Invalidf("the image's files have more than %d bytes together", t.limits.Bytes)
	}
	t.bytes += size
	return nil
}
