package recipe

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxFiles bounds what one COPY takes.
const maxFiles = 1 << 20

// Context is a directory that COPY takes files from. Nothing outside of it is ever read, whatever its links say.
type Context struct {
	root   *os.Root
	ignore *ignored
}

// OpenContext opens a directory, without what its .dockerignore leaves out. A file beside the Dockerfile, of its name and
// ".dockerignore", goes before that; dockerfile is relative to the directory, or empty. Close the context after use.
func OpenContext(dir, dockerfile string) (*Context, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err // names the directory
	}
	names := []string{".dockerignore"}
	if dockerfile != "" && filepath.IsLocal(dockerfile) {
		names = slices.Insert(names, 0, filepath.ToSlash(filepath.Clean(dockerfile))+".dockerignore")
	}
	c := &Context{root: root}
	if c.ignore, err = readIgnore(root.FS(), names...); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return c, nil
}

// Close gives the directory back.
func (c *Context) Close() error { return c.root.Close() }

// Selection is the files of one COPY.
type Selection struct {
	// From is the source of the step: what it takes from the archive.
	From string
	// Directory says that the destination has to be a directory.
	Directory bool
	// Bytes is the size of all files.
	Bytes   int64
	entries []entry
	context *Context
}

// entry is a file, directory or link of an archive.
type entry struct {
	name string // in the archive
	at   string // in the context; empty where content is the file
	info fs.FileInfo
	link string // where a symbolic link leads
	// content is the file itself where it does not come from the context.
	content []byte
}

