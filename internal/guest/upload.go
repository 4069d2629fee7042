package guest

import (
	"errors"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// copyBuffer is how much an upload reads at once.
	copyBuffer = 256 << 10
	// maxParts bounds how many files one request carries.
	maxParts = 10_000
	// maxMetadata bounds a file's metadata: keys with their prefix, and values.
	maxMetadata = 4096
	// maxMetadataKey is what Linux leaves of an attribute's name after the prefix.
	maxMetadataKey = 255 - len(metadataPrefix)

	metadataHeader = "X-Metadata-"
)

// written describes an uploaded file.
type written struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// upload is one request to write files.
type upload struct {
	account  *account
	path     string // from the query, "" for none
	workdir  string
	metadata map[string]string
	buf      []byte
	done     []written
}

// postFiles answers POST /files. What was written before an error stays.
func (s *Server) postFiles(w http.ResponseWriter, r *http.Request) {
	u, err := s.newUpload(r)
	if err == nil {
		err = u.receive(r)
	}
	if err != nil {
		refuse(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, u.done)
}

func (s *Server) newUpload(r *http.Request) (*upload, error) {
	query := r.URL.Query()
	set := s.settings.get()
	if err := authorizeFiles(r, query, opWrite, set.token, time.Now()); err != nil {
		return nil, err
	}
	a, err := s.httpUser(query.Get("username"))
	if err != nil {
		return nil, err
	}
	u := &upload{account: a, path: query.Get("path"), workdir: set.workdir}
	u.metadata, err = metadataOf(r.Header)
	return u, err
}

// metadataOf collects the X-Metadata-* headers. Header names have no case, so keys are lower-case.
func metadataOf(h http.Header) (map[string]string, error) {
	var found map[string]string
	size := 0
	for name, values := range h {
		key, ok := strings.CutPrefix(name, metadataHeader)
		if !ok {
			continue
		}
		key = strings.ToLower(key)
		switch {
		case key == "" || len(key) > maxMetadataKey:
			return nil, httpErrorf(http.StatusBadRequest, "metadata key %q has %d bytes: 1 to %d are allowed", key, len(key), maxMetadataKey)
		case !printable(key) || !printable(values[0]):
			return nil, httpErrorf(http.StatusBadRequest, "metadata %q: keys and values must be printable US-ASCII", key)
		}
		if size += len(metadataPrefix) + len(key) + len(values[0]); size > maxMetadata {
			return nil, httpErrorf(http.StatusBadRequest, "metadata is larger than %d bytes", maxMetadata)
		}
		if found == nil {
			found = map[string]string{}
		}
		found[key] = values[0]
	}
	return found, nil
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' })
}

// buffers are shared between uploads, and given back to the system when none is under way.
var buffers = sync.Pool{New: func() any { return new([copyBuffer]byte) }} //nolint:gochecknoglobals // A pool is of use to all.

func (u *upload) receive(r *http.Request) error {
	body, err := requestBody(r)
	if err != nil {
		return err
	}
	mediaType, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return httpErrorf(http.StatusBadRequest, "Content-Type %q: %v", r.Header.Get("Content-Type"), err)
	}
	buf, _ := buffers.Get().(*[copyBuffer]byte)
	defer buffers.Put(buf)
	u.buf = buf[:]
	switch mediaType {
	case "application/octet-stream":
		if u.path == "" {
			return httpErrorf(http.StatusBadRequest, "the path parameter is missing: octet-stream uploads need it")
		}
		size := r.ContentLength
		if r.Header.Get("Content-Encoding") != "" {
			size = -1
		}
		return u.file(u.path, size, func(w io.Writer) error { return copyThrough(w, body, u.buf) })
	case "multipart/form-data":
		form, err := newFormReader(body, params["boundary"], u.buf)
		if err != nil {
			return httpErrorf(http.StatusBadRequest, "Content-Type: %v", err)
		}
		return u.parts(form)
	}
	return httpErrorf(http.StatusBadRequest, "Content-Type %q is not supported: send application/octet-stream or multipart/form-data", mediaType)
}

// parts writes each part named file.
func (u *upload) parts(form *formReader) error {
	for n := 0; ; n++ {
		header, err := form.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return httpErrorf(http.StatusBadRequest, "error parsing multipart form: %v", err)
		}
		name, path := disposition(header.Get("Content-Disposition"))
		if name != "file" {
			continue
		}
		if n >= maxParts {
			return httpErrorf(http.StatusBadRequest, "more than %d parts in one request", maxParts)
		}
		if u.path != "" && len(u.done) > 0 {
			return httpErrorf(http.StatusBadRequest, "more than one file for the path '%s'", u.path)
		}
		if u.path != "" {
			path = u.path
		}
		if path == "" {
			return httpErrorf(http.StatusBadRequest, "a file has no path: give it as the path parameter or as the part's filename")
		}
		if err := u.file(path, -1, form.copyTo); err != nil {
			return err
		}
	}
	if len(u.done) == 0 {
		return httpErrorf(http.StatusBadRequest, "the form has no part named file")
	}
	return nil
}

