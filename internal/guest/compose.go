package guest

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
)

// composeRequest is the body of POST /files/compose.
type composeRequest struct {
	Destination string   `json:"destination"`
	SourcePaths []string `json:"source_paths"`
	Username    string   `json:"username"`
}

// postCompose joins files into one and removes them. The destination changes only when all of it is there.
func (s *Server) postCompose(w http.ResponseWriter, r *http.Request) {
	var req composeRequest
	err := decodeJSON(w, r, maxRequestBytes, &req)
	if err == nil {
		var done *written
		if done, err = s.compose(&req); err == nil {
			writeJSON(w, http.StatusOK, done)
			return
		}
	}
	writeError(w, err)
}

func (s *Server) compose(req *composeRequest) (*written, error) {
	a, err := s.httpUser(req.Username)
	if err != nil {
		return nil, err
	}
	sources, destination, err := s.composePaths(req, a)
	if err != nil {
		return nil, err
	}
	if err := makeDirs(filepath.Dir(destination), a); err != nil {
		return nil, err
	}
	temp, err := os.CreateTemp(filepath.Dir(destination), "."+filepath.Base(destination)+".*")
	if err != nil {
		return nil, err
	}
	if err = joinFiles(temp, sources, a); err == nil {
		err = os.Rename(temp.Name(), destination)
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(temp.Name()))
	}
	for _, path := range sources {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return &written{Path: destination, Name: filepath.Base(destination), Type: "file"}, nil
}

func (s *Server) composePaths(req *composeRequest, a *account) (sources []string, destination string, err error) {
	if len(req.SourcePaths) == 0 || req.Destination == "" {
		return nil, "", httpErrorf(http.StatusBadRequest, "source_paths and destination are both required")
	}
	workdir := s.settings.get().workdir
	for _, name := range append([]string{req.Destination}, req.SourcePaths...) {
		path, err := resolvePath(name, a, workdir)
		if err != nil {
			return nil, "", httpErrorf(http.StatusBadRequest, "%v", err)
		}
		sources = append(sources, path)
	}
	destination, sources = sources[0], sources[1:]
	if slices.Contains(sources, destination) {
		return nil, "", httpErrorf(http.StatusBadRequest, "destination '%s' is one of the sources", destination)
	}
	return sources, destination, nil
}

// joinFiles writes the sources, one after the other, to f and closes it. Copies stay inside the kernel.
func joinFiles(f *os.File, sources []string, a *account) (err error) {
	defer func() { err = errors.Join(err, f.Close()) }()
	for _, path := range sources {
		src, _, err := openRegular(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, src)
		_ = src.Close()
		if err != nil {
			return err
		}
	}
	if os.Getuid() == 0 {
		err = f.Chown(int(a.uid), int(a.gid))
	}
	return errors.Join(err, f.Chmod(0o644))
}
