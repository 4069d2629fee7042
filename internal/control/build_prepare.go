package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// prepare does what comes before a build's own steps, and has a node begin them.
func (c *Control) prepare(parent context.Context, t task) (err error) {
	ctx, cancel := context.WithTimeout(parent, buildDeadline)
	defer cancel()
	c.builds.onCancel(t.build, cancel)
	defer func() {
		if err != nil && errors.Is(ctx.Err(), context.Canceled) && parent.Err() == nil {
			err = errCancelled
		}
	}()
	if t.substitute != nil {
		if err := c.settleBase(ctx, t); err != nil {
			return err
		}
	}
	node, err := c.builder(t.message)
	if err != nil {
		return err
	}
	if err := c.sendFiles(ctx, node, t); err != nil {
		return err
	}
	return c.send(ctx, node, t.message)
}

// builder returns the node that is to build.
func (c *Control) builder(msg *agentv1.BuildRequest) (sandbox.NodeID, error) {
	decision := c.fleet.place(scheduler.Request{Image: msg.GetBaseImageDigest()}, time.Now())
	if len(decision.Candidates) == 0 {
		return "", sandbox.Unavailablef("no node can build: %s", decision.Explain(explained))
	}
	return decision.Candidates[0], nil
}

// send has a node begin a build, and notes where.
func (c *Control) send(ctx context.Context, node sandbox.NodeID, msg *agentv1.BuildRequest) error {
	agent, err := c.agent(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.Build(ctx, msg)
	if err != nil {
		return fromNode(node, err)
	}
	if got := resp.GetBuildId(); got != msg.GetBuildId() {
		return sandbox.Conflictf("the template is being built already, as build %s", got)
	}
	c.builds.set(msg.GetBuildId(), node)
	return nil
}

// settleBase replaces the sources of a build by an image: that of the sources or, where they cannot be had, that of the
// substitute. The build's log says which.
func (c *Control) settleBase(ctx context.Context, t task) error {
	msg := t.message
	c.builds.say(t.build, "base")
	node, err := c.builder(msg)
	if err != nil {
		return err
	}
	b, err := c.tryBase(ctx, node, t)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil && b.State == sandbox.BuildReady:
		c.fleet.setImage(node, b.Result.ImageDigest, true)
		msg.BaseImageDigest, msg.BaseGuest = b.Result.ImageDigest, guestToWire(b.Result.Guest)
	default:
		why := b.Error
		if err != nil {
			why = err.Error()
		}
		c.builds.say(t.build, "base", line("warn", fmt.Sprintf(
			"image %s cannot be had (%s): starting from this cluster's own template %q instead", msg.GetSources()[0], why, DefaultTemplate)))
		msg.BaseImageDigest, msg.BaseGuest = t.substitute.ImageDigest, guestToWire(t.substitute.Guest)
	}
	msg.Sources = nil
	return nil
}

// tryBase has a node make the image of a build's sources alone, and adds what it says to the build's log.
func (c *Control) tryBase(ctx context.Context, node sandbox.NodeID, t task) (Build, error) {
	try := &agentv1.BuildRequest{
		TemplateId: string(sandbox.NewTemplateID()), BuildId: newBuildID(), Sources: t.message.GetSources(),
		RegistryUsername: t.message.GetRegistryUsername(), RegistryPassword: t.message.GetRegistryPassword(),
	}
	if err := c.send(ctx, node, try); err != nil {
		return Build{}, err
	}
	query := &agentv1.GetBuildRequest{BuildId: try.GetBuildId(), Wait: durationpb.New(followWait)}
	for {
		b, err := c.buildAt(ctx, node, query)
		if err != nil {
			c.cancelTry(ctx, node, try.GetBuildId())
			return Build{}, err
		}
		c.builds.say(t.build, "base", b.Entries...)
		if b.ended() {
			return b, nil
		}
		query.Offset += int32(len(b.Entries)) //nolint:gosec // a bounded log
	}
}

// cancelTry gives up a build that nobody waits for any more.
func (c *Control) cancelTry(ctx context.Context, node sandbox.NodeID, id string) {
	agent, err := c.agent(node)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	_, _ = agent.CancelBuild(ctx, &agentv1.CancelBuildRequest{BuildId: id}) // it ends by itself, only later
}

// filesOf names the uploads that steps copy from, each once.
func filesOf(steps []recipe.Step) []string {
	var out []string
	for _, s := range steps {
		if s.Type == recipe.Copy && !slices.Contains(out, s.FilesHash) {
			out = append(out, s.FilesHash)
		}
	}
	return out
}

// pinFiles keeps the uploads that steps copy from until the returned function is called.
func (c *Control) pinFiles(files []string) (release func(), err error) {
	var held []string
	release = func() {
		for _, f := range held {
			c.uploads.unpin(f)
		}
	}
	for _, f := range files {
		if err := c.uploads.pin(f); err != nil {
			release()
			return nil, err
		}
		held = append(held, f)
	}
	return release, nil
}

// sendFiles brings to a node the uploads that a build needs and the node lacks.
func (c *Control) sendFiles(ctx context.Context, node sandbox.NodeID, t task) error {
	if len(t.files) == 0 {
		return nil
	}
	c.builds.say(t.build, "files")
	for _, hash := range t.files {
		if err := c.sendFile(ctx, node, hash); err != nil {
			return fmt.Errorf("send files %s to node %s: %w", hash, node, err)
		}
	}
	return nil
}

const (
	// filePart is how much of a file one message to a node carries.
	filePart = 1 << 20
	// maxFileTries bounds how often a node is asked anew because another build sends it the same file.
	maxFileTries = 120
)

func (c *Control) sendFile(ctx context.Context, node sandbox.NodeID, hash string) error {
	f, err := os.Open(c.uploads.path(hash))
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read only
	info, err := f.Stat()
	if err != nil {
		return err
	}
	for range maxFileTries {
		err = c.sendFrom(ctx, node, hash, io.NewSectionReader(f, 0, info.Size()))
		if !errors.Is(err, sandbox.ErrConflict) && !errors.Is(err, sandbox.ErrInvalid) || ctx.Err() != nil {
			return err
		}
		pause(ctx, retryAfter)
	}
	return err
}

// sendFrom sends what a node lacks of a file.
func (c *Control) sendFrom(ctx context.Context, node sandbox.NodeID, hash string, f *io.SectionReader) error {
	there, err := c.putFile(ctx, node, &agentv1.PutFileRequest{Hash: hash})
	if err != nil || there.GetComplete() {
		return err
	}
	part := make([]byte, filePart)
	for at := there.GetBytes(); ; {
		n, err := f.ReadAt(part, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		last := at+int64(n) >= f.Size()
		_, err = c.putFile(ctx, node, &agentv1.PutFileRequest{Hash: hash, Offset: at, Data: part[:n], Complete: last})
		if err != nil || last {
			return err
		}
		at += int64(n)
	}
}

func (c *Control) putFile(ctx context.Context, node sandbox.NodeID, req *agentv1.PutFileRequest) (*agentv1.PutFileResponse, error) {
	agent, err := c.agent(node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.PutFile(ctx, req)
	return resp, fromNode(node, err)
}
