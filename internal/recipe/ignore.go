package recipe

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxIgnore bounds a .dockerignore, in bytes.
const maxIgnore = 1 << 20

// ignored says what is left out of a build context.
type ignored struct {
	matcher *patternmatcher.PatternMatcher
}

// readIgnore reads the first of the files that exists; none of them means that nothing is left out.
func readIgnore(root fs.FS, names ...string) (*ignored, error) {
	for _, name := range names {
		info, err := fs.Stat(root, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if info.Size() > maxIgnore {
			return nil, sandbox.Invalidf("%s of %d bytes: want at most %d", name, info.Size(), maxIgnore)
		}
		f, err := root.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		patterns, err := ignorefile.ReadAll(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		return newIgnored(name, patterns)
	}
	return newIgnored("", nil)
}

func newIgnored(where string, patterns []string) (*ignored, error) {
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, sandbox.Invalidf("%s: %v", where, err)
	}
	// A malformed pattern shows only when it is matched.
	if _, err := m.MatchesOrParentMatches("x"); err != nil {
		return nil, sandbox.Invalidf("%s: %v", where, err)
	}
	return &ignored{m}, nil
}

// covers reports whether the path, relative to the context's root, is left out; all says that so is everything below it.
func (i *ignored) covers(name string) (left, all bool, err error) {
	left, err = i.matcher.MatchesOrParentMatches(name)
	if err != nil {
		return false, false, sandbox.Invalidf("match %q with the patterns of what is left out: %v", name, err)
	}
	return left, left && !i.matcher.Exclusions(), nil
}
