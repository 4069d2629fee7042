package gvisor

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"

	paxXattr     = "SCHILY.xattr."
	overlayXattr = paxXattr + "trusted.overlay."
	opaqueXattr  = overlayXattr + "opaque"
	aclXattr     = paxXattr + "system.posix_acl_"

	tarBlock     = 512
	maxLayerTree = 1 << 30 // bytes of gVisor's archive of names
	maxLayerFile = 1 << 50
	segmentBytes = 24 // start, end, offset on the disk
	sizeBytes    = 8
)

// segment is a part of a file and where on the guest's disk it is. What no segment covers is zero.
type segment struct{ start, end, disk uint64 }

// layerEntry is one name of a layer.
type layerEntry struct {
	header   tar.Header
	segments []segment
}

// writeLayer turns gVisor's archive of a root's upper layer, whose files say where on the disk their contents are, into a
// layer of an OCI image, sorted by name. What comes from the sentry is checked.
func writeLayer(out *os.File, tree io.Reader, disk *os.File) error {
	entries, err := readTree(io.LimitReader(tree, maxLayerTree))
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(disk.Fd()), &st); err != nil {
		return err
	}
	w := &layerWriter{out: out, disk: disk, diskSize: uint64(max(st.Size, 0))}
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		if err := w.entry(entries[name]); err != nil {
			return fmt.Errorf("layer entry %.200q: %w", name, err)
		}
	}
	return w.end()
}

// readTree reads gVisor's archive into the entries of a layer, by name.
func readTree(tree io.Reader) (map[string]*layerEntry, error) {
	entries := map[string]*layerEntry{}
	links := map[string][]string{} // the other names of an entry
	tr := tar.NewReader(tree)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read the root's files: %w", err)
		}
		name, err := layerName(h.Name)
		if err != nil {
			return nil, err
		}
		if name == "." {
			continue // the root itself
		}
		if h.Typeflag != tar.TypeLink {
			if entries[name], err = readEntry(tr, h, name); err != nil {
				return nil, err
			}
			continue
		}
		target, err := layerName(h.Linkname)
		if err != nil {
			return nil, err
		}
		links[target] = append(links[target], name)
	}
	for target, names := range links {
		if err := linkUp(entries, target, names); err != nil {
			return nil, err
		}
	}
	return convert(entries)
}

// readEntry reads an entry that is no link.
func readEntry(r io.Reader, h *tar.Header, name string) (*layerEntry, error) {
	e := &layerEntry{header: *h}
	e.header.Name = name
	if h.Typeflag != tar.TypeReg {
		return e, nil
	}
	var err error
	if e.header.Size, e.segments, err = readSegments(r, h.Size); err != nil {
		return nil, fmt.Errorf("read %.200q: %w", name, err)
	}
	return e, nil
}

// layerName returns the name of an entry relative to the root, or "." for the root.
func layerName(name string) (string, error) {
	clean := strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/")
	if clean == "" {
		clean = "."
	}
	if clean != path.Clean(clean) || path.IsAbs(clean) || clean == ".." || strings.HasPrefix(clean, "../") ||
		strings.ContainsRune(clean, 0) {
		return "", sandbox.Invalidf("the sentry names a file %.200q", name)
	}
	if strings.HasPrefix(path.Base(clean), whiteoutPrefix) {
		return "", sandbox.Invalidf("file %.200q cannot be part of an image's layer, where names that begin with %q mean deletions: "+
			"remove it, or give it another name", clean, whiteoutPrefix)
	}
	return clean, nil
}

// readSegments reads what gVisor writes in place of a file's contents.
func readSegments(r io.Reader, length int64) (int64, []segment, error) {
	if length < sizeBytes || (length-sizeBytes)%segmentBytes != 0 || length > maxLayerTree {
		return 0, nil, sandbox.Invalidf("the sentry describes a file in %d bytes", length)
	}
	raw := make([]byte, length)
	if _, err := io.ReadFull(r, raw); err != nil {
		return 0, nil, err
	}
	size := binary.LittleEndian.Uint64(raw)
	if size > maxLayerFile {
		return 0, nil, sandbox.Invalidf("the sentry says that a file has %d bytes", size)
	}
	var out []segment
	last := uint64(0)
	for raw = raw[sizeBytes:]; len(raw) > 0; raw = raw[segmentBytes:] {
		e := binary.NativeEndian
		s := segment{start: e.Uint64(raw), end: e.Uint64(raw[8:]), disk: e.Uint64(raw[16:])}
		if s.start < last || s.start >= s.end || s.end > maxLayerFile || s.disk > maxFileSize {
			return 0, nil, sandbox.Invalidf("the sentry says that bytes %d to %d of a file are at %d", s.start, s.end, s.disk)
		}
		last = s.end
		if s.end = min(s.end, size); s.start < s.end {
			out = append(out, s)
		}
	}
	return int64(size), out, nil
}

