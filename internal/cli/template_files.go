package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/recipe"
)

const (
	// partBytes is how much of an archive one request carries.
	partBytes = 16 << 20
	// sendTries bounds how often in a row sending a part may fail.
	sendTries = 5
)

// sendFiles sends what the COPY steps take and the daemon does not have, and returns the steps as the API takes them.
func (a *app) sendFiles(ctx context.Context, cn *conn, src *buildSource) ([]client.BuildStep, error) {
	show := newProgress(a.err)
	defer show.end()
	out := make([]client.BuildStep, 0, len(src.file.Steps))
	for _, p := range src.file.Steps {
		step := p.Step
		if p.Source != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			files, err := src.context.Select(p.Source)
			if err != nil {
				return nil, &usageError{fmt.Errorf("%s, line %d: %w", src.name, p.Line, err)}
			}
			hash, err := files.Hash()
			if err != nil {
				return nil, fmt.Errorf("%s, line %d: %w", src.name, p.Line, err)
			}
			if err := a.send(ctx, cn, sending{files, hash, show}); err != nil {
				return nil, err
			}
			step = p.With(files, hash)
		}
		out = append(out, client.BuildStep{Type: step.Type, Args: step.Args, FilesHash: step.FilesHash, Force: step.Force})
	}
	return out, nil
}

// sending is one archive on its way.
type sending struct {
	files *recipe.Selection
	hash  string
	show  *progress
}

// send makes the daemon have an archive: it begins where an earlier try ended.
func (a *app) send(ctx context.Context, cn *conn, s sending) error {
	has, err := fileStatus(ctx, cn, s.hash)
	if err != nil || has.Complete {
		return err
	}
	archive, err := os.CreateTemp("", "cloister-files-*")
	if err != nil {
		return err
	}
	defer func() {
		_ = archive.Close()
		_ = os.Remove(archive.Name()) // nothing else knows of it
	}()
	if err := s.files.Archive(archive); err != nil {
		return err
	}
	whole, err := archive.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	return s.parts(ctx, cn, archive, whole)
}

// parts sends the archive from where the daemon has it, asking anew after a failure.
func (s sending) parts(ctx context.Context, cn *conn, archive io.ReaderAt, whole int64) error {
	title := fmt.Sprintf("send %s of files", size(s.files.Bytes))
	for failures := 0; ; {
		has, err := fileStatus(ctx, cn, s.hash)
		for err == nil && !has.Complete {
			s.show.update(title, float64(has.Bytes)/float64(whole))
			if has.Bytes > whole {
				return fmt.Errorf("the daemon has %d bytes of files %s, which are %d: was it another archive?", has.Bytes, s.hash, whole)
			}
			n := min(whole-has.Bytes, partBytes)
			part := io.NewSectionReader(archive, has.Bytes, n)
			before := has.Bytes
			if has, err = cn.api.PutFile(ctx, s.hash, before, before+n == whole, part); err == nil {
				failures = 0
			}
		}
		if err == nil {
			s.show.update(title, 1)
			return nil
		}
		failures++
		if _, refused := errors.AsType[*client.APIError](err); refused && !client.IsBusy(err) && !client.IsConflict(err) || failures == sendTries || ctx.Err() != nil {
			return cn.check(err)
		}
		wait(ctx, time.Duration(failures)*200*time.Millisecond)
	}
}

// fileStatus says what the daemon has of an archive; of one that it never saw, nothing.
func fileStatus(ctx context.Context, cn *conn, hash string) (client.Upload, error) {
	has, err := cn.api.FileStatus(ctx, hash)
	if client.IsNotFound(err) {
		return client.Upload{Hash: hash}, nil
	}
	return has, cn.check(err)
}
