package control

import (
	"context"
	"fmt"
	"strings"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// PushRequest says where a template's image is to be written to.
type PushRequest struct {
	// Template is [namespace/]alias[:tag] or id[:tag].
	Template string
	// Destination is a registry reference, oci:PATH or docker-archive:PATH.
	Destination string
	// RegistryUsername and RegistryPassword are used once and never kept.
	RegistryUsername string
	RegistryPassword string
}

// PushTemplate begins to write a template's image, and returns the id by which GetBuild and CancelBuild follow it.
// Errors: ErrInvalid, ErrNotFound, ErrUnsupported for a snapshot, ErrExhausted, ErrUnavailable.
func (c *Control) PushTemplate(ctx context.Context, req PushRequest) (sandbox.Template, string, error) {
	none := func(err error) (sandbox.Template, string, error) { return sandbox.Template{}, "", err }
	bad := strings.ContainsFunc(req.Destination, func(r rune) bool { return r < ' ' })
	if req.Destination == "" || len(req.Destination) > maxSourceLen || bad {
		return none(sandbox.Invalidf("destination %.80q: want a registry reference, oci:PATH or docker-archive:PATH", req.Destination))
	}
	t, b, err := c.resolveBuild(ctx, req.Template)
	if err != nil {
		return none(err)
	}
	if t.Kind == sandbox.TemplateSnapshot {
		return none(sandbox.Unsupportedf("template %q is a snapshot: want one that was built to push", req.Template))
	}
	holders := c.fleet.holders(b.ImageDigest)
	if len(holders) == 0 {
		return none(sandbox.Unavailablef("no node that is ready has the image of template %q", req.Template))
	}
	id := newBuildID()
	if err := c.builds.begin(id); err != nil {
		return none(err)
	}
	if err := c.pushFrom(ctx, holders[0], req, &agentv1.PushRequest{
		BuildId: id, TemplateId: string(t.ID), ImageDigest: b.ImageDigest, Guest: guestToWire(b.Guest),
		StartCommand: b.StartCommand, ReadyCommand: b.ReadyCommand, Resources: resourcesToWire(b.Resources),
	}); err != nil {
		c.builds.end(id)
		return none(fmt.Errorf("push template %q: %w", req.Template, err))
	}
	return t, id, nil
}

func (c *Control) pushFrom(ctx context.Context, node sandbox.NodeID, req PushRequest, msg *agentv1.PushRequest) error {
	agent, err := c.agent(node)
	if err != nil {
		return err
	}
	msg.Destination, msg.RegistryUsername, msg.RegistryPassword = req.Destination, req.RegistryUsername, req.RegistryPassword
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	if _, err := agent.Push(ctx, msg); err != nil {
		return fromNode(node, err)
	}
	c.builds.set(msg.GetBuildId(), node)
	select {
	case c.builds.queue <- task{build: msg.GetBuildId()}:
	default: // as long as there may be builds under way; GetBuild knows of this one's end
	}
	return nil
}
