package v1

import (
	"cmp"
	"errors"
	"math"
	"net/http"
	"strings"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) updateTemplate(w http.ResponseWriter, r *http.Request) error {
	var body client.UpdateTemplate
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	t, err := s.control.ChangeTemplate(r.Context(), r.PathValue("id"), control.TemplateChange(body))
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, templateToWire(t))
}

func (s *server) setTags(w http.ResponseWriter, r *http.Request) error {
	var body client.SetTags
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	name := r.PathValue("id")
	if strings.Contains(name, ":") {
		return sandbox.Invalidf("template %.80q: want a name without a tag, and the tag in from", name)
	}
	t, _, err := s.control.AssignTags(r.Context(), name+":"+cmp.Or(body.From, sandbox.DefaultTag), body.Tags)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, templateToWire(t))
}

func (s *server) removeTag(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.RemoveTags(r.Context(), r.PathValue("id"), []string{r.PathValue("tag")}); err != nil {
		return err
	}
	return exchange.Empty(w)
}

func (s *server) pushTemplate(w http.ResponseWriter, r *http.Request) error {
	var body client.PushTemplate
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	t, id, err := s.control.PushTemplate(r.Context(), control.PushRequest{
		Template: r.PathValue("id"), Destination: body.Destination, RegistryUsername: body.Username, RegistryPassword: body.Password,
	})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusAccepted, client.StartedBuild{TemplateID: string(t.ID), BuildID: id})
}

func (s *server) cancelBuild(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.CancelBuild(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	return exchange.Empty(w)
}

func (s *server) getFile(w http.ResponseWriter, r *http.Request) error {
	up, err := s.control.GetUpload(r.Context(), r.PathValue("hash"))
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, client.Upload(up))
}

// putFile takes a part of a file. A full disk has a status of its own, since trying again does not help.
func (s *server) putFile(w http.ResponseWriter, r *http.Request) error {
	values, err := exchange.Query(r)
	if err != nil {
		return err
	}
	offset, err := exchange.Int(values, "offset", 0, math.MaxInt64/2, 0)
	if err != nil {
		return err
	}
	complete, err := boolOf(values.Get("complete"))
	if err != nil {
		return err
	}
	up, err := s.control.AppendUpload(r.Context(), control.UploadPart{
		Hash: r.PathValue("hash"), Offset: offset, Size: r.ContentLength, Body: exchange.SlowBody(w, r), Complete: complete,
	})
	if errors.Is(err, control.ErrNoSpace) {
		exchange.FailWith(w, http.StatusInsufficientStorage, err.Error())
		return nil
	}
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, client.Upload(up))
}

func boolOf(text string) (bool, error) {
	switch text {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	}
	return false, sandbox.Invalidf("complete %.40q: want true or false", text)
}
