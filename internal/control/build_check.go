package control

import (
	"slices"
	"strings"

	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Limits of what a build may be asked for.
const (
	maxSources     = 16
	maxSourceLen   = 4096
	maxTags        = 32
	maxTagLen      = 128
	maxSteps       = 1000
	maxStepArgs    = 1024
	maxRecipeBytes = 512 << 10
	maxHashLen     = 128
)

// checkAnnounced reads the name and the tags of a build.
func checkAnnounced(spec BuildSpec, byDefault sandbox.Resources) (Name, []string, error) {
	name, err := ParseName(spec.Name)
	if err != nil {
		return Name{}, nil, err
	}
	tags := []string{name.Tag}
	if name.Tag == sandbox.DefaultTag && len(spec.Tags) > 0 && !strings.Contains(spec.Name, ":") {
		tags = nil // tags without "default" among them leave it alone
	}
	for _, tag := range spec.Tags {
		if err := checkTag(tag); err != nil {
			return Name{}, nil, err
		}
		if !slices.Contains(tags, tag) {
			tags = append(tags, tag)
		}
	}
	if len(tags) > maxTags {
		return Name{}, nil, sandbox.Invalidf("template %q: %d tags: want at most %d", name, len(tags), maxTags)
	}
	return name, tags, checkResources(orElse(spec.Resources, byDefault))
}

func checkTag(tag string) error {
	if len(tag) > maxTagLen || !tagPart.MatchString(tag) {
		return sandbox.Invalidf("tag %.80q: want 1 to %d letters, digits, '.', '_' and '-', the first no '.' or '-'", tag, maxTagLen)
	}
	return nil
}

// checkRecipe refuses what no node can build from.
func checkRecipe(r Recipe) error {
	switch {
	case r.FromTemplate != "" && len(r.Sources) > 0:
		return sandbox.Invalidf("sources and a template to build from: want one of the two")
	case r.FromTemplate == "" && (len(r.Sources) == 0 || len(r.Sources) > maxSources):
		return sandbox.Invalidf("%d sources: want 1 to %d, as in debian:bookworm", len(r.Sources), maxSources)
	case len(r.Steps) > maxSteps:
		return sandbox.Invalidf("%d steps: want at most %d", len(r.Steps), maxSteps)
	}
	for _, s := range r.Sources {
		if s == "" || len(s) > maxSourceLen || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' }) {
			return sandbox.Invalidf("source %.80q: want an image reference, oci:PATH, docker-archive:PATH, dir:PATH or debian:SUITE", s)
		}
	}
	total := len(r.StartCommand) + len(r.ReadyCommand)
	for i, s := range r.Steps {
		if err := checkStep(i+1, s); err != nil {
			return err
		}
		for _, a := range s.Args {
			total += len(a)
		}
	}
	if total > maxRecipeBytes {
		return sandbox.Invalidf("the steps and commands have %d bytes in all: want at most %d", total, maxRecipeBytes)
	}
	return nil
}

func checkStep(n int, s recipe.Step) error {
	least := map[string]int{recipe.Copy: 2, recipe.Env: 2, recipe.Run: 1, recipe.WorkDir: 1, recipe.User: 1}
	want, known := least[s.Type]
	switch {
	case !known:
		return sandbox.Unsupportedf("step %d: type %.40q: want COPY, ENV, RUN, WORKDIR or USER", n, s.Type)
	case len(s.Args) < want:
		return sandbox.Invalidf("step %d: %s with %d arguments: want at least %d", n, s.Type, len(s.Args), want)
	case len(s.Args) > maxStepArgs:
		return sandbox.Invalidf("step %d: %s with %d arguments: want at most %d", n, s.Type, len(s.Args), maxStepArgs)
	case s.Type == recipe.Env && len(s.Args)%2 != 0:
		return sandbox.Invalidf("step %d: ENV with %d arguments: want pairs of name and value", n, len(s.Args))
	case s.Type == recipe.Copy && !validHash(s.FilesHash):
		return sandbox.Invalidf("step %d: COPY with the files hash %.80q: want 1 to %d of a-z, 0-9 and '-'", n, s.FilesHash, maxHashLen)
	}
	if slices.ContainsFunc(s.Args, func(a string) bool { return strings.Contains(a, "\x00") }) {
		return sandbox.Invalidf("step %d: %s: an argument holds a NUL", n, s.Type)
	}
	return nil
}

// validHash reports whether s can name an uploaded archive.
func validHash(s string) bool {
	return s != "" && len(s) <= maxHashLen && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	})
}
