package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

// maxListed bounds how many entries one answer holds.
const maxListed = 100_000

// filesystemService answers filesystem.Filesystem.
type filesystemService struct{ *Server }

// locate returns whom a call acts as and the path that it means.
func (s *filesystemService) locate(ctx context.Context, path string) (*account, string, error) {
	a, err := s.rpcUser(ctx)
	if err != nil {
		return nil, "", err
	}
	path, err = resolvePath(path, a, s.settings.get().workdir)
	if err != nil {
		return nil, "", connect.NewError(connect.CodeInvalidArgument, err)
	}
	return a, path, nil
}

// missing words the most frequent error.
func missing(path string) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("path '%s' does not exist", path))
}

func (s *filesystemService) Stat(ctx context.Context, req *filesystem.StatRequest) (*filesystem.StatResponse, error) {
	_, path, err := s.locate(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := s.entry(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, missing(path)
	}
	if err != nil {
		return nil, rpcError(err)
	}
	return &filesystem.StatResponse{Entry: e}, nil
}

func (s *filesystemService) MakeDir(ctx context.Context, req *filesystem.MakeDirRequest) (*filesystem.MakeDirResponse, error) {
	a, path, err := s.locate(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: '%s'", path))
	case err == nil:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path already exists but it is not a directory: '%s'", path))
	case !errors.Is(err, fs.ErrNotExist):
		return nil, rpcError(err)
	}
	if err := makeDirs(path, a); err != nil {
		return nil, rpcError(err)
	}
	e, err := s.entry(path)
	if err != nil {
		return nil, rpcError(err)
	}
	return &filesystem.MakeDirResponse{Entry: e}, nil
}

// makeDirs makes a directory with its parents, and gives those that were missing to a.
func makeDirs(path string, a *account) error {
	info, err := os.Stat(path) //nolint:gosec // Any path of the sandbox may be named.
	if err == nil && !info.IsDir() {
		return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
	}
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(path); parent != path {
		if err := makeDirs(parent, a); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, 0o755); err != nil { //nolint:gosec // The mode that mkdir gives by default.
		if errors.Is(err, fs.ErrExist) { // somebody else made it meanwhile
			return nil
		}
		return err
	}
	return os.Chown(path, int(a.uid), int(a.gid)) //nolint:gosec // It was made right here.
}

func (s *filesystemService) Move(ctx context.Context, req *filesystem.MoveRequest) (*filesystem.MoveResponse, error) {
	a, source, err := s.locate(ctx, req.GetSource())
	if err != nil {
		return nil, err
	}
	_, destination, err := s.locate(ctx, req.GetDestination())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(source); errors.Is(err, fs.ErrNotExist) {
		return nil, missing(source)
	}
	if err := makeDirs(filepath.Dir(destination), a); err != nil {
		return nil, rpcError(err)
	}
	if err := os.Rename(source, destination); err != nil {
		if errors.Is(err, syscall.EXDEV) {
			err = fmt.Errorf("'%s' and '%s' are on different file systems: copy and remove instead: %w", source, destination, err)
		}
		return nil, rpcError(err)
	}
	e, err := s.entry(destination)
	if err != nil {
		return nil, rpcError(err)
	}
	return &filesystem.MoveResponse{Entry: e}, nil
}

func (s *filesystemService) Remove(ctx context.Context, req *filesystem.RemoveRequest) (*filesystem.RemoveResponse, error) {
	_, path, err := s.locate(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, rpcError(fmt.Errorf("error removing file or directory: %w", err))
	}
	return &filesystem.RemoveResponse{}, nil
}

func (s *filesystemService) ListDir(ctx context.Context, req *filesystem.ListDirRequest) (*filesystem.ListDirResponse, error) {
	_, path, err := s.locate(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	actual, err := directory(path)
	if err != nil {
		return nil, err
	}
	l := &lister{server: s.Server, ctx: ctx}
	if err := l.walk(actual, path, max(1, int(req.GetDepth()))); err != nil {
		return nil, rpcError(err)
	}
	return &filesystem.ListDirResponse{Entries: l.entries}, nil
}

// directory follows path to a directory and returns where that is.
func directory(path string) (string, error) {
	actual, err := filepath.EvalSymlinks(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", missing(path)
	case errors.Is(err, syscall.ELOOP), err != nil && strings.Contains(err.Error(), "too many links"): // EvalSymlinks has no error value for it
		return "", connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("cyclic symlink or chain of more than 255 links: '%s'", path))
	case err != nil:
		return "", rpcError(err)
	}
	info, err := os.Stat(actual)
	if err != nil {
		return "", rpcError(err)
	}
	if !info.IsDir() {
		return "", connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: '%s'", path))
	}
	return actual, nil
}

// lister collects the entries below a directory.
type lister struct {
	server  *Server
	ctx     context.Context //nolint:containedctx // A lister lives as long as one call.
	entries []*filesystem.EntryInfo
}

// walk lists the directory at actual, naming entries as below shown, and its subdirectories to the given depth. Links
// are not followed. What disappears meanwhile is left out.
func (l *lister) walk(actual, shown string, depth int) error {
	if err := l.ctx.Err(); err != nil {
		return err
	}
	found, err := os.ReadDir(actual)
	if err != nil {
		return err
	}
	for _, d := range found {
		if len(l.entries) >= maxListed {
			return connect.NewError(connect.CodeOutOfRange, fmt.Errorf("more than %d entries below '%s': list with a smaller depth", maxListed, shown))
		}
		info, err := d.Info()
		if err != nil {
			continue
		}
		e := l.server.entryOf(filepath.Join(actual, d.Name()), info)
		e.Path = filepath.Join(shown, d.Name())
		l.entries = append(l.entries, e)
		if !d.IsDir() || depth <= 1 {
			continue
		}
		if err := l.walk(filepath.Join(actual, d.Name()), e.GetPath(), depth-1); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