// Select finds what a source takes. Links below it are kept as links; the source itself may be a link to something in the
// context. Sockets and the like are left out. Errors: ErrInvalid where there is nothing to take, and those of reading.
func (c *Context) Select(src *Source) (*Selection, error) {
	s := &Selection{context: c}
	if src.Name != "" {
		s.From, s.Bytes = src.Name, int64(len(src.Content))
		s.entries = []entry{{name: src.Name, content: src.Content}}
		return s, nil
	}
	exclude, err := newIgnored("--exclude", src.Exclude)
	if err != nil {
		return nil, err
	}
	w := &walk{context: c, exclude: exclude, into: s, seen: map[string]int{}}
	if !isPattern(src.Path) {
		s.From = src.Path
		err = w.literal(src)
	} else {
		s.From, s.Directory = ".", true
		err = w.pattern(src)
	}
	if err != nil {
		return nil, err
	}
	if len(s.entries) == 0 {
		return nil, c.nothing(src)
	}
	slices.SortFunc(s.entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	return s, nil
}

// With returns a planned COPY as a step that takes the selection, of which hash is the name.
func (p Planned) With(s *Selection, hash string) Step {
	step := p.Step
	step.Args = slices.Clone(step.Args)
	step.Args[0], step.FilesHash = literal(s.From), hash
	if s.Directory && !isDir(step.Args[1]) {
		step.Args[1] += "/"
	}
	return step
}

// isPattern includes braces, which are plain characters to path.Match and a pattern to who unpacks the archive.
func isPattern(name string) bool { return strings.ContainsAny(name, `*?[{\`) }

// nothing says why a source takes nothing.
func (c *Context) nothing(src *Source) error {
	if !isPattern(src.Path) {
		if _, err := c.root.Stat(src.Path); err == nil {
			if src.Path == "." {
				return sandbox.Invalidf("%q: the build context %s is empty, or .dockerignore leaves all of it out", src.Path, c.root.Name())
			}
			return sandbox.Invalidf("%q: .dockerignore or --exclude leaves it out of the build context", src.Path)
		}
	}
	return sandbox.Invalidf("%q: no such file in the build context %s", src.Path, c.root.Name())
}

// walk collects entries.
type walk struct {
	context *Context
	exclude *ignored
	into    *Selection
	seen    map[string]int // index of each name: of two, the later one counts
}

// literal takes a file under its own name, or a directory and what is below it.
func (w *walk) literal(src *Source) error {
	info, err := w.context.root.Stat(src.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return w.context.nothing(src)
	}
	if err != nil {
		return err // names the path
	}
	return w.take(src, src.Path, src.Path, info)
}

// pattern takes each match as Docker does: files under their base names, of directories what is in them.
func (w *walk) pattern(src *Source) error {
	all, err := fs.Glob(w.context.root.FS(), src.Path)
	if err != nil {
		return sandbox.Invalidf("%q: %v", src.Path, err)
	}
	slices.Sort(all)
	if len(all) == 1 && !isPattern(path.Base(all[0])) {
		if info, err := w.context.root.Stat(all[0]); err == nil && !info.IsDir() {
			w.into.From, w.into.Directory = path.Base(all[0]), false // a single file may get the destination's name
		}
	}
	for _, at := range all {
		info, err := w.context.root.Stat(at)
		if err != nil {
			return err
		}
		name := path.Base(at)
		if info.IsDir() {
			name = "."
		}
		if err := w.take(src, at, name, info); err != nil {
			return err
		}
	}
	return nil
}

// take adds what is at a path of the context under a name in the archive. The path itself may be a link; info is of what
// it leads to.
func (w *walk) take(src *Source, at, name string, info fs.FileInfo) error {
	if !info.IsDir() {
		left, _, err := w.leaves(at)
		if err != nil || left {
			return err
		}
		if src.Add {
			if err := w.refuseArchive(at); err != nil {
				return err
			}
		}
		return w.add(entry{name: name, at: at, info: info})
	}
	return fs.WalkDir(w.context.root.FS(), at, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		left, all, err := w.leaves(p)
		switch {
		case err != nil:
			return err
		case all && d.IsDir():
			return fs.SkipDir
		case left, p == at && name == ".":
			return nil
		}
		return w.found(p, path.Join(name, strings.TrimPrefix(p, at)), p == at)
	})
}

// leaves reports whether a path is left out, and all below it too.
func (w *walk) leaves(at string) (left, all bool, err error) {
	if at == "." {
		return false, false, nil
	}
	if left, all, err = w.context.ignore.covers(at); err != nil || left {
		return left, all, err
	}
	return w.exclude.covers(at)
}

// found adds what a directory holds; the top is what a link leads to.
func (w *walk) found(at, name string, top bool) error {
	stat := w.context.root.Lstat
	if top {
		stat = w.context.root.Stat
	}
	info, err := stat(at)
	if err != nil {
		return err
	}
	e := entry{name: name, at: at, info: info}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		if e.link, err = w.context.root.Readlink(at); err != nil {
			return err
		}
	case !info.IsDir() && !info.Mode().IsRegular():
		return nil
	}
	return w.add(e)
}

func (w *walk) add(e entry) error {
	if i, twice := w.seen[e.name]; twice {
		w.into.Bytes += e.size() - w.into.entries[i].size()
		w.into.entries[i] = e
		return nil
	}
	if len(w.into.entries) >= maxFiles {
		return sandbox.Invalidf("more than %d files in one COPY; name what is not needed in .dockerignore", maxFiles)
	}
	w.seen[e.name] = len(w.into.entries)
	w.into.entries = append(w.into.entries, e)
	w.into.Bytes += e.size()
	return nil
}

// size is how many bytes of content an entry has.
func (e entry) size() int64 {
	switch {
	case e.info == nil:
		return int64(len(e.content))
	case e.info.Mode().IsRegular():
		return e.info.Size()
	}
	return 0
}

// refuseArchive keeps ADD from meaning less than it says: Docker unpacks archives.
func (w *walk) refuseArchive(at string) error {
	f, err := w.context.root.Open(at)
	if err != nil {
		return err
	}
	head := make([]byte, 512)
	n, err := f.ReadAt(head, 0)
	if closeErr := f.Close(); closeErr != nil || n == 0 {
		return errors.Join(err, closeErr)
	}
	if isArchive(at, head[:n]) {
		return sandbox.Invalidf("ADD %s: archives are not unpacked; COPY it and RUN tar -xf", fmt.Sprintf("%q", at))
	}
	return nil
}

// isArchive tells tar archives by their header, compressed ones by their magic number and name.
func isArchive(name string, head []byte) bool {
	if len(head) >= 262 && string(head[257:262]) == "ustar" {
		return true
	}
	for _, magic := range []string{"\x1f\x8b", "BZh", "\xfd7zXZ\x00", "\x28\xb5\x2f\xfd"} {
		if strings.HasPrefix(string(head), magic) {
			base := path.Base(name)
			return strings.Contains(base, ".tar.") || slices.Contains([]string{".tgz", ".tbz", ".tbz2", ".txz", ".tzst"}, path.Ext(base))
		}
	}
	return false
}