// disposition returns the name of a form's part and its whole filename, directories included. Browsers and their like
// escape three characters, and only those.
func disposition(header string) (name, filename string) {
	kind, params, err := mime.ParseMediaType(header)
	if err != nil || kind != "form-data" {
		return "", ""
	}
	unescape := strings.NewReplacer("%22", `"`, "%0D", "\r", "%0A", "\n", "%0d", "\r", "%0a", "\n")
	return params["name"], unescape.Replace(params["filename"])
}

// file writes one file of size bytes, -1 if that is not known, with what content writes.
func (u *upload) file(name string, size int64, content func(io.Writer) error) error {
	path, err := resolvePath(name, u.account, u.workdir)
	if err != nil {
		return httpErrorf(http.StatusBadRequest, "%v", err)
	}
	if err := makeDirs(filepath.Dir(path), u.account); err != nil {
		return err
	}
	f, fresh, err := u.create(path)
	if err != nil {
		return err
	}
	err = u.fill(f, size, content)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil && (!fresh || len(u.metadata) > 0) {
		err = replaceMetadata(path, u.metadata)
	}
	if err != nil {
		if fresh {
			_ = os.Remove(path) //nolint:gosec // It was made right here.
		}
		return err
	}
	u.done = append(u.done, written{Path: path, Name: filepath.Base(path), Type: "file", Metadata: u.metadata})
	return nil
}

// create opens a file for writing, in place if it exists: its mode and its other names stay.
func (u *upload) create(path string) (f *os.File, fresh bool, err error) {
	const flags = os.O_WRONLY | unix.O_NONBLOCK                    // does not wait for the reader of a named pipe
	f, err = os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o666) //nolint:gosec // Any path of the sandbox may be written; the umask applies.
	if fresh = err == nil; !fresh && errors.Is(err, fs.ErrExist) {
		f, err = os.OpenFile(path, flags|os.O_CREATE|os.O_TRUNC, 0o666) //nolint:gosec // As above.
	}
	if err != nil {
		if info, statErr := os.Stat(path); statErr == nil && info.IsDir() { //nolint:gosec // As above.
			return nil, false, httpErrorf(http.StatusBadRequest, "path '%s' is a directory", path)
		}
		return nil, false, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = httpErrorf(http.StatusBadRequest, "path '%s' is not a regular file", path)
	}
	if err != nil {
		_ = f.Close()
		return nil, false, err
	}
	return f, fresh, nil
}

func (u *upload) fill(f *os.File, size int64, content func(io.Writer) error) error {
	if size > 0 {
		if err := checkSpace(f, size); err != nil {
			return err
		}
	}
	if os.Getuid() == 0 {
		if err := f.Chown(int(u.account.uid), int(u.account.gid)); err != nil {
			return err
		}
	}
	err := content(f)
	if broken := (*brokenBodyError)(nil); errors.As(err, &broken) {
		return httpErrorf(http.StatusBadRequest, "%v", broken)
	}
	return err
}

// copyThrough fills the whole buffer before each write: system calls cost more inside a sandbox than outside.
func copyThrough(w io.Writer, src io.Reader, buf []byte) error {
	for {
		n, readErr := fillBuffer(src, buf)
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		if errors.Is(readErr, io.EOF) {
			return nil
		}
		if readErr != nil {
			return &brokenBodyError{readErr}
		}
	}
}

// fillBuffer is io.ReadFull, except that the source's own end stays apart from a source that broke off.
func fillBuffer(src io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var m int
		m, err = src.Read(buf[n:])
		n += m
	}
	return n, err
}

// checkSpace refuses early what cannot fit.
func checkSpace(f *os.File, size int64) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var st unix.Statfs_t
	if controlErr := conn.Control(func(fd uintptr) { err = unix.Fstatfs(int(fd), &st) }); controlErr != nil || err != nil {
		return nil //nolint:nilerr // Writing will tell.
	}
	if available := st.Bavail * uint64(st.Bsize); uint64(size) > available { //nolint:gosec // Both are positive.
		return httpErrorf(http.StatusInsufficientStorage, "not enough disk space available: %d bytes are needed, %d are free", size, available)
	}
	return nil
}
