package tree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Attr is what an edit gives to the node that it makes.
type Attr struct {
	// Perm is the permission bits with setuid, setgid and sticky.
	Perm     uint32
	UID, GID uint32
	Sec      int64
}

func (a Attr) node(kind uint32) *Node {
	return &Node{Mode: kind | a.Perm&0o7777, UID: a.UID, GID: a.GID, Sec: a.Sec}
}

// Lookup returns what the path leads to, through symbolic links, or nil where there is nothing.
func (t *Tree) Lookup(path string) *Node { return t.lookup(path, true) }

// LookupLink is Lookup that does not follow a symbolic link at the path's end.
func (t *Tree) LookupLink(path string) *Node { return t.lookup(path, false) }

func (t *Tree) lookup(path string, follow bool) *Node {
	at, err := t.locate(path, follow, false)
	if err != nil {
		return nil
	}
	return at.node
}

// ReadFile returns the contents of the regular file at the path, or ErrNotFound. A file of more than limit bytes is
// ErrInvalid.
func (t *Tree) ReadFile(path string, limit int64) ([]byte, error) {
	n := t.Lookup(path)
	if n == nil || n.Type() != unix.S_IFREG {
		return nil, sandbox.NotFoundf("%s is not a file of the image", path)
	}
	if n.Size() > limit {
		return nil, sandbox.Invalidf("%s has %d bytes; at most %d are expected", path, n.Size(), limit)
	}
	if n.Content == nil {
		return nil, nil
	}
	r, err := n.Content.Open()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	data, err := io.ReadAll(io.LimitReader(r, limit))
	return data, errors.Join(err, r.Close())
}

// WriteFile makes the path a regular file with these contents, in place of what was there. A symbolic link at the end is
// followed.
func (t *Tree) WriteFile(path string, data []byte, attr Attr) error {
	return t.put(path, true, data, attr)
}

// ReplaceFile is WriteFile that replaces a symbolic link at the end instead of following it.
func (t *Tree) ReplaceFile(path string, data []byte, attr Attr) error {
	return t.put(path, false, data, attr)
}

func (t *Tree) put(path string, follow bool, data []byte, attr Attr) error {
	if err := t.charge(int64(len(data))); err != nil {
		return err
	}
	at, err := t.locate(path, follow, true)
	if err != nil {
		return err
	}
	if at.dir == nil || at.node != nil && at.node.IsDir() {
		return sandbox.Invalidf("%s of the image is a directory; a file is needed there", path)
	}
	n := attr.node(unix.S_IFREG)
	n.Content = Bytes(data)
	return t.set(at.dir, at.name, n)
}

// Place makes the path lead to the file n, in place of what was there. A symbolic link at the end is replaced.
func (t *Tree) Place(path string, n *Node) error {
	at, err := t.locate(path, false, true)
	if err != nil {
		return err
	}
	if at.dir == nil {
		return sandbox.Invalidf("%s of the image is a directory; a file is needed there", path)
	}
	return t.set(at.dir, at.name, n)
}

// Mkdir makes sure that the path leads to a directory; one that exists stays as it is. It returns the directory and
// whether it is new.
func (t *Tree) Mkdir(path string, attr Attr) (n *Node, made bool, err error) {
	at, err := t.locate(path, true, true)
	switch {
	case err != nil:
		return nil, false, err
	case at.node != nil && at.node.IsDir():
		return at.node, false, nil
	case at.node != nil:
		return nil, false, sandbox.Invalidf("%s of the image is not a directory; one is needed there", path)
	case strings.HasPrefix(at.name, whiteout):
		return nil, false, sandbox.Invalidf("%.256q would be a directory named like a whiteout", path)
	}
	n = attr.node(unix.S_IFDIR)
	return n, true, t.set(at.dir, at.name, n)
}

// Symlink makes the path a symbolic link, in place of what was there.
func (t *Tree) Symlink(target, path string, attr Attr) error {
	at, err := t.locate(path, false, true)
	if err != nil {
		return err
	}
	if at.dir == nil || at.node != nil && at.node.IsDir() {
		return sandbox.Invalidf("%s of the image is a directory; a symbolic link is needed there", path)
	}
	n := attr.node(unix.S_IFLNK)
	n.Mode |= 0o777
	n.Target = target
	return t.set(at.dir, at.name, n)
}

// Add makes name in the directory dir lead to n, in place of what was there. The caller answers for the name. It returns
// ErrInvalid beyond the limit of entries; Charge counts the contents.
func (t *Tree) Add(dir *Node, name string, n *Node) error { return t.set(dir, name, n) }

// Charge counts a new regular file's contents, and returns ErrInvalid beyond the limit.
func (t *Tree) Charge(n *Node) error {
	if n.Type() != unix.S_IFREG {
		return nil
	}
	return t.charge(n.Size())
}

// Remove takes the path and all below it away. It is no error where there is nothing.
func (t *Tree) Remove(path string) {
	if at, err := t.locate(path, false, false); err == nil && at.dir != nil {
		delete(at.dir.children, at.name)
	}
}

// Clear takes away all that the directory at the path holds.
func (t *Tree) Clear(path string) {
	if n := t.Lookup(path); n != nil && n.IsDir() {
		clear(n.children)
	}
}

// CopyDir puts copies of what the directory from holds into the directory to, changed by change; names that to has
// already stay. Contents are shared.
func (t *Tree) CopyDir(from, to *Node, change func(*Node)) error {
	for _, name := range from.Names() {
		if to.Child(name) != nil {
			continue
		}
		n := *from.Child(name)
		n.children = nil
		change(&n)
		if err := t.set(to, name, &n); err != nil {
			return err
		}
		if n.IsDir() {
			if err := t.CopyDir(from.Child(name), to.Child(name), change); err != nil {
				return err
			}
		}
	}
	return nil
}

// Newest is the latest modification time of the tree in seconds, for what is added to it afterwards.
func (t *Tree) Newest() int64 {
	newest := int64(0)
	var visit func(*Node)
	visit = func(n *Node) {
		newest = max(newest, n.Sec)
		for _, e := range n.children {
			visit(e.node)
		}
	}
	visit(t.Root)
	return newest
}

// Bytes is a Content held in memory.
type Bytes []byte

// Size is the number of bytes.
func (b Bytes) Size() int64 { return int64(len(b)) }

// Open returns a reader of the bytes.
func (b Bytes) Open() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
