package tree

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	"golang.org/x/sys/unix"
)

// exporter writes a tree as a tar stream.
type exporter struct {
	out   *tar.Writer
	first map[*Node]string
	buf   []byte
}

// WriteTar writes the tree as a tar stream that ApplyLayer turns into the same tree again. Sockets are left out: tar has
// none.
func (t *Tree) WriteTar(ctx context.Context, w io.Writer) error {
	e := exporter{out: tar.NewWriter(w), first: map[*Node]string{}, buf: make([]byte, copyBuffer)}
	if err := e.add(ctx, ".", t.Root); err != nil {
		return err
	}
	return e.out.Close()
}

func (e *exporter) add(ctx context.Context, name string, n *Node) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if n.Type() == unix.S_IFSOCK {
		return nil
	}
	if err := e.entry(name, n); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	for _, base := range n.Names() {
		if err := e.add(ctx, path.Join(name, base), n.Child(base)); err != nil {
			return err
		}
	}
	return nil
}

func (e *exporter) entry(name string, n *Node) error {
	hdr := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(n.Mode & 0o7777), Uid: int(n.UID), Gid: int(n.GID),
		ModTime: time.Unix(n.Sec, int64(n.Nsec)), Typeflag: typeflag(n),
	}
	if seen, ok := e.first[n]; ok {
		hdr.Typeflag, hdr.Linkname = tar.TypeLink, seen
		return e.out.WriteHeader(hdr)
	}
	e.first[n] = name
	switch hdr.Typeflag {
	case tar.TypeReg:
		hdr.Size = n.Size()
	case tar.TypeDir:
		hdr.Name += "/"
	case tar.TypeSymlink:
		hdr.Linkname = n.Target
	case tar.TypeChar, tar.TypeBlock:
		hdr.Devmajor, hdr.Devminor = int64(n.Rdev>>8&0xfff), int64(n.Rdev&0xff|n.Rdev>>12&^0xff)
	}
	if err := e.out.WriteHeader(hdr); err != nil {
		return err
	}
	return e.content(n)
}

func (e *exporter) content(n *Node) error {
	if n.Type() != unix.S_IFREG || n.Content == nil {
		return nil
	}
	r, err := n.Content.Open()
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(plainWriter{e.out}, r, e.buf)
	return errors.Join(err, r.Close())
}

func typeflag(n *Node) byte {
	switch n.Type() {
	case unix.S_IFDIR:
		return tar.TypeDir
	case unix.S_IFLNK:
		return tar.TypeSymlink
	case unix.S_IFCHR:
		return tar.TypeChar
	case unix.S_IFBLK:
		return tar.TypeBlock
	case unix.S_IFIFO:
		return tar.TypeFifo
	default:
		return tar.TypeReg
	}
}
