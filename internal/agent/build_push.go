package agent

import (
	"context"
	"log/slog"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// Push starts writing a template's image to a registry or a file. It is followed and cancelled as a build is.
func (a *Agent) Push(_ context.Context, req *agentv1.PushRequest) (*agentv1.PushResponse, error) {
	switch id, digest, to := req.GetBuildId(), req.GetImageDigest(), req.GetDestination(); {
	case snapshot.CheckID(id) != nil:
		return nil, toWireError(sandbox.Invalidf("build id %.80q: want 1 to 64 characters of a-z, 0-9 and '-'", id))
	case !digestForm.MatchString(digest):
		return nil, toWireError(sandbox.Invalidf("image digest %.80q: want sha256: and 64 hex digits", digest))
	case to == "" || len(to) > maxSourceBytes:
		return nil, toWireError(sandbox.Invalidf("destination of %d bytes: want 1 to %d", len(to), maxSourceBytes))
	}
	g := fromWireGuest(req.GetGuest())
	r := image.PushRequest{
		Digest: req.GetImageDigest(), Destination: req.GetDestination(),
		Username: req.GetRegistryUsername(), Password: req.GetRegistryPassword(),
		Env: g.Env, User: g.User, WorkDir: g.WorkDir, StartCommand: req.GetStartCommand(), ReadyCommand: req.GetReadyCommand(),
		Resources: fromWireResources(req.GetResources()),
	}
	bd, mine := a.builds.begin(sandbox.TemplateID(req.GetTemplateId()), req.GetBuildId())
	if !mine {
		return &agentv1.PushResponse{}, nil
	}
	err := a.follow(bd, func(ctx context.Context) (built, error) {
		bd.stage("push", 0, 1)
		if err := a.images.Push(ctx, r, bd.report); err != nil {
			a.log.WarnContext(ctx, "push not successful", slog.String("build_id", bd.id), slog.String("image", r.Digest), slog.Any("err", err))
			return built{}, err
		}
		a.log.InfoContext(ctx, "push done", slog.String("build_id", bd.id), slog.String("image", r.Digest))
		return built{image: image.Image{Digest: r.Digest}, guest: g, done: "pushed to " + r.Destination}, nil
	})
	if err != nil {
		return nil, toWireError(err)
	}
	return &agentv1.PushResponse{}, nil
}
