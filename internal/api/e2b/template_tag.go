package e2b

import (
	"cmp"
	"net/http"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

type tagWire struct {
	Tag       string    `json:"tag"`
	BuildID   string    `json:"buildID"`
	CreatedAt time.Time `json:"createdAt"`
}

func (s *server) listTags(w http.ResponseWriter, r *http.Request) error {
	t, err := s.control.GetTemplate(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	out := make([]tagWire, 0, len(t.Tags))
	for name, tag := range t.Tags {
		out = append(out, tagWire{Tag: name, BuildID: tag.BuildID, CreatedAt: stamp(tag.At)})
	}
	slices.SortFunc(out, func(a, b tagWire) int { // the newest first
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.Tag, b.Tag))
	})
	return exchange.JSON(w, http.StatusOK, out)
}

func (s *server) assignTags(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Target string   `json:"target"`
		Tags   []string `json:"tags"`
	}
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	if body.Target == "" {
		return sandbox.Invalidf("target is missing: want the name of a template with a tag, as in my-template:v1")
	}
	_, b, err := s.control.AssignTags(r.Context(), body.Target, body.Tags)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusCreated, struct {
		BuildID string   `json:"buildID"`
		Tags    []string `json:"tags"`
	}{b.ID, body.Tags})
}

func (s *server) removeTags(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	if body.Name == "" {
		return sandbox.Invalidf("name is missing: want the name of a template, as in my-template")
	}
	if err := s.control.RemoveTags(r.Context(), body.Name, body.Tags); err != nil {
		return err
	}
	return exchange.Empty(w)
}

// updateTemplate publishes a template, or takes that back.
func (s *server) updateTemplate(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Public *bool `json:"public"`
	}
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	t, err := s.control.GetTemplate(r.Context(), r.PathValue("id"))
	if err == nil && body.Public != nil {
		t, err = s.control.SetPublic(r.Context(), r.PathValue("id"), *body.Public)
	}
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, map[string][]string{"names": texts(t.Names)})
}
