package guest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

// metadataPrefix marks the extended attributes that clients see as an entry's metadata.
const metadataPrefix = "user.e2b."

// maxAttributes bounds what is read of a file's attributes, in bytes; Linux itself stops at 64 KiB.
const maxAttributes = 64 << 10

// entry describes what is at path, without following a final link but for its type and mode.
func (s *Server) entry(path string) (*filesystem.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return s.entryOf(path, info), nil
}

func (s *Server) entryOf(path string, info fs.FileInfo) *filesystem.EntryInfo {
	e := &filesystem.EntryInfo{
		Name:         filepath.Base(path),
		Type:         fileType(info.Mode()),
		Path:         path,
		Size:         info.Size(),
		Mode:         uint32(info.Mode().Perm()),
		Permissions:  info.Mode().String(),
		ModifiedTime: timestamppb.New(info.ModTime()),
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = s.users.names(st.Uid, st.Gid)
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		describeLink(e)
	}
	if info.Mode().IsRegular() || info.IsDir() {
		e.Metadata = readMetadata(path)
	}
	return e
}

// describeLink gives a link the type and mode of what it leads to. One that leads nowhere remains a link.
func describeLink(e *filesystem.EntryInfo) {
	if target, err := filepath.EvalSymlinks(e.Path); err == nil {
		e.SymlinkTarget = &target
	} else if target, err := os.Readlink(e.Path); err == nil {
		e.SymlinkTarget = &target
	}
	if info, err := os.Stat(e.Path); err == nil {
		e.Type, e.Mode = fileType(info.Mode()), uint32(info.Mode().Perm())
	}
}

func fileType(mode fs.FileMode) filesystem.FileType {
	switch {
	case mode.IsRegular():
		return filesystem.FileType_FILE_TYPE_FILE
	case mode.IsDir():
		return filesystem.FileType_FILE_TYPE_DIRECTORY
	case mode&fs.ModeSymlink != 0:
		return filesystem.FileType_FILE_TYPE_SYMLINK
	}
	return filesystem.FileType_FILE_TYPE_UNSPECIFIED
}

// readMetadata is nil where there is none, and on file systems that keep none.
func readMetadata(path string) map[string]string {
	var found map[string]string
	for _, name := range metadataNames(path) {
		value := make([]byte, maxMetadata)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			continue
		}
		if found == nil {
			found = map[string]string{}
		}
		found[strings.TrimPrefix(name, metadataPrefix)] = strings.ToValidUTF8(string(value[:n]), "\uFFFD")
	}
	return found
}

// metadataNames returns the names of the attributes that are metadata.
func metadataNames(path string) []string {
	size, err := unix.Llistxattr(path, nil)
	if err != nil || size <= 0 || size > maxAttributes {
		return nil
	}
	list := make([]byte, size)
	if size, err = unix.Llistxattr(path, list); err != nil {
		return nil
	}
	var names []string
	for name := range strings.SplitSeq(string(list[:size]), "\x00") {
		if strings.HasPrefix(name, metadataPrefix) {
			names = append(names, strings.ToValidUTF8(name, "\uFFFD"))
		}
	}
	return names
}

// replaceMetadata makes want the whole metadata of a file. Attributes of others are left alone.
func replaceMetadata(path string, want map[string]string) error {
	for _, name := range metadataNames(path) {
		if _, keep := want[strings.TrimPrefix(name, metadataPrefix)]; !keep {
			if err := unix.Lremovexattr(path, name); err != nil && !errors.Is(err, unix.ENODATA) {
				return &fs.PathError{Op: "remove metadata", Path: path, Err: err}
			}
		}
	}
	for key, value := range want {
		if err := unix.Lsetxattr(path, metadataPrefix+key, []byte(value), 0); err != nil {
			return &fs.PathError{Op: "set metadata", Path: path, Err: err}
		}
	}
	return nil
}

// rpcError gives an error of the operating system its code; one that has a code already keeps it.
func rpcError(err error) error {
	if coded := (*connect.Error)(nil); errors.As(err, &coded) {
		return err
	}
	return connect.NewError(codeOf(err), err)
}

func codeOf(err error) connect.Code {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return connect.CodeNotFound
	case errors.Is(err, syscall.ENOTEMPTY): // Go counts it as ErrExist, too
		return connect.CodeFailedPrecondition
	case errors.Is(err, fs.ErrExist):
		return connect.CodeAlreadyExists
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return connect.CodePermissionDenied
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EINVAL):
		return connect.CodeInvalidArgument
	case errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EXDEV), errors.Is(err, syscall.EBUSY):
		return connect.CodeFailedPrecondition
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return connect.CodeResourceExhausted
	}
	return connect.CodeInternal
}
