package agent

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Bounds of the archives that builds copy from.
const (
	maxFileBytes  = 2 << 30
	maxFilesBytes = 16 << 30
	maxFilePart   = 64 << 20
	fileUnused    = 24 * time.Hour
	// maxUnpacked bounds what an archive may unpack to.
	maxUnpacked = 32 << 30

	partSuffix = ".part"
	fileSuffix = ".tar"
	// layersDir takes what steps have changed while it becomes a layer.
	layersDir = "layers"
	// resultsDir remembers what whole recipes came to.
	resultsDir = "results"
)

var hashForm = regexp.MustCompile(`^[a-z0-9-]{1,128}$`)

// buildFiles is the directory of the archives that COPY steps take files from, by the hash that clients give them. A
// complete one has its final name; what a crash leaves is a part, which an upload goes on with.
type buildFiles struct {
	dir string

	mu   sync.Mutex
	busy map[string]chan struct{} // held, by name, by whoever writes that file
}

func newBuildFiles(dir string) *buildFiles {
	return &buildFiles{dir: dir, busy: map[string]chan struct{}{}}
}

// lock makes the caller the only one who writes the file.
func (f *buildFiles) lock(ctx context.Context, hash string) (unlock func(), err error) {
	for {
		f.mu.Lock()
		held := f.busy[hash]
		if held == nil {
			mine := make(chan struct{})
			f.busy[hash] = mine
			f.mu.Unlock()
			return func() {
				f.mu.Lock()
				delete(f.busy, hash)
				f.mu.Unlock()
				close(mine)
			}, nil
		}
		f.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// PutFile stores a part of an archive. Data at offset 0 begins anew; a complete file stays as it is, whatever comes.
func (a *Agent) PutFile(ctx context.Context, req *agentv1.PutFileRequest) (*agentv1.PutFileResponse, error) {
	size, complete, err := a.files.put(ctx, req)
	if errors.Is(err, syscall.ENOSPC) {
		err = sandbox.Unavailablef("the disk of node %s is full (%v)", a.node, err)
	}
	if err != nil {
		return nil, toWireError(err)
	}
	return &agentv1.PutFileResponse{Bytes: size, Complete: complete}, nil
}

func (f *buildFiles) put(ctx context.Context, req *agentv1.PutFileRequest) (size int64, complete bool, err error) {
	hash, data, offset := req.GetHash(), req.GetData(), req.GetOffset()
	switch {
	case f.dir == "":
		return 0, false, sandbox.Unsupportedf("this node keeps no files")
	case !hashForm.MatchString(hash):
		return 0, false, sandbox.Invalidf("file hash %.80q: want 1 to 128 characters of a-z, 0-9 and '-'", hash)
	case offset < 0 || len(data) > maxFilePart || offset+int64(len(data)) > maxFileBytes:
		return 0, false, sandbox.Invalidf("%d bytes at %d: want at most %d at once, and %d in all", len(data), offset, maxFilePart, maxFileBytes)
	}
	unlock, err := f.lock(ctx, hash)
	if err != nil {
		return 0, false, err
	}
	defer unlock()
	if info, err := os.Stat(f.path(hash)); err == nil {
		f.touch(hash)
		return info.Size(), true, nil
	}
	if len(data) == 0 && !req.GetComplete() {
		return f.partSize(hash), false, nil
	}
	if offset == 0 {
		if err := f.makeRoom(); err != nil {
			return 0, false, err
		}
	}
	if size, err = f.write(hash, offset, data); err != nil || !req.GetComplete() {
		return size, false, err
	}
	return size, true, f.complete(hash)
}

func (f *buildFiles) path(hash string) string { return filepath.Join(f.dir, hash+fileSuffix) }

func (f *buildFiles) partSize(hash string) int64 {
	info, err := os.Stat(f.path(hash) + partSuffix)
	if err != nil {
		return 0
	}
	return info.Size()
}

func (f *buildFiles) write(hash string, offset int64, data []byte) (size int64, err error) {
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return 0, err
	}
	flags := os.O_WRONLY | os.O_CREATE
	if offset == 0 {
		flags |= os.O_TRUNC // what was there may be of another packing of the same files
	}
	part, err := os.OpenFile(f.path(hash)+partSuffix, flags, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, part.Close()) }()
	info, err := part.Stat()
	if err != nil {
		return 0, err
	}
	if info.Size() != offset {
		return 0, sandbox.Conflictf("file %.80s has %d bytes: the next part belongs there, not at %d", hash, info.Size(), offset)
	}
	if _, err := part.WriteAt(data, offset); err != nil {
		return 0, errors.Join(err, part.Truncate(offset))
	}
	return offset + int64(len(data)), nil
}

// complete gives a file its final name, after a look at whether it is one archive.
func (f *buildFiles) complete(hash string) error {
	name := f.path(hash)
	part, err := os.OpenFile(name+partSuffix, os.O_RDWR, 0) //nolint:gosec // below our own directory
	if err != nil {
		return err
	}
	err = checkArchive(part)
	if err == nil {
		err = part.Sync()
	}
	if err = errors.Join(err, part.Close()); err != nil {
		return errors.Join(err, os.Remove(name+partSuffix))
	}
	if err := os.Rename(name+partSuffix, name); err != nil {
		return err
	}
	return syncDirectory(f.dir)
}

