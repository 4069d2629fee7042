package e2b

import (
	"cmp"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

type templateWire struct {
	TemplateID    string     `json:"templateID"`
	BuildID       string     `json:"buildID"`
	BuildStatus   string     `json:"buildStatus"`
	BuildCount    int        `json:"buildCount"`
	Aliases       []string   `json:"aliases"`
	Names         []string   `json:"names"`
	CPUCount      int64      `json:"cpuCount"`
	MemoryMB      int64      `json:"memoryMB"`
	DiskSizeMB    int64      `json:"diskSizeMB"`
	EnvdVersion   string     `json:"envdVersion"`
	Public        bool       `json:"public"`
	SpawnCount    int64      `json:"spawnCount"`
	CreatedAt     time.Time  `json:"createdAt"`
	UpdatedAt     time.Time  `json:"updatedAt"`
	LastSpawnedAt *time.Time `json:"lastSpawnedAt"`
	CreatedBy     *struct{}  `json:"createdBy"`
}

// buildStatus is the contract's word for a template's build.
func buildStatus(b sandbox.Build) string {
	if b.State == sandbox.BuildFailed {
		return "error"
	}
	return cmp.Or(b.State, sandbox.BuildWaiting)
}

func templateToWire(t sandbox.Template) templateWire {
	b, ok := t.Tagged(sandbox.DefaultTag)
	if !ok {
		b, _ = t.Newest()
	}
	w := templateWire{
		TemplateID: string(t.ID), BuildID: b.ID, BuildStatus: buildStatus(b), Aliases: t.Names, Names: t.Names,
		CPUCount: cpus(b.Resources.MilliCPU), MemoryMB: b.Resources.MemoryBytes / mib, DiskSizeMB: b.Resources.DiskBytes / mib,
		EnvdVersion: contractVersion, Public: t.Public, CreatedAt: stamp(t.CreatedAt), UpdatedAt: stamp(t.UpdatedAt),
		BuildCount: len(t.Builds),
	}
	if w.Names == nil {
		w.Names, w.Aliases = []string{}, []string{}
	}
	return w
}

func (s *server) listTemplates(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListTemplates(r.Context())
	if err != nil {
		return err
	}
	out := make([]templateWire, 0, len(all))
	for _, t := range all {
		if t.Kind != sandbox.TemplateSnapshot { // those have a list of their own
			out = append(out, templateToWire(t))
		}
	}
	return exchange.JSON(w, http.StatusOK, out)
}

type buildWire struct {
	BuildID     string     `json:"buildID"`
	Status      string     `json:"status"`
	CPUCount    int64      `json:"cpuCount"`
	MemoryMB    int64      `json:"memoryMB"`
	DiskSizeMB  int64      `json:"diskSizeMB"`
	EnvdVersion string     `json:"envdVersion"`
	CreatedAt   time.Time  `json:"createdAt"`
	UpdatedAt   time.Time  `json:"updatedAt"`
	FinishedAt  *time.Time `json:"finishedAt,omitempty"`
}

type templateBuildsWire struct {
	TemplateID    string      `json:"templateID"`
	Aliases       []string    `json:"aliases"`
	Names         []string    `json:"names"`
	Public        bool        `json:"public"`
	SpawnCount    int64       `json:"spawnCount"`
	CreatedAt     time.Time   `json:"createdAt"`
	UpdatedAt     time.Time   `json:"updatedAt"`
	LastSpawnedAt *time.Time  `json:"lastSpawnedAt"`
	Builds        []buildWire `json:"builds"`
}

// getTemplate returns a template with the builds that are known of it.
func (s *server) getTemplate(w http.ResponseWriter, r *http.Request) error {
	t, err := s.control.GetTemplate(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	wire := templateToWire(t)
	out := templateBuildsWire{
		TemplateID: wire.TemplateID, Aliases: wire.Aliases, Names: wire.Names, Public: wire.Public,
		CreatedAt: wire.CreatedAt, UpdatedAt: wire.UpdatedAt, Builds: []buildWire{},
	}
	for _, b := range t.Builds {
		bw := buildWire{
			BuildID: b.ID, Status: buildStatus(b), CPUCount: cpus(b.Resources.MilliCPU), MemoryMB: b.Resources.MemoryBytes / mib,
			DiskSizeMB: b.Resources.DiskBytes / mib, EnvdVersion: contractVersion, CreatedAt: stamp(b.CreatedAt), UpdatedAt: stamp(b.CreatedAt),
		}
		if !b.FinishedAt.IsZero() {
			bw.UpdatedAt = stamp(b.FinishedAt)
			bw.FinishedAt = &bw.UpdatedAt
		}
		out.Builds = append(out.Builds, bw)
	}
	return exchange.JSON(w, http.StatusOK, out)
}

func (s *server) deleteTemplate(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.DeleteTemplate(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	return exchange.Empty(w)
}

// templatePart serves /templates/aliases/{alias} and /templates/{id}/tags, which no two patterns can tell apart.
func (s *server) templatePart(w http.ResponseWriter, r *http.Request) error {
	switch {
	case r.PathValue("id") == "aliases":
		return s.getAlias(w, r, r.PathValue("part"))
	case r.PathValue("part") == "tags":
		return s.listTags(w, r)
	}
	return sandbox.NotFoundf("%s %.80q is no operation", r.Method, r.URL.Path)
}

func (s *server) getAlias(w http.ResponseWriter, r *http.Request, alias string) error {
	t, err := s.control.GetTemplate(r.Context(), alias)
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, struct {
		TemplateID string `json:"templateID"`
		Public     bool   `json:"public"`
	}{string(t.ID), t.Public})
}
