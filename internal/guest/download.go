package guest

import (
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// getFiles answers GET and HEAD /files with the bytes of one file.
func (s *Server) getFiles(w http.ResponseWriter, r *http.Request) {
	if err := s.download(w, r); err != nil {
		writeError(w, err)
	}
}

func (s *Server) download(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	set := s.settings.get()
	if err := authorizeFiles(r, query, opRead, set.token, time.Now()); err != nil {
		return err
	}
	a, err := s.httpUser(query.Get("username"))
	if err != nil {
		return err
	}
	path, err := resolvePath(query.Get("path"), a, set.workdir)
	if err != nil {
		return httpErrorf(http.StatusBadRequest, "%v", err)
	}
	f, info, err := openRegular(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // It was only read.
	encoding, err := responseEncoding(r.Header.Get("Accept-Encoding"))
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	h.Add("Vary", "Accept-Encoding")
	if encoding == encodingGzip && info.Size() > 0 && r.Header.Get("Range") == "" {
		return compress(w, r, f, info)
	}
	http.ServeContent(w, r, "", info.ModTime(), f)
	return nil
}

// openRegular opens a file for reading. It does not wait for the other end of a named pipe.
func openRegular(path string) (*os.File, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) //nolint:gosec // Any path of the sandbox may be read.
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, httpErrorf(http.StatusNotFound, "path '%s' does not exist", path)
	}
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		kind := "not a regular file"
		if info.IsDir() {
			kind = "a directory"
		}
		err = httpErrorf(http.StatusBadRequest, "path '%s' is %s", path, kind)
	}
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// compress sends the whole file as gzip. Once it has begun, an error can only break the connection off.
func compress(w http.ResponseWriter, r *http.Request, f *os.File, info fs.FileInfo) error {
	w.Header().Set("Content-Encoding", encodingGzip)
	w.Header().Set("Last-Modified", info.ModTime().UTC().Format(http.TimeFormat))
	if r.Method == http.MethodHead {
		return nil
	}
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(z, f); err != nil {
		panic(http.ErrAbortHandler)
	}
	if err := z.Close(); err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}
