package agent

import (
	"context"
	"fmt"
	"net/url"

	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// perform does what a step says, and reports whether that may have changed files. After is what is in force when it is done.
func (r *buildRun) perform(ctx context.Context, s recipe.Step, after sandbox.GuestSettings, name string) (changed bool, err error) {
	switch s.Type {
	case recipe.Run:
		return true, r.performRun(ctx, s, name)
	case recipe.Copy:
		return true, r.performCopy(ctx, s)
	case recipe.User:
		return r.client.ensureUser(ctx, after.User)
	case recipe.WorkDir:
		return r.client.makeDir(ctx, after.WorkDir, userOf(&after))
	}
	return false, sandbox.Invalidf("step type %.40q", s.Type)
}

func (r *buildRun) performRun(ctx context.Context, s recipe.Step, name string) error {
	c := command{text: s.Args[0], guest: r.guest}
	if len(s.Args) > 1 {
		c.user = s.Args[1]
	}
	status, err := r.client.run(ctx, c, func(level, line string) { r.bd.output(level, name, line) })
	if err != nil {
		return fmt.Errorf("run command '%s': %w", clip(c.text, 500), err)
	}
	if status != statusOK {
		// Worded as the hosted service does, whose users look for it.
		return sandbox.Invalidf("failed to run command '%s': %s", clip(c.text, 500), status)
	}
	return nil
}

func (r *buildRun) performCopy(ctx context.Context, s recipe.Step) error {
	// Whoever made the archive has read the source literally.
	q := url.Values{"user": {userOf(&r.guest)}, "workdir": {r.guest.WorkDir}, "src": {s.Args[0]}}
	for i, name := range []string{"", "dest", "owner", "mode"} {
		if i == 0 || i >= len(s.Args) || s.Args[i] == "" {
			continue
		}
		text, err := recipe.Expand(s.Args[i], r.guest)
		if err != nil {
			return err
		}
		q.Set(name, text)
	}
	archive, err := r.files.open(s.FilesHash)
	if err != nil {
		return err
	}
	defer func() { _ = archive.Close() }() // it was only read
	if err := r.client.copyIn(ctx, q, archive); err != nil {
		return fmt.Errorf("copy '%s' to '%s': %w", clip(s.Args[0], 200), clip(s.Args[1], 200), err)
	}
	return nil
}