// linkUp makes the first of an entry's names, in order, the entry, and the others links to it.
func linkUp(entries map[string]*layerEntry, target string, names []string) error {
	e := entries[target]
	if e == nil || e.header.Typeflag == tar.TypeDir {
		return sandbox.Invalidf("the sentry links to %.200q", target)
	}
	names = append(names, target)
	slices.Sort(names)
	if isWhiteout(&e.header) {
		for _, name := range names {
			entry := *e
			entry.header.Name = name
			entries[name] = &entry
		}
		return nil
	}
	first := names[0]
	for _, name := range names[1:] {
		link := e.header
		link.Name, link.Linkname, link.Typeflag, link.Size, link.PAXRecords = name, first, tar.TypeLink, 0, nil
		link.Xattrs = nil //nolint:staticcheck // as in convert
		entries[name] = &layerEntry{header: link}
	}
	e.header.Name = first
	entries[first] = e
	return nil
}

// isWhiteout reports whether an entry says that the image's file of its name is deleted.
func isWhiteout(h *tar.Header) bool {
	return h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0
}

// convert puts whiteouts and opaque directories into the form of OCI images, and drops what belongs to the overlay alone.
func convert(entries map[string]*layerEntry) (map[string]*layerEntry, error) {
	out := make(map[string]*layerEntry, len(entries))
	marker := func(like tar.Header, name string) {
		out[name] = &layerEntry{header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, ModTime: like.ModTime}}
	}
	for name, e := range entries {
		h := &e.header
		if isWhiteout(h) {
			marker(*h, path.Join(path.Dir(name), whiteoutPrefix+path.Base(name)))
			continue
		}
		if h.Typeflag == tar.TypeDir {
			h.Name = name + "/"
			if h.PAXRecords[opaqueXattr] == "y" {
				marker(*h, path.Join(name, opaqueMarker))
			}
		}
		records, err := layerRecords(h.PAXRecords)
		if err != nil {
			return nil, fmt.Errorf("read %.200q: %w", name, err)
		}
		h.PAXRecords, h.Format = records, tar.FormatPAX
		h.Xattrs = nil //nolint:staticcheck // the reader fills it, and the writer would write it too
		out[name] = e
	}
	return out, nil
}

// layerRecords keeps the extended attributes that are not the overlay's. gVisor encodes access lists.
func layerRecords(records map[string]string) (map[string]string, error) {
	out := map[string]string{}
	for k, v := range records {
		if !strings.HasPrefix(k, paxXattr) || strings.HasPrefix(k, overlayXattr) {
			continue
		}
		if strings.HasPrefix(k, aclXattr) {
			raw, err := base64.RawStdEncoding.DecodeString(v)
			if err != nil {
				return nil, sandbox.Invalidf("the sentry says that %s is %.40q", k, v)
			}
			v = string(raw)
		}
		out[k] = v
	}
	return out, nil
}

// layerWriter writes entries. Zeros become holes of the output.
type layerWriter struct {
	out, disk *os.File
	diskSize  uint64
	at        int64 // in out
}

func (w *layerWriter) entry(e *layerEntry) error {
	var head bytes.Buffer
	if err := tar.NewWriter(&head).WriteHeader(&e.header); err != nil {
		return err
	}
	if _, err := w.out.WriteAt(head.Bytes(), w.at); err != nil {
		return err
	}
	w.at += int64(head.Len())
	for _, s := range e.segments {
		if s.disk+(s.end-s.start) > w.diskSize {
			return sandbox.Invalidf("the sentry says that it has bytes beyond the end of the disk")
		}
		if err := w.copy(s); err != nil {
			return err
		}
	}
	w.at += (e.header.Size + tarBlock - 1) / tarBlock * tarBlock
	return nil
}

// copy copies a segment to its place after the header.
func (w *layerWriter) copy(s segment) error {
	if _, err := w.out.Seek(w.at+int64(s.start), io.SeekStart); err != nil { //nolint:gosec // bounded when read
		return err
	}
	part := io.NewSectionReader(w.disk, int64(s.disk), int64(s.end-s.start)) //nolint:gosec // as above
	_, err := io.CopyBuffer(struct{ io.Writer }{w.out}, part, make([]byte, 1<<20))
	return err
}

// end writes the two empty blocks.
func (w *layerWriter) end() error { return w.out.Truncate(w.at + 2*tarBlock) }
