package e2b

import (
	"cmp"
	"net/http"
	"slices"
	"strings"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Limits of the contract.
const (
	minTemplateCPU    = 1
	minTemplateMemory = 128 // MiB
	maxTemplateSize   = 1 << 30
)

// newTemplate is the body that asks for a build.
type newTemplate struct {
	Name          string   `json:"name"`
	Alias         string   `json:"alias"`
	Tags          []string `json:"tags"`
	CPUCount      *int64   `json:"cpuCount"`
	MemoryMB      *int64   `json:"memoryMB"`
	MinFreeDiskMb *int64   `json:"minFreeDiskMb"`
}

type requestedWire struct {
	TemplateID string   `json:"templateID"`
	BuildID    string   `json:"buildID"`
	Public     bool     `json:"public"`
	Names      []string `json:"names"`
	Aliases    []string `json:"aliases"`
	Tags       []string `json:"tags"`
}

// requestBuild announces a build; its steps come with startBuild.
func (s *server) requestBuild(w http.ResponseWriter, r *http.Request) error {
	var body newTemplate
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	name := cmp.Or(body.Name, body.Alias)
	if name == "" {
		return sandbox.Invalidf("name is missing: want the template's name, as in my-template or my-template:v1")
	}
	size, err := body.resources()
	if err != nil {
		return err
	}
	t, b, err := s.control.AnnounceBuild(r.Context(), control.BuildSpec{Name: name, Tags: body.Tags, Resources: size})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusAccepted, requestedWire{
		TemplateID: string(t.ID), BuildID: b.ID, Public: t.Public, Names: texts(t.Names), Aliases: texts(t.Names), Tags: texts(b.Tags),
	})
}

// texts is a list that is never null.
func texts(in []string) []string {
	if in == nil {
		return []string{}
	}
	return in
}

// resources reads the size of a template's sandboxes. The disk is what is free for the sandbox: an image takes none of it.
func (n *newTemplate) resources() (sandbox.Resources, error) {
	var r sandbox.Resources
	if v := n.CPUCount; v != nil {
		if *v < minTemplateCPU || *v > maxTemplateSize {
			return r, sandbox.Invalidf("cpuCount %d: want a whole number of cores from %d on", *v, minTemplateCPU)
		}
		r.MilliCPU = *v * 1000
	}
	if v := n.MemoryMB; v != nil {
		if *v < minTemplateMemory || *v > maxTemplateSize || *v%2 != 0 {
			return r, sandbox.Invalidf("memoryMB %d: want an even number from %d on", *v, minTemplateMemory)
		}
		r.MemoryBytes = *v * mib
	}
	if v := n.MinFreeDiskMb; v != nil {
		if *v < 0 || *v > maxTemplateSize {
			return r, sandbox.Invalidf("minFreeDiskMb %d: want 0 to %d", *v, maxTemplateSize)
		}
		r.DiskBytes = max(*v, minTemplateMemory) * mib
	}
	return r, nil
}

// startedBuild is the body that starts a build.
type startedBuild struct {
	FromImage         string         `json:"fromImage"`
	FromTemplate      string         `json:"fromTemplate"`
	FromImageRegistry *registryWire  `json:"fromImageRegistry"`
	Steps             []templateStep `json:"steps"`
	StartCmd          string         `json:"startCmd"`
	ReadyCmd          string         `json:"readyCmd"`
	Force             bool           `json:"force"`
}

type templateStep struct {
	Type      string   `json:"type"`
	Args      []string `json:"args"`
	FilesHash string   `json:"filesHash"`
	Force     bool     `json:"force"`
}

// registryWire is one of three forms; those of clouds stand for a login that only their own tools can make.
type registryWire struct {
	Type               string `json:"type"`
	Username           string `json:"username"`
	Password           string `json:"password"`
	ServiceAccountJSON string `json:"serviceAccountJson"`
}

// startBuild starts a build that was announced.
func (s *server) startBuild(w http.ResponseWriter, r *http.Request) error {
	var body startedBuild
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	how, err := body.recipe()
	if err != nil {
		return err
	}
	if _, _, err := s.control.StartBuild(r.Context(), r.PathValue("id"), r.PathValue("build"), how); err != nil {
		return err
	}
	w.Header().Set("Content-Length", "0") // a chunked answer makes clients fail
	w.WriteHeader(http.StatusAccepted)
	return nil
}

func (b *startedBuild) recipe() (control.Recipe, error) {
	out := control.Recipe{FromTemplate: b.FromTemplate, StartCommand: b.StartCmd, ReadyCommand: b.ReadyCmd, Force: b.Force}
	if (b.FromImage == "") == (b.FromTemplate == "") {
		return out, sandbox.Invalidf("fromImage %.80q and fromTemplate %.80q: want one of the two", b.FromImage, b.FromTemplate)
	}
	for _, s := range b.Steps {
		out.Steps = append(out.Steps, recipe.Step(s))
	}
	if b.FromImage == "" {
		return out, nil
	}
	if err := b.registry(&out); err != nil {
		return out, err
	}
	// The prefix keeps a client from naming a file of the server's.
	out.Sources = []string{"docker://" + b.FromImage}
	if b.FromImageRegistry == nil {
		if suite, ok := debianSuite(b.FromImage); ok {
			out.Sources = append(out.Sources, "debian:"+suite)
		}
		if isDefaultBase(b.FromImage) {
			out.Substitute = control.DefaultTemplate
		}
	}
	return out, nil
}

// registry reads the login of the image's registry.
func (b *startedBuild) registry(out *control.Recipe) error {
	login := b.FromImageRegistry
	if login == nil {
		return nil
	}
	switch login.Type {
	case "registry":
		if login.Username == "" || login.Password == "" {
			return sandbox.Invalidf("fromImageRegistry of type registry: want a username and a password")
		}
		out.RegistryUsername, out.RegistryPassword = login.Username, login.Password
	case "gcp":
		if login.ServiceAccountJSON == "" {
			return sandbox.Invalidf("fromImageRegistry of type gcp: serviceAccountJson is missing")
		}
		out.RegistryUsername, out.RegistryPassword = "_json_key", login.ServiceAccountJSON
	case "aws":
		return sandbox.Unsupportedf("fromImageRegistry of type aws is not supported: use type registry with the username AWS and " +
			"the password that `aws ecr get-login-password` prints")
	default:
		return sandbox.Invalidf("fromImageRegistry type %.40q: want registry, gcp or aws", login.Type)
	}
	return nil
}

// isDefaultBase reports whether an image is the one that templates of clients start from where they name none.
func isDefaultBase(image string) bool {
	name := strings.TrimPrefix(image, "docker.io/")
	return name == "e2bdev/base" || name == "e2bdev/base:latest"
}

// debianSuite returns the suite that an official Debian image holds, so that one can be made where no registry answers.
func debianSuite(image string) (string, bool) {
	name := strings.TrimPrefix(strings.TrimPrefix(image, "docker.io/"), "library/")
	base, tag, tagged := strings.Cut(name, ":")
	if base != "debian" {
		return "", false
	}
	if !tagged || tag == "latest" {
		return "stable", true
	}
	suite := strings.TrimSuffix(tag, "-slim")
	if named, ok := map[string]string{"11": "bullseye", "12": "bookworm", "13": "trixie"}[suite]; ok {
		return named, true
	}
	return suite, slices.Contains([]string{"stable", "oldstable", "testing", "sid", "bullseye", "bookworm", "trixie"}, suite)
}
