package control

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// ErrNoSpace means that an upload finds no room on the server's disk. It is an ErrExhausted.
var ErrNoSpace = fmt.Errorf("%w: no space for uploads", sandbox.ErrExhausted)

const (
	// uploadsKept is how long an upload is kept after its last use.
	uploadsKept = 24 * time.Hour
	// uploadLinkLife is how long a link to upload a file with can be used, to begin with it.
	uploadLinkLife = time.Hour
	partSuffix     = ".part"
	uploadSuffix   = ".tmp"
)

// Upload is a file that build steps copy from, or the beginning of one.
type Upload struct {
	// Hash is what the client calls the file.
	Hash     string
	Bytes    int64
	Complete bool
}

// uploads keeps files in a directory: NAME is complete and never written again, NAME.part grows, NAME.*.tmp belongs to
// a request.
type uploads struct {
	dir string
	// maxFile and maxTotal are in bytes.
	maxFile  int64
	maxTotal int64

	mu      sync.Mutex
	growing map[string]bool // parts that a request writes to
	pinned  map[string]int  // complete files that builds need
}

func newUploads(dir string, maxFile, maxTotal int64) *uploads {
	return &uploads{dir: dir, maxFile: maxFile, maxTotal: maxTotal, growing: make(map[string]bool), pinned: make(map[string]int)}
}

func (u *uploads) path(hash string) string { return filepath.Join(u.dir, hash) }

// look returns how much of a file is there.
func (u *uploads) look(hash string) (Upload, error) {
	if info, err := os.Stat(u.path(hash)); err == nil {
		return Upload{Hash: hash, Bytes: info.Size(), Complete: true}, nil
	}
	info, err := os.Stat(u.path(hash + partSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return Upload{Hash: hash}, nil
	}
	if err != nil {
		return Upload{}, fmt.Errorf("look for upload %s: %w", hash, err)
	}
	return Upload{Hash: hash, Bytes: info.Size()}, nil
}

// touch notes the use of a complete file.
func (u *uploads) touch(hash string) {
	now := time.Now()
	_ = os.Chtimes(u.path(hash), now, now) // what cannot be touched is removed a little earlier
}

// pin keeps a complete file until it is let go. Errors: ErrInvalid where there is none.
func (u *uploads) pin(hash string) error {
	u.mu.Lock()
	u.pinned[hash]++
	u.mu.Unlock()
	if up, err := u.look(hash); err != nil || !up.Complete {
		u.unpin(hash)
		return errors.Join(err, sandbox.Invalidf("the files %s are not here: upload them first; they are kept for %v after their last use",
			hash, uploadsKept))
	}
	u.touch(hash)
	return nil
}

func (u *uploads) unpin(hash string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pinned[hash]--; u.pinned[hash] <= 0 {
		delete(u.pinned, hash)
	}
}

// grow takes the right to write to a part.
func (u *uploads) grow(hash string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.growing[hash] {
		return false
	}
	u.growing[hash] = true
	return true
}

func (u *uploads) grown(hash string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.growing, hash)
}

// removable reports whether nobody needs a file of the directory now.
func (u *uploads) removable(name string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	part, isPart := strings.CutSuffix(name, partSuffix)
	return u.pinned[name] == 0 && (!isPart || !u.growing[part])
}

// sweep removes what was not used for a day.
func (u *uploads) sweep(now time.Time) error {
	all, err := u.list()
	for _, f := range all {
		if now.Sub(f.used) > uploadsKept && u.removable(f.name) {
			err = errors.Join(err, os.Remove(u.path(f.name)))
		}
	}
	return err
}

type uploadFile struct {
	name string
	size int64
	used time.Time
}

// list returns the files of the directory, the one used longest ago first.
func (u *uploads) list() ([]uploadFile, error) {
	entries, err := os.ReadDir(u.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list uploads: %w", err)
	}
	out := make([]uploadFile, 0, len(entries))
	for _, e := range entries {
		if info, err := e.Info(); err == nil { // one that went away meanwhile is none
			out = append(out, uploadFile{e.Name(), info.Size(), info.ModTime()})
		}
	}
	slices.SortFunc(out, func(a, b uploadFile) int { return a.used.Compare(b.used) })
	return out, nil
}

