package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"

	"github.com/spf13/cobra"
)

// remotePath recognises ID:PATH.
var remotePath = regexp.MustCompile(`(?s)^([a-z0-9]+):(.*)$`)

// stream is the argument that stands for standard input or output.
const stream = "-"

// copier moves files between this machine and one sandbox.
type copier struct {
	guest *guestConn
	in    io.Reader
	out   io.Writer
	// skipped counts links and special files, which are not copied.
	skipped int
}

func (a *app) sandboxCopy() *cobra.Command {
	var user string
	c := &cobra.Command{
		Use: "cp SOURCE TARGET", Short: "Copy files and directories into or out of a sandbox",
		Long: "Copy files and directories into or out of a sandbox. One of the two is ID:PATH; a relative PATH starts at the user's home.\n" +
			"Like cp -r: a directory as the target takes the source under its name, a source that ends in /. gives its contents.\n" +
			"Permissions are kept, links and special files are left out. - is standard input or output, for one file.",
		Example: "  cloister sandbox cp ./data ID:/home/user/data\n  cloister sandbox cp ID:out.csv .\n  cloister sandbox cp ID:out.csv - | head",
		Args:    exactly(2, "a source and a target"), ValidArgsFunction: a.completeCopy,
		RunE: func(c *cobra.Command, args []string) error {
			from, to := remotePath.FindStringSubmatch(args[0]), remotePath.FindStringSubmatch(args[1])
			if (from == nil) == (to == nil) {
				return &usageError{fmt.Errorf("sandbox cp %q %q: want exactly one side as ID:PATH", args[0], args[1])}
			}
			id := append(from, to...)[1] // the one that matched
			g, err := a.guestOf(c.Context(), id, user)
			if err != nil {
				return err
			}
			cp := &copier{guest: g, in: a.in, out: a.out}
			if to != nil {
				err = cp.copyIn(c.Context(), args[0], to[2])
			} else {
				err = cp.copyOut(c.Context(), from[2], args[1])
			}
			if cp.skipped > 0 {
				_, _ = fmt.Fprintf(a.err, "left out %d links and special files; `cloister sandbox exec` with tar keeps them\n", cp.skipped)
			}
			return err
		},
	}
	c.Flags().StringVarP(&user, "user", "u", "", "`user` of the sandbox who owns what is copied in; default: the template's")
	return c
}

// leaf is the name under which a directory takes what path names; empty where path names only contents, as . and /. do.
func leaf(p string) string {
	if base := path.Base(p); base != "." && base != ".." && base != "/" && base != "~" {
		return base
	}
	return ""
}

// copyIn copies a local file or directory; a target that ends in / or names a directory takes it under its own name.
func (c *copier) copyIn(ctx context.Context, local, remote string) error {
	if local == stream {
		if remote == "" || remote[len(remote)-1] == '/' {
			return &usageError{fmt.Errorf("sandbox cp - %q: want the path of a file", remote)}
		}
		_, err := c.guest.upload(ctx, remote, c.in, -1)
		return err
	}
	info, err := os.Stat(local)
	if err != nil {
		return err
	}
	if remote == "" || remote[len(remote)-1] == '/' || c.guest.isDir(ctx, remote) {
		remote = path.Join(remote, leaf(local))
	}
	switch {
	case info.IsDir():
		return c.copyTreeIn(ctx, local, remote)
	case !info.Mode().IsRegular() && info.Mode()&os.ModeNamedPipe == 0:
		return fmt.Errorf("copy %s: it is no file and no directory", local)
	}
	var modes modes
	if err := c.copyFileIn(ctx, local, remote, &modes); err != nil {
		return err
	}
	return c.guest.apply(ctx, modes)
}

// copyOut copies a file or directory of the sandbox to a local path.
func (c *copier) copyOut(ctx context.Context, remote, local string) error {
	if local == stream {
		return c.guest.download(ctx, remote, func() (io.Writer, error) { return c.out, nil })
	}
	if remote == "" {
		remote = "." // the user's home
	}
	e, err := c.guest.stat(ctx, remote)
	if err != nil {
		return err
	}
	if info, err := os.Stat(local); err == nil && info.IsDir() {
		local = path.Join(local, leaf(remote)) // the name that the user gave, not the one that the sandbox answers
	}
	if !isDir(e) {
		return c.copyFileOut(ctx, remote, local, perm(e))
	}
	return c.copyTreeOut(ctx, remote, local, perm(e))
}

func (c *copier) copyFileOut(ctx context.Context, remote, local string, mode os.FileMode) (err error) {
	var f *os.File
	defer func() {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	return c.guest.download(ctx, remote, func() (io.Writer, error) {
		f, err = os.OpenFile(local, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode) //nolint:gosec // the user names the file
		return f, err
	})
}
