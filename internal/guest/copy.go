package guest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// maxCopyEntries bounds how many entries one archive has.
const maxCopyEntries = 1 << 20

// copyRequest is what the query of POST /copy says.
type copyRequest struct {
	source copySource
	// dest is absolute; dir says that it is meant as a directory though nothing is there.
	dest string
	dir  bool
	// uid and gid own what is copied, and the directories made for it.
	uid, gid int
	// mode replaces the archive's permissions; -1 keeps them.
	mode int64
}

// copySource says which entries of an archive are copied, and what they are relative to.
type copySource struct {
	base string // clean, relative, "" for the whole archive
	// contents says that everything below base is meant, not base itself.
	contents bool
}

// parseCopySource reads a COPY's source. Who made the archive has expanded patterns already: what is below the part
// without a pattern has been selected.
func parseCopySource(src string) (copySource, error) {
	if len(src) >= maxPath || strings.ContainsRune(src, 0) {
		return copySource{}, httpErrorf(http.StatusBadRequest, "source %.80q: too long, or with a zero byte", src)
	}
	var base []string
	for segment := range strings.SplitSeq(src, "/") {
		switch {
		case segment == "..":
			return copySource{}, httpErrorf(http.StatusBadRequest, "source %.80q leads out of the build context", src)
		case strings.ContainsAny(segment, `*?[{`):
			return copySource{base: strings.Join(base, "/"), contents: true}, nil
		case segment != "" && segment != ".":
			base = append(base, segment)
		}
	}
	return copySource{base: strings.Join(base, "/"), contents: len(base) == 0}, nil
}

// relative returns the path of an entry below the base, "" for the base itself, and whether the entry is meant at all.
func (s copySource) relative(name string) (rel string, ok bool) {
	if s.base == "" {
		return name, name != ""
	}
	if name == s.base {
		return "", !s.contents
	}
	return strings.CutPrefix(name, s.base+"/")
}

// entryName returns the clean path of an archive's entry. Anything that could lead out of the archive is refused.
func entryName(name string) (string, error) {
	if strings.ContainsRune(name, 0) || len(name) >= maxPath {
		return "", fmt.Errorf("entry %.80q: too long, or with a zero byte", name)
	}
	for segment := range strings.SplitSeq(name, "/") {
		if segment == ".." {
			return "", fmt.Errorf("entry %.80q leads out of the archive", name)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// postCopy puts files of an archive into the sandbox, as a COPY step of a build does. The body is a tar archive, which may be
// gzipped. The proxy lets nobody but the node reach this route.
func (s *Server) postCopy(w http.ResponseWriter, r *http.Request) {
	req, err := s.copyRequest(r.URL.Query())
	if err == nil {
		err = req.extract(r.Body)
	}
	if err != nil {
		refuse(w, r, err)
		return
	}
	_, _ = io.CopyN(io.Discard, r.Body, maxDiscard) // what follows the archive's end
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) copyRequest(q url.Values) (*copyRequest, error) {
	a, err := s.httpUser(q.Get("user"))
	if err != nil {
		return nil, err
	}
	c := &copyRequest{mode: -1}
	if c.source, err = parseCopySource(q.Get("src")); err != nil {
		return nil, err
	}
	dest := q.Get("dest")
	if dest == "" {
		return nil, httpErrorf(http.StatusBadRequest, "no destination was given")
	}
	c.dir = strings.HasSuffix(dest, "/") || dest == "." || strings.HasSuffix(dest, "/.")
	if !filepath.IsAbs(dest) && !strings.HasPrefix(dest, "~") {
		dest = filepath.Join(q.Get("workdir"), dest)
	}
	if c.dest, err = resolvePath(dest, a, ""); err != nil {
		return nil, httpErrorf(http.StatusBadRequest, "destination: %v", err)
	}
	if text := q.Get("mode"); text != "" {
		if c.mode, err = strconv.ParseInt(text, 8, 16); err != nil || c.mode < 0 || c.mode > 0o7777 {
			return nil, httpErrorf(http.StatusBadRequest, "mode %.20q: want 0 to 7777, in octal", text)
		}
	}
	c.uid, c.gid, err = s.users.owner(q.Get("owner"), a)
	return c, err
}

// owner reads user[:group], each a name or a number. Without a group it is the user's own; of a number that nobody has,
// the same number. Empty means the account's.
func (u *users) owner(text string, a *account) (uid, gid int, err error) {
	if text == "" {
		return int(a.uid), int(a.gid), nil
	}
	table, err := u.load()
	if err != nil {
		return 0, 0, err
	}
	name, group, named := strings.Cut(text, ":")
	uid, gid = int(a.uid), int(a.gid)
	if name != "" {
		if found, lookupErr := u.lookup(name); lookupErr == nil {
			uid, gid = int(found.uid), int(found.gid)
		} else if n, parseErr := strconv.ParseUint(name, 10, 31); parseErr == nil {
			uid, gid = int(n), int(n)
		} else {
			return 0, 0, httpErrorf(http.StatusBadRequest, "owner %.80q: there is no user of that name", text)
		}
	}
	if !named || group == "" {
		return uid, gid, nil
	}
	for id, known := range table.groups {
		if known == group {
			return uid, int(id), nil
		}
	}
	n, err := strconv.ParseUint(group, 10, 31)
	if err != nil {
		return 0, 0, httpErrorf(http.StatusBadRequest, "owner %.80q: there is no group of that name", text)
	}
	return uid, int(n), nil
}

// openArchive undoes gzip where the archive has it.
func openArchive(body io.Reader) (*tar.Reader, error) {
	buffered := bufio.NewReaderSize(body, copyBuffer)
	magic, _ := buffered.Peek(2)
	if !bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return tar.NewReader(buffered), nil
	}
	z, err := gzip.NewReader(buffered)
	if err != nil {
		return nil, httpErrorf(http.StatusBadRequest, "the archive is not gzip: %v", err)
	}
	return tar.NewReader(z), nil
}

// extract copies what the source means.
func (c *copyRequest) extract(body io.Reader) (err error) {
	archive, err := openArchive(body)
	if err != nil {
		return err
	}
	buf, _ := buffers.Get().(*[copyBuffer]byte)
	defer buffers.Put(buf)
	x := &extractor{copyRequest: c, archive: archive, buf: buf[:], implied: map[string]bool{}}
	defer func() { err = errors.Join(err, x.close()) }()
	for range maxCopyEntries {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			if x.root == nil {
				return httpErrorf(http.StatusBadRequest, "the archive has no '%s'", c.source.base)
			}
			return nil
		}
		if err != nil {
			return httpErrorf(http.StatusBadRequest, "the archive is damaged: %v", err)
		}
		if err := x.entry(h); err != nil {
			return err
		}
	}
	return httpErrorf(http.StatusBadRequest, "the archive has more than %d entries", maxCopyEntries)
}
