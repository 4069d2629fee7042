package recipe

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"strconv"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// archiveForm names how archives are written. It is part of their hash: an upload that was cut short goes on only with the
// very same bytes.
const archiveForm = "cloister context 1"

// archiveTime is the modification time of all that is in an archive: times of checkouts differ from machine to machine.
// It is late enough for zip, which knows none before 1980.
func archiveTime() time.Time { return time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) }

// Hash names the selection by its paths, permissions, sizes and contents: 64 hexadecimal digits. Times and owners do not
// count.
func (s *Selection) Hash() (string, error) {
	h := sha256.New()
	write(h, archiveForm)
	for _, e := range s.entries {
		write(h, e.name, strconv.FormatUint(uint64(e.mode()), 8), strconv.FormatInt(e.size(), 10), e.link)
		if err := s.content(h, e); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// write adds fields that no other fields look like.
func write(h hash.Hash, fields ...string) {
	for _, f := range fields {
		_, _ = fmt.Fprintf(h, "%d:%s", len(f), f) // a hash never fails
	}
}

// mode is the entry's type and permissions.
func (e entry) mode() fs.FileMode {
	switch {
	case e.info == nil:
		return 0o644
	case e.info.Mode()&fs.ModeSymlink != 0:
		return fs.ModeSymlink | 0o777
	}
	return e.info.Mode() & (fs.ModeDir | fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
}

// content writes an entry's bytes. One that changed its size since it was selected is an error.
func (s *Selection) content(w io.Writer, e entry) error {
	if e.info == nil {
		_, err := w.Write(e.content)
		return err
	}
	if !e.info.Mode().IsRegular() {
		return nil
	}
	f, err := s.context.root.Open(e.at)
	if err != nil {
		return err
	}
	n, err := io.Copy(w, io.LimitReader(f, e.size()))
	more, _ := f.Read(make([]byte, 1))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("read %s: %w", e.at, err)
	}
	if n != e.size() || more > 0 {
		return sandbox.Conflictf("%s changed while it was read: %d bytes were expected; try again", e.at, e.size())
	}
	return nil
}

// Archive writes the files as a gzipped tar archive. The same selection always makes the same bytes.
func (s *Selection) Archive(w io.Writer) error {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	for _, e := range s.entries {
		if err := t.WriteHeader(e.header()); err != nil {
			return fmt.Errorf("archive %s: %w", e.name, err)
		}
		if err := s.content(t, e); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

// header has no owner: a COPY says whose its files become.
func (e entry) header() *tar.Header {
	h := &tar.Header{Name: e.name, Mode: permission(e.mode()), Size: e.size(), ModTime: archiveTime(), Format: tar.FormatPAX}
	switch {
	case e.mode()&fs.ModeSymlink != 0:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
	case e.mode().IsDir():
		h.Typeflag, h.Name = tar.TypeDir, e.name+"/"
	default:
		h.Typeflag = tar.TypeReg
	}
	return h
}

// permission is the mode as tar and Unix write it.
func permission(m fs.FileMode) int64 {
	out := int64(m.Perm())
	for bit, value := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			out |= value
		}
	}
	return out
}
