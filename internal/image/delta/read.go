package delta

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// smallFile is how large a file may be to be held in memory until it is known to be new, in bytes.
const smallFile = 1 << 20

// reading is one archive on its way in.
type reading struct {
	*Archive
	before *Archive
	limits tree.Limits
	spool  *tree.Spool
	// entries and bytes are what is there so far, held against the limits.
	entries int
	bytes   int64
	buf     []byte
}

// Read reads an archive whose predecessor was before. New contents go to the spool, which must stay open until the
// Archive was written. An archive that breaks the limits or the rules of layers is ErrInvalid.
func Read(ctx context.Context, r io.Reader, before *Archive, limits tree.Limits, spool *tree.Spool) (*Archive, error) {
	in := &reading{Archive: Empty(), before: before, limits: limits, spool: spool}
	for tr := tar.NewReader(r); ; {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			in.name()
			return in.Archive, nil
		}
		if err != nil {
			return nil, invalidTar(err)
		}
		if err := in.entry(hdr, tr); err != nil {
			return nil, fmt.Errorf("entry %.256q of the sandbox's changes: %w", hdr.Name, err)
		}
	}
}

func invalidTar(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return sandbox.Invalidf("the sandbox's changes are not a whole tar archive: %v", err)
	}
	return fmt.Errorf("read the sandbox's changes: %w", err)
}

func (r *reading) entry(hdr *tar.Header, body io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := splitName(hdr.Name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return r.top(hdr)
	}
	dir, err := r.parent(parts[:len(parts)-1])
	if err != nil {
		return err
	}
	base := parts[len(parts)-1]
	if strings.HasPrefix(base, whiteout) {
		return r.hide(dir, base)
	}
	n, err := r.inode(hdr, body, parts)
	if err != nil {
		return err
	}
	return r.put(dir, base, n)
}

// splitName returns the components of an entry's name.
func splitName(name string) ([]string, error) {
	if len(name) > maxPath || strings.IndexByte(name, 0) >= 0 {
		return nil, sandbox.Invalidf("the name has %d bytes or a zero byte; at most %d bytes are allowed", len(name), maxPath)
	}
	if slices.Contains(strings.Split(name, "/"), "..") {
		return nil, sandbox.Invalidf("the name contains \"..\"")
	}
	clean := strings.TrimPrefix(path.Clean("/"+name), "/")
	if clean == "" {
		return nil, nil
	}
	parts := strings.Split(clean, "/")
	if len(parts) > maxDepth {
		return nil, sandbox.Invalidf("the name is %d directories deep; at most %d are allowed", len(parts), maxDepth)
	}
	for _, part := range parts {
		if len(part) > maxName {
			return nil, sandbox.Invalidf("a part of the name has %d bytes; at most %d are allowed", len(part), maxName)
		}
	}
	return parts, nil
}

func (r *reading) top(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeDir {
		return sandbox.Invalidf("the root is not a directory")
	}
	h, err := headerOf(hdr)
	r.root.header, r.root.records = h, xattrsOf(hdr)
	r.root.xattrs = flat(r.root.records)
	return err
}

// parent returns the directory of an entry; it is implied where the archive did not name it.
func (r *reading) parent(parts []string) (*inode, error) {
	n := r.root
	for _, name := range parts {
		if strings.HasPrefix(name, whiteout) {
			return nil, sandbox.Invalidf("%.256q is below a whiteout", name)
		}
		next := n.kids[name]
		switch {
		case next == nil:
			next = &inode{header: header{kind: typeImplied}}
			if err := r.put(n, name, next); err != nil {
				return nil, err
			}
		case !next.isDir():
			return nil, sandbox.Invalidf("%.256q is not a directory, but something is below it", name)
		}
		n = next
	}
	return n, nil
}

func (r *reading) put(dir *inode, base string, n *inode) error {
	if r.entries++; r.entries > r.limits.Entries {
		return sandbox.Invalidf("the sandbox changed more than %d files", r.limits.Entries)
	}
	old := dir.kids[base]
	switch {
	case old == nil:
	case old.kind == typeImplied && n.isDir():
		n.kids, n.opaque = old.kids, old.opaque
	case old.kind == typeWhiteout && n.kind != typeWhiteout:
		n.opaque = n.isDir()
	default:
		return sandbox.Invalidf("the name is there twice")
	}
	if dir.kids == nil {
		dir.kids = map[string]*inode{}
	}
	dir.kids[base] = n
	return nil
}

// hide takes in a whiteout.
func (r *reading) hide(dir *inode, base string) error {
	name := strings.TrimPrefix(base, whiteout)
	switch {
	case base == opaque:
		dir.opaque = true
		return nil
	case strings.HasPrefix(base, reserved):
		return nil
	case name == "" || name == "." || name == "..":
		return sandbox.Invalidf("the whiteout names nothing")
	}
	if old := dir.kids[name]; old != nil && old.kind != typeWhiteout {
		old.opaque = old.isDir()
		return nil
	}
	return r.put(dir, name, &inode{header: header{kind: typeWhiteout}})
}