// room makes room for so many bytes more, where need be at the cost of files that nobody needs now.
func (u *uploads) room(want int64) error {
	all, err := u.list()
	if err != nil {
		return err
	}
	used := int64(0)
	for _, f := range all {
		used += f.size
	}
	for _, f := range all {
		if used+want <= u.maxTotal {
			return nil
		}
		if !strings.Contains(f.name, ".") && u.removable(f.name) && os.Remove(u.path(f.name)) == nil {
			used -= f.size
		}
	}
	if used+want > u.maxTotal {
		return fmt.Errorf("%w: %d bytes are in use and %d more are wanted, of at most %d", ErrNoSpace, used, want, u.maxTotal)
	}
	return nil
}

// whole stores a complete file in one go. Where there is one already it stays, and body is only read to its end.
func (u *uploads) whole(hash string, size int64, body io.Reader) (Upload, error) {
	if up, err := u.look(hash); err != nil || up.Complete {
		_, _ = io.Copy(io.Discard, io.LimitReader(body, u.maxFile)) // so that the client gets to read the answer
		u.touch(hash)
		return up, err
	}
	if err := u.admit(hash, max(0, size)); err != nil {
		return Upload{}, err
	}
	f, err := os.CreateTemp(u.dir, hash+".*"+uploadSuffix)
	if err != nil {
		return Upload{}, fmt.Errorf("store upload %s: %w", hash, noSpace(err))
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already where it has become the file
	n, err := u.write(f, body, 0)
	if err := errors.Join(err, noSpace(f.Close())); err != nil {
		return Upload{}, fmt.Errorf("store upload %s: %w", hash, err)
	}
	if n == 0 {
		return Upload{}, sandbox.Invalidf("upload %s is empty: want a tar archive", hash)
	}
	return u.complete(hash, f.Name())
}

// admit refuses what is too large or finds no room, and makes the directory.
func (u *uploads) admit(hash string, size int64) error {
	if size > u.maxFile {
		return sandbox.Invalidf("upload %s has %d bytes: want at most %d", hash, size, u.maxFile)
	}
	if err := os.MkdirAll(u.dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of uploads: %w", noSpace(err))
	}
	return u.room(size)
}

// complete makes a file what hash means, unless something is already.
func (u *uploads) complete(hash, from string) (Upload, error) {
	if err := os.Link(from, u.path(hash)); err != nil && !errors.Is(err, fs.ErrExist) {
		return Upload{}, fmt.Errorf("complete upload %s: %w", hash, noSpace(err))
	}
	if err := os.Remove(from); err != nil {
		return Upload{}, fmt.Errorf("complete upload %s: %w", hash, err)
	}
	u.touch(hash)
	return u.look(hash)
}

// part appends to a file that is not complete; offset 0 begins it anew.
func (u *uploads) part(hash string, offset, size int64, body io.Reader, complete bool) (Upload, error) {
	up, err := u.look(hash)
	if err != nil || up.Complete {
		_, _ = io.Copy(io.Discard, io.LimitReader(body, u.maxFile)) // so that the client gets to read the answer
		return up, err
	}
	if !u.grow(hash) {
		return Upload{}, sandbox.Conflictf("upload %s: another request writes to it", hash)
	}
	defer u.grown(hash)
	if up, err = u.look(hash); err != nil || up.Complete {
		return up, err
	}
	if offset != 0 && offset != up.Bytes {
		return Upload{}, sandbox.Conflictf("upload %s: offset %d: want %d, which is how much is there, or 0 to begin anew", hash, offset, up.Bytes)
	}
	if err := u.admit(hash, offset+max(0, size)); err != nil {
		return Upload{}, err
	}
	n, err := u.append(hash, offset, body)
	if err != nil {
		return Upload{}, fmt.Errorf("store upload %s: %w", hash, err)
	}
	if !complete {
		return Upload{Hash: hash, Bytes: n}, nil
	}
	if n == 0 {
		return Upload{}, sandbox.Invalidf("upload %s is empty: want a tar archive", hash)
	}
	return u.complete(hash, u.path(hash+partSuffix))
}

func (u *uploads) append(hash string, offset int64, body io.Reader) (size int64, err error) {
	f, err := os.OpenFile(u.path(hash+partSuffix), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return 0, noSpace(err)
	}
	defer func() { err = errors.Join(err, noSpace(f.Close())) }()
	if err := f.Truncate(offset); err != nil {
		return 0, err
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return 0, err
	}
	n, err := u.write(f, body, offset)
	return offset + n, err
}

// write copies a body behind the bytes that are there.
func (u *uploads) write(f *os.File, body io.Reader, there int64) (int64, error) {
	source := &bodyReader{from: io.LimitReader(body, u.maxFile-there+1)}
	n, err := io.Copy(f, source)
	switch {
	case source.err != nil:
		return n, sandbox.Invalidf("the body ended after %d bytes: %v", n, source.err)
	case err != nil:
		return n, noSpace(err)
	case there+n > u.maxFile:
		return n, sandbox.Invalidf("more than %d bytes, which is the most", u.maxFile)
	}
	return n, noSpace(f.Sync())
}

// bodyReader remembers an error of its source, so that it can be told from one of the disk.
type bodyReader struct {
	from io.Reader
	err  error
}

func (r *bodyReader) Read(p []byte) (int, error) {
	n, err := r.from.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

// noSpace gives a full disk its kind.
func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

func checkHash(hash string) error {
	if !validHash(hash) {
		return sandbox.Invalidf("file hash %.80q: want 1 to %d characters of a-z, 0-9 and '-'", hash, maxHashLen)
	}
	return nil
}

// About returns what the server says of itself.
func (c *Control) About() About { return c.about }

// GetUpload returns how much of a file is here. Errors: ErrInvalid for what can be no hash.
func (c *Control) GetUpload(_ context.Context, hash string) (Upload, error) {
	if err := checkHash(hash); err != nil {
		return Upload{}, err
	}
	return c.uploads.look(hash)
}

// PutUpload stores a file in one go; size is -1 where it is not known. What is complete already stays as it is.
// Errors: ErrInvalid, ErrNoSpace.
func (c *Control) PutUpload(_ context.Context, hash string, size int64, body io.Reader) (Upload, error) {
	if err := checkHash(hash); err != nil {
		return Upload{}, err
	}
	return c.uploads.whole(hash, size, body)
}

// UploadPart is a part of a file: what belongs at Offset.
type UploadPart struct {
	Hash   string
	Offset int64
	// Size is -1 where it is not known.
	Size     int64
	Body     io.Reader
	Complete bool
}

// AppendUpload stores a part of a file. Of a part that was cut off, what came stays.
// Errors: ErrInvalid, ErrConflict for an offset that is not the present size, ErrNoSpace.
func (c *Control) AppendUpload(_ context.Context, p UploadPart) (Upload, error) {
	if err := checkHash(p.Hash); err != nil {
		return Upload{}, err
	}
	return c.uploads.part(p.Hash, p.Offset, p.Size, p.Body, p.Complete)
}

// SignUpload returns the signature that lets anybody upload the file until the time.
func (c *Control) SignUpload(hash string, now time.Time) (expires int64, signature string) {
	expires = now.Add(uploadLinkLife).Unix()
	return expires, c.uploadSignature(hash, expires)
}

// CheckUpload reports whether a signature of SignUpload opens the file now. Errors: ErrDenied.
func (c *Control) CheckUpload(hash string, expires int64, signature string, now time.Time) error {
	if !hmac.Equal([]byte(signature), []byte(c.uploadSignature(hash, expires))) {
		return sandbox.Deniedf("the signature of this upload link is wrong: ask for another link")
	}
	if now.Unix() > expires {
		return sandbox.Deniedf("this upload link has expired: ask for another one")
	}
	return nil
}

func (c *Control) uploadSignature(hash string, expires int64) string {
	mac := hmac.New(sha256.New, c.secret)
	_, _ = fmt.Fprintf(mac, "upload:%s:%d", hash, expires) // a hash never fails
	return hex.EncodeToString(mac.Sum(nil))
}

// newBuildID returns a random UUID, as the E2B SDKs expect of a build's id.
func newBuildID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program first
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// runUploads removes what is not used any more, until ctx ends.
func (c *Control) runUploads(ctx context.Context) error {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		if err := c.uploads.sweep(time.Now()); err != nil {
			c.log.WarnContext(ctx, "uploads not swept", errAttr(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
