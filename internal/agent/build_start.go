package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

const (
	// readyDefault is how long a start command without a ready command has.
	readyDefault = 20 * time.Second
	// readyRetry is the time between two tries of a ready command, readyTimeout that for all of them.
	readyRetry   = 500 * time.Millisecond
	readyTimeout = 5 * time.Minute
	// maxReadyLines is what is shown of one try.
	maxReadyLines = 50
)

// finalize makes the image, and the checkpoint of what the start command has started.
func (r *buildRun) finalize(ctx context.Context) (built, error) {
	r.bd.stage(stepFinalize, composeFrom, startFrom)
	r.closeSandbox() // its room may be needed
	im, err := r.compose(ctx, r.layers)
	if err != nil {
		return built{}, err
	}
	out := r.built(im)
	if r.order.start == "" && r.order.ready == "" {
		return out, nil
	}
	r.bd.stage(stepFinalize, startFrom, 1)
	key := recipe.FinalKey(im.Digest, r.guest, r.order.size, r.order.start, r.order.ready)
	if m, ok := r.reuse(key); ok {
		r.bd.note(stepFinalize, "CACHED start command: "+clip(r.order.start, 500))
		out.checkpoint = toWireCheckpoint(&m)
		return out, nil
	}
	m, err := r.startAndSave(ctx)
	if err != nil {
		return built{}, err
	}
	r.files.forgetResults(func(id string) bool {
		_, err := r.saves.Get(id)
		return err == nil
	})
	r.files.putResult(key, m.ID)
	out.checkpoint = toWireCheckpoint(&m)
	return out, nil
}

// reuse gives this build the checkpoint of an earlier one that came to the same, unless the build is not to.
func (r *buildRun) reuse(key string) (snapshot.Manifest, bool) {
	for _, s := range r.order.steps {
		if s.Force {
			return snapshot.Manifest{}, false
		}
	}
	id, ok := r.files.result(key)
	if !ok || r.order.force {
		return snapshot.Manifest{}, false
	}
	held, err := r.saves.Hold(id)
	if err != nil {
		return snapshot.Manifest{}, false
	}
	defer held.Release()
	m, err := r.linkCheckpoint(r.bd.id, held, false)
	return m, err == nil
}

// startAndSave runs the start command in a fresh sandbox of the final image until it is ready, and saves that.
func (r *buildRun) startAndSave(ctx context.Context) (snapshot.Manifest, error) {
	if err := r.openSandbox(ctx, r.layers); err != nil {
		return snapshot.Manifest{}, err
	}
	defer r.closeSandbox()
	sctx, done := r.in.interruptible(ctx)
	defer done()
	err := r.startUp(sctx)
	if err == nil {
		r.client.close() // what is open would end anyway
		var m snapshot.Manifest
		if m, err = r.saveCheckpoint(sctx, r.in, r.bd.id, engine.SaveSpec{Kind: engine.SaveMemory}); err == nil {
			return m, nil
		}
	}
	if ctx.Err() == nil && !r.in.alive() {
		err = context.Cause(sctx)
	}
	return snapshot.Manifest{}, err
}

// startUp starts the start command and waits until the template is ready. When it returns, nothing listens to the command
// any more, which goes on.
func (r *buildRun) startUp(ctx context.Context) error {
	// The command must not have a deadline: the agent inside would end it then, also in every sandbox from the template.
	run, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	defer context.AfterFunc(ctx, func() { stop(context.Cause(ctx)) })()
	wait, failed := context.WithCancelCause(ctx)
	defer failed(nil)
	ended := make(chan struct{})
	if r.order.start == "" {
		close(ended)
		return r.awaitReady(wait)
	}
	r.bd.note(stepFinalize, "running start command: "+clip(r.order.start, 500))
	go func() {
		defer close(ended)
		status, err := r.client.run(run, command{text: r.order.start, guest: r.guest}, func(level, line string) {
			r.bd.output(level, stepFinalize, line)
		})
		switch {
		case run.Err() != nil:
		case err != nil:
			failed(fmt.Errorf("run start command: %w", err))
		case status != statusOK:
			failed(sandbox.Invalidf("failed to run start command '%s': %s", clip(r.order.start, 500), status))
		}
	}()
	err := r.awaitReady(wait)
	stop(nil)
	<-ended
	return err
}

// awaitReady waits until the ready command succeeds, or a moment where there is none.
func (r *buildRun) awaitReady(ctx context.Context) error {
	if r.order.ready == "" {
		r.bd.note(stepFinalize, fmt.Sprintf("waiting %v for the start command, since there is no ready command", readyDefault))
		if !pause(ctx, readyDefault) {
			return context.Cause(ctx)
		}
		return nil
	}
	r.bd.note(stepFinalize, "waiting for ready command: "+clip(r.order.ready, 500))
	ctx, cancel := context.WithTimeoutCause(ctx, readyTimeout, sandbox.Invalidf("ready command timed out after %v", readyTimeout))
	defer cancel()
	var last []string
	for {
		var said []string
		status, err := r.client.run(ctx, command{text: r.order.ready, guest: r.guest}, func(_, line string) {
			said = append(said, line)[:min(len(said)+1, maxReadyLines)]
		})
		if err != nil {
			return err
		}
		if status == statusOK {
			r.bd.note(stepFinalize, "ready command succeeded")
			return nil
		}
		if said = append(said, "not ready yet: "+status); !slices.Equal(said, last) { // many tries say the same
			r.bd.notes(stepFinalize, said)
			last = said
		}
		if !pause(ctx, readyRetry) {
			return context.Cause(ctx)
		}
	}
}