func (r *reading) inode(hdr *tar.Header, body io.Reader, parts []string) (*inode, error) {
	if hdr.Typeflag == tar.TypeLink {
		return r.link(hdr.Linkname)
	}
	h, err := headerOf(hdr)
	if err != nil {
		return nil, err
	}
	n := &inode{header: h, records: xattrsOf(hdr)}
	n.xattrs = flat(n.records)
	if h.kind != tar.TypeReg {
		return n, nil
	}
	return n, r.contents(n, body, r.before.lookup(parts))
}

// link returns the file that a hard link is another name of. The file comes before its links.
func (r *reading) link(name string) (*inode, error) {
	parts, err := splitName(name)
	if err != nil {
		return nil, fmt.Errorf("hard link: %w", err)
	}
	n := r.lookup(parts)
	if n == nil || n.isDir() || n.kind == typeWhiteout {
		return nil, sandbox.Invalidf("hard link to %.256q, which is no file that came before", name)
	}
	return n, nil
}

// contents hashes a file and keeps it, unless a layer has the same under the same name.
func (r *reading) contents(n *inode, body io.Reader, old *inode) error {
	if n.size > math.MaxInt64-r.bytes || r.bytes+n.size > r.limits.Bytes {
		return sandbox.Invalidf("the sandbox's changes have more than %d bytes together", r.limits.Bytes)
	}
	r.bytes += n.size
	if n.size <= smallFile {
		return r.small(n, body, old)
	}
	mark := r.spool.Mark()
	sum := sha256.New()
	content, err := r.spool.Add(io.TeeReader(body, sum), n.size)
	if err != nil {
		return invalidTar(err)
	}
	sum.Sum(n.sum[:0])
	if n.content = content; n.keptBy(old) {
		r.spool.Rewind(mark)
	}
	return nil
}

// small is contents for a file that fits into memory: one that is kept already is not written at all.
func (r *reading) small(n *inode, body io.Reader, old *inode) (err error) {
	if r.buf == nil {
		r.buf = make([]byte, smallFile)
	}
	data := r.buf[:n.size]
	if _, err := io.ReadFull(body, data); err != nil {
		return invalidTar(err)
	}
	n.sum = sha256.Sum256(data)
	if n.keptBy(old) {
		return nil
	}
	n.content, err = r.spool.Add(bytes.NewReader(data), n.size)
	return err
}

// keptBy makes n share the contents of a file that a layer has, and reports whether they are the same.
func (n *inode) keptBy(old *inode) bool {
	if !old.isFile() || old.kept == nil || old.size != n.size || old.sum != n.sum {
		return false
	}
	n.content, n.kept = nil, old.kept
	return true
}

func headerOf(hdr *tar.Header) (header, error) {
	for _, id := range []int{hdr.Uid, hdr.Gid} {
		if id < 0 || id >= math.MaxUint32 {
			return header{}, sandbox.Invalidf("owner %d is outside 0 to %d", id, uint32(math.MaxUint32-1))
		}
	}
	h := header{
		kind: hdr.Typeflag, mode: hdr.Mode & 0o7777, uid: hdr.Uid, gid: hdr.Gid,
		sec: hdr.ModTime.Unix(), nsec: hdr.ModTime.Nanosecond(),
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		h.kind, h.size = tar.TypeReg, hdr.Size
		if hdr.Size < 0 {
			return header{}, sandbox.Invalidf("the file has %d bytes", hdr.Size)
		}
	case tar.TypeSymlink:
		h.target, h.mode = hdr.Linkname, 0o777
		return h, checkTarget(hdr.Linkname)
	case tar.TypeChar, tar.TypeBlock:
		h.major, h.minor = hdr.Devmajor, hdr.Devminor
		if h.major < 0 || h.major >= 1<<12 || h.minor < 0 || h.minor >= 1<<20 {
			return header{}, sandbox.Invalidf("device number %d:%d is out of range", h.major, h.minor)
		}
	case tar.TypeDir, tar.TypeFifo:
	default:
		return header{}, sandbox.Invalidf("unknown entry type %q", hdr.Typeflag)
	}
	return h, nil
}

func checkTarget(target string) error {
	if target == "" || len(target) >= maxPath || strings.IndexByte(target, 0) >= 0 {
		return sandbox.Invalidf("symbolic link target of %d bytes; 1 to %d without zero bytes are allowed", len(target), maxPath-1)
	}
	return nil
}

const xattrPrefix = "SCHILY.xattr."

// xattrsOf returns the extended attributes, without those that a union file system keeps for itself.
func xattrsOf(hdr *tar.Header) map[string]string {
	var all map[string]string
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		if all == nil {
			all = map[string]string{}
		}
		all[key] = value
	}
	return all
}

// flat makes a string of a map, equal for equal maps.
func flat(m map[string]string) string {
	var all []byte
	for _, key := range slices.Sorted(maps.Keys(m)) {
		all = strconv.AppendQuote(all, key)
		all = strconv.AppendQuote(all, m[key])
	}
	return string(all)
}