// checkArchive reads an archive to its end: what was cut off, or mixed of two uploads, would else be of no use for ever.
func checkArchive(file io.Reader) error {
	r := bufio.NewReaderSize(file, 1<<20)
	src := io.Reader(r)
	if magic, _ := r.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		z, err := gzip.NewReader(r)
		if err != nil {
			return sandbox.Invalidf("the file is not gzip: %v", err)
		}
		src = z
	}
	limited := &io.LimitedReader{R: src, N: maxUnpacked}
	t := tar.NewReader(limited)
	for {
		_, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return sandbox.Invalidf("the file is no whole tar archive: %v", err)
		}
	}
	if _, err := io.Copy(io.Discard, limited); err != nil {
		return sandbox.Invalidf("the file is damaged: %v", err)
	}
	if limited.N <= 0 {
		return sandbox.Invalidf("the file unpacks to more than %d bytes", int64(maxUnpacked))
	}
	return nil
}

func syncDirectory(name string) error {
	d, err := os.Open(name) //nolint:gosec // our own directory
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// open opens a complete file, which stays readable also when it is removed meanwhile.
func (f *buildFiles) open(hash string) (*os.File, error) {
	if f.dir == "" || !hashForm.MatchString(hash) {
		return nil, sandbox.NotFoundf("file %.80q is not on this node", hash)
	}
	file, err := os.Open(f.path(hash))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, sandbox.NotFoundf("the files of the step were not uploaded, or removed since (hash %.80s): upload them again", hash)
	}
	if err != nil {
		return nil, err
	}
	f.touch(hash)
	return file, nil
}

// touch notes that a file is used.
func (f *buildFiles) touch(hash string) {
	at := time.Now()
	_ = os.Chtimes(f.path(hash), at, at) // it may go a day too early
}

// storedFile is one entry of the directory.
type storedFile struct {
	name string
	size int64
	used time.Time
}

// makeRoom removes what was not used for a day, and then what was used longest ago until the rest fits.
func (f *buildFiles) makeRoom() error {
	list, err := os.ReadDir(f.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var all []storedFile
	var total int64
	for _, e := range list {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		all = append(all, storedFile{e.Name(), info.Size(), info.ModTime()})
		total += info.Size()
	}
	slices.SortFunc(all, func(x, y storedFile) int { return x.used.Compare(y.used) })
	for _, s := range all {
		if total <= maxFilesBytes-maxFileBytes && time.Since(s.used) <= fileUnused {
			break
		}
		if time.Since(s.used) <= time.Minute && strings.HasSuffix(s.name, partSuffix) {
			continue // it is being uploaded
		}
		if err := os.Remove(filepath.Join(f.dir, s.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		total -= s.size
	}
	if total > maxFilesBytes {
		return sandbox.Exhaustedf("%d MiB of files are being uploaded, which is the most that may: try again later", total>>20)
	}
	return nil
}

// recover clears away what builds that ended with their process have left.
func (f *buildFiles) recover() error {
	if f.dir == "" {
		return nil
	}
	if err := os.RemoveAll(filepath.Join(f.dir, layersDir)); err != nil {
		return fmt.Errorf("recover builds: %w", err)
	}
	if err := f.makeRoom(); err != nil {
		return fmt.Errorf("recover files of builds: %w", err)
	}
	return nil
}

// layerDir makes an empty directory for a layer.
func (f *buildFiles) layerDir() (string, error) {
	parent := filepath.Join(cmp.Or(f.dir, os.TempDir()), layersDir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return "", err
	}
	return os.MkdirTemp(parent, "step-")
}

// putResult remembers which checkpoint a whole recipe came to. Forgetting it costs time, so errors do not matter.
func (f *buildFiles) putResult(key, checkpoint string) {
	dir := filepath.Join(f.dir, resultsDir)
	if f.dir == "" || os.MkdirAll(dir, 0o700) != nil {
		return
	}
	temp := filepath.Join(dir, key+partSuffix)
	if os.WriteFile(temp, []byte(checkpoint), 0o600) == nil {
		_ = os.Rename(temp, filepath.Join(dir, key))
	}
}

// result returns the checkpoint that a whole recipe came to, which may be gone.
func (f *buildFiles) result(key string) (checkpoint string, ok bool) {
	if f.dir == "" {
		return "", false
	}
	name := filepath.Join(f.dir, resultsDir, key)
	text, err := os.ReadFile(name) //nolint:gosec // a key is hex digits
	return string(text), err == nil && hashForm.Match(text)
}

// forgetResults drops what refers to checkpoints that are gone.
func (f *buildFiles) forgetResults(exists func(checkpoint string) bool) {
	dir := filepath.Join(f.dir, resultsDir)
	list, err := os.ReadDir(dir)
	if f.dir == "" || err != nil {
		return
	}
	for _, e := range list {
		if id, ok := f.result(e.Name()); !ok || !exists(id) {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}
