package delta

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/image/tree"
)

const bufferSize = 256 << 10

// change is one entry of a layer: a whiteout or opaque marker, which has no inode, or what the inode says.
type change struct {
	name string
	node *inode
}

// differ finds the changes from one archive to the next.
type differ struct {
	// forced are files with several names of which one is written, so that all are.
	forced  map[*inode]bool
	changes []change
}

// changes returns what is other in after than in before, in the order in which it is written.
func changes(before, after *Archive) []change {
	d := differ{forced: map[*inode]bool{}}
	d.dir("", before.root, after.root, false)
	for found := 0; found != len(d.forced); {
		found, d.changes = len(d.forced), d.changes[:0]
		d.dir("", before.root, after.root, false)
	}
	slices.SortFunc(d.changes, func(a, b change) int { return slices.Compare(a.parts(), b.parts()) })
	return d.changes
}

// dir compares two directories. before is nil, or whatever had the name before; covered says that nothing from below the
// directory shows through.
func (d *differ) dir(name string, before, after *inode, covered bool) {
	at := len(d.changes)
	if after.opaque && !covered && (!before.isDir() || !before.opaque) {
		d.changes = append(d.changes, change{name: name + "/" + opaque})
		before, covered = nil, true
	}
	old := map[string]*inode{}
	if before.isDir() {
		old = before.kids
	}
	for base, was := range old {
		if after.kids[base] == nil && was.kind != typeWhiteout {
			d.remove(name, base)
		}
	}
	for base, n := range after.kids {
		if n.kind == typeWhiteout {
			if was := old[base]; !covered && (was == nil || was.kind != typeWhiteout) {
				d.remove(name, base)
			}
			continue
		}
		d.kid(name+"/"+base, old[base], n, covered)
	}
	if headerChanged(name, before, after, len(d.changes) > at) {
		d.changes = append(d.changes, change{name: name, node: after})
	}
}

func (d *differ) remove(dir, base string) {
	if !ours(dir + "/" + base) {
		d.changes = append(d.changes, change{name: dir + "/" + whiteout + base})
	}
}

// kid compares what a name leads to.
func (d *differ) kid(name string, was, n *inode, covered bool) {
	switch {
	case ours(name):
	case n.isDir():
		d.dir(name, was, n, covered)
	case d.forced[n] || !same(was, n):
		if len(n.names) > 1 {
			d.forced[n] = true
		}
		d.changes = append(d.changes, change{name: name, node: n})
	}
}

// same reports whether a name leads to the same file as before.
func same(was, n *inode) bool {
	return was != nil && was.header == n.header && was.sum == n.sum && slices.Equal(was.names, n.names)
}

// headerChanged reports whether a directory itself must be written. One whose time alone is new had files that came and
// went, or holds what is written with it; of the first kind nothing is left to tell.
func headerChanged(name string, before, after *inode, below bool) bool {
	fresh := before == nil || !before.isDir()
	was := header{kind: tar.TypeDir, mode: 0o755, sec: after.sec, nsec: after.nsec}
	switch {
	case after.kind == typeImplied:
		return before != nil && !before.isDir() && before.kind != typeWhiteout
	case !fresh && before.kind == tar.TypeDir:
		was = before.header
	case !touched(name) || after.opaque:
		return true
	}
	if !below || touched(name) {
		was.sec, was.nsec = after.sec, after.nsec
	}
	return was != after.header
}

// parts are the components of a change's name, by which changes are sorted: a directory comes before what it holds.
func (c change) parts() []string { return strings.Split(c.name, "/") }

// Write writes what a has more than before, or other, as a layer to w, and returns the number of its entries. keep makes
// contents of a place in what was written; the archives that are read later find them there. After an error a must not be
// used any more.
func (a *Archive) Write(ctx context.Context, w io.Writer, before *Archive, keep func(off, size int64) tree.Content) (int, error) {
	all := changes(before, a)
	out := &layerWriter{
		w: bufio.NewWriterSize(w, bufferSize), keep: keep, first: map[*inode]string{}, buf: make([]byte, bufferSize),
	}
	out.tar = tar.NewWriter(out)
	for _, c := range all {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if err := out.add(c); err != nil {
			return 0, fmt.Errorf("write %.256q to the layer: %w", c.name, err)
		}
	}
	if err := errors.Join(out.tar.Close(), out.w.Flush()); err != nil {
		return 0, fmt.Errorf("write the layer: %w", err)
	}
	a.settle()
	return len(all), nil
}

// settle lets go of contents that went into no layer.
func (a *Archive) settle() {
	var visit func(*inode)
	visit = func(n *inode) {
		n.content = nil
		for _, kid := range n.kids {
			visit(kid)
		}
	}
	visit(a.root)
}

// layerWriter writes the entries of a layer and knows how far it is.
type layerWriter struct {
	tar   *tar.Writer
	w     *bufio.Writer
	at    int64
	keep  func(off, size int64) tree.Content
	first map[*inode]string
	buf   []byte
}

// Write takes what the tar writer writes.
func (l *layerWriter) Write(p []byte) (int, error) {
	n, err := l.w.Write(p)
	l.at += int64(n)
	return n, err
}

func (l *layerWriter) add(c change) error {
	name := strings.TrimPrefix(c.name, "/")
	n := c.node
	if n == nil {
		return l.tar.WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name})
	}
	hdr := &tar.Header{
		Format: tar.FormatPAX, Typeflag: n.kind, Name: name, Mode: n.mode, Uid: n.uid, Gid: n.gid,
		ModTime: time.Unix(n.sec, int64(n.nsec)), Size: n.size, Linkname: n.target, Devmajor: n.major, Devminor: n.minor,
		PAXRecords: n.records,
	}
	if first, ok := l.first[n]; ok {
		hdr.Typeflag, hdr.Linkname, hdr.Size = tar.TypeLink, first, 0
		return l.tar.WriteHeader(hdr)
	}
	l.first[n] = name
	switch n.kind {
	case typeImplied:
		hdr.Typeflag, hdr.Name, hdr.Mode = tar.TypeDir, name+"/", 0o755
	case tar.TypeDir:
		hdr.Name = name + "/"
		if name == "" {
			hdr.Name = "./"
		}
	}
	if err := l.tar.WriteHeader(hdr); err != nil {
		return err
	}
	return l.contents(n)
}

func (l *layerWriter) contents(n *inode) error {
	if n.size == 0 {
		return nil
	}
	from := n.content
	if from == nil {
		from = n.kept
	}
	if from == nil {
		return fmt.Errorf("%d bytes of contents are not there", n.size)
	}
	r, err := from.Open()
	if err != nil {
		return err
	}
	off := l.at
	_, err = io.CopyBuffer(struct{ io.Writer }{l.tar}, r, l.buf)
	n.kept = l.keep(off, n.size)
	return errors.Join(err, r.Close())
}
