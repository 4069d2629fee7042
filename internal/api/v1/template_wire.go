package v1

import (
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func templateToWire(t sandbox.Template) client.Template {
	w := client.Template{
		ID: string(t.ID), Kind: string(t.Kind), Names: t.Names, Public: t.Public, Tags: make(map[string]client.Tag, len(t.Tags)),
		Builds: each(t.Builds, templateBuildToWire), SourceSandbox: string(t.SourceSandbox),
		Placement: control.PlacementText(t.Placement), NodeSelector: t.NodeSelector, NodeAffinity: t.NodeAffinity, Tolerations: t.Tolerations,
		IdleTimeout: t.IdleTimeout,
		CreatedAt:   t.CreatedAt, UpdatedAt: t.UpdatedAt,
	}
	if w.Names == nil {
		w.Names = []string{}
	}
	for name, tag := range t.Tags {
		w.Tags[name] = client.Tag(tag)
	}
	return w
}

func templateBuildToWire(b sandbox.Build) client.TemplateBuild {
	return client.TemplateBuild{
		ID: b.ID, State: b.State, Error: b.Error, FailedStep: b.FailedStep, ImageDigest: b.ImageDigest, ImageBytes: b.ImageBytes,
		Checkpoint: string(b.Checkpoint), CheckpointBytes: b.CheckpointBytes, Resources: resourcesToWire(b.Resources),
		Guest: client.GuestSettings(b.Guest), StartCommand: b.StartCommand, ReadyCommand: b.ReadyCommand, Source: b.Source,
		CreatedAt: b.CreatedAt, FinishedAt: b.FinishedAt,
	}
}

func buildToWire(b control.Build) client.Build {
	w := client.Build{
		ID: b.ID, TemplateID: string(b.TemplateID), State: b.State, Step: b.Step, Progress: b.Progress,
		Entries: each(b.Entries, logToWire), Error: b.Error, FailedStep: b.FailedStep,
	}
	if b.State == sandbox.BuildReady {
		made := templateBuildToWire(b.Result)
		w.Result = &made
	}
	return w
}

func stepFromWire(s client.BuildStep) recipe.Step { return recipe.Step(s) }
