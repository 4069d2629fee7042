package gvisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"gvisor.dev/gvisor/pkg/control/client"
	"gvisor.dev/gvisor/pkg/urpc"
	runscboot "gvisor.dev/gvisor/runsc/boot"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// A sentry counts how often its guest was told to stand still, does not say how often, and dies of being told to go on once
// too often. So the count is kept at 0 or 1, and a file beside the record says which, written before and after each
// change. A process that is killed between the two leaves "unsure", which settle resolves.
const (
	standingFile = "standing"
	standsStill  = "still"
	standsUnsure = "unsure"
)

// Thaw lets a guest that stands still go on. See engine.Engine.
func (e *Engine) Thaw(ctx context.Context, id sandbox.ID) error {
	g, err := e.find(id)
	if err != nil {
		return err
	}
	if !g.running() {
		return notFound(id)
	}
	if err := e.thaw(ctx, g); err != nil {
		return fmt.Errorf("thaw %s: %w", id, err)
	}
	return nil
}

// freeze makes a guest stand still, unless it does.
func (e *Engine) freeze(ctx context.Context, g *guest) error {
	still, err := e.settle(ctx, g)
	if err != nil || still {
		return err
	}
	if err := g.note(standsUnsure); err != nil {
		return err
	}
	if err := e.call(ctx, g, runscboot.ContMgrPause, nil); err != nil {
		return err
	}
	return g.note(standsStill)
}

// thaw lets a guest go on, unless it does.
func (e *Engine) thaw(ctx context.Context, g *guest) error {
	still, err := e.settle(ctx, g)
	if err != nil || !still {
		return err
	}
	if err := g.note(standsUnsure); err != nil {
		return err
	}
	if err := e.call(ctx, g, runscboot.ContMgrResume, nil); err != nil {
		return err
	}
	return g.note("")
}

// settle reports whether the guest stands still, and finds out where a killed process has left that unsure. It stops the
// guest once more: then nothing is on its way to standing still, and after the matching step on every task that can run
// does, unless somebody else has stopped the guest before.
func (e *Engine) settle(ctx context.Context, g *guest) (bool, error) {
	raw, err := os.ReadFile(filepath.Join(g.bundle, standingFile))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read whether it stands still: %w", err)
	case string(raw) == standsStill:
		return true, nil
	}
	for _, method := range []string{runscboot.ContMgrPause, runscboot.ContMgrResume} {
		if err := e.call(ctx, g, method, nil); err != nil {
			return false, err
		}
	}
	var stacks string
	if err := e.call(ctx, g, runscboot.DebugStacks, &stacks); err != nil {
		return false, err
	}
	if !allStopped([]byte(stacks)) {
		return false, g.note("")
	}
	return true, g.note(standsStill)
}

// allStopped reports whether the tasks among a sentry's goroutines are all stopped. One that was told to go on is still in
// doStop for a moment, but does not wait there any more.
func allStopped(stacks []byte) bool {
	tasks := 0
	for goroutine := range bytes.SplitSeq(stacks, []byte("\n\n")) {
		if !bytes.Contains(goroutine, []byte("kernel.(*Task).run(")) {
			continue
		}
		tasks++
		if !bytes.Contains(goroutine, []byte("[sync.Cond.Wait")) || !bytes.Contains(goroutine, []byte("kernel.(*Task).doStop(")) {
			return false
		}
	}
	return tasks > 0
}

// note writes whether the guest stands still; an empty text means that it runs.
func (g *guest) note(text string) error {
	path := filepath.Join(g.bundle, standingFile)
	var err error
	if text == "" {
		err = os.Remove(path)
	} else if err = os.WriteFile(path+".new", []byte(text), fileMode); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("note whether it stands still: %w", err)
	}
	return nil
}

// call asks the guest's sentry for something without an argument.
func (e *Engine) call(ctx context.Context, g *guest, method string, result any) error {
	return e.callWith(ctx, g, method, nil, result)
}

// callWith asks the guest's sentry for something. When ctx ends first, the sentry goes on with it all the same.
func (e *Engine) callWith(ctx context.Context, g *guest, method string, arg, result any) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	conn, err := client.ConnectTo(e.socket(g.id))
	if err != nil {
		return fmt.Errorf("%w: connect to the sentry: %w", sandbox.ErrUnavailable, err)
	}
	defer func() { _ = conn.Close() }() // nothing is lost
	stop := context.AfterFunc(ctx, func() { _ = conn.Socket.Shutdown() })
	defer stop()
	err = conn.Call(method, arg, result)
	if ctx.Err() != nil && err != nil {
		return fmt.Errorf("%w: %s: %w", sandbox.ErrUnavailable, method, ctx.Err())
	}
	if remote, ok := errors.AsType[urpc.RemoteError](err); ok {
		return fmt.Errorf("%w: %s: %s", sandbox.ErrUnavailable, method, oneLine([]byte(remote.Message)))
	}
	if err != nil {
		return fmt.Errorf("%w: %s: %w", sandbox.ErrUnavailable, method, err)
	}
	return nil
}
