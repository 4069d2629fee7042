package v1

import (
	"math"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) listTemplates(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListTemplates(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, templateToWire))
}

func (s *server) getTemplate(w http.ResponseWriter, r *http.Request) error {
	t, err := s.control.GetTemplate(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, templateToWire(t))
}

func (s *server) buildTemplate(w http.ResponseWriter, r *http.Request) error {
	var body client.CreateTemplate
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	t, b, err := s.control.BuildTemplate(r.Context(), control.BuildSpec{
		Name: body.Name, Tags: body.Tags, Resources: sandbox.Resources(body.Resources),
		Recipe: control.Recipe{
			Sources: body.Sources, FromTemplate: body.FromTemplate, RegistryUsername: body.Username, RegistryPassword: body.Password,
			Steps: each(body.Steps, stepFromWire), StartCommand: body.StartCommand, ReadyCommand: body.ReadyCommand, Force: body.Force,
		},
	})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusAccepted, client.StartedBuild{TemplateID: string(t.ID), BuildID: b.ID})
}

func (s *server) deleteTemplate(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.DeleteTemplate(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	return exchange.Empty(w)
}

// maxWait is how long a request waits for news of a build, in seconds.
const maxWait = 60

// getBuild answers at once where the build has entries beyond offset or is done, and otherwise after wait seconds.
func (s *server) getBuild(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	offset, err := exchange.Int(values, "offset", 0, math.MaxInt32, 0)
	if err != nil {
		return err
	}
	wait, err := exchange.Int(values, "wait", 0, maxWait, 0)
	if err != nil {
		return err
	}
	b, err := s.control.GetBuild(r.Context(), control.BuildQuery{
		ID: r.PathValue("id"), Offset: int32(offset), Wait: time.Duration(wait) * time.Second, //nolint:gosec // bounded above
	})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, buildToWire(b))
}
