package recipe

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// MaxDockerfile bounds the text of a Dockerfile, in bytes.
const MaxDockerfile = 1 << 20

// Dockerfile is what a Dockerfile asks for, as a recipe.
type Dockerfile struct {
	// Image is what FROM names; empty where FromTemplate stands in its place.
	Image string
	Steps []Planned
	// StartCommand is that of ENTRYPOINT and CMD, for a shell; empty where there is neither.
	StartCommand string
	// Warnings say what the Dockerfile has that means nothing here, each with its line.
	Warnings []string
}

// Planned is a step of a Dockerfile. That of a COPY has no FilesHash yet: Context.Select says what its files are.
type Planned struct {
	Step
	// Line is where it stands, from 1 on; 0 for a step that Cloister adds.
	Line int
	// Source is what a COPY takes; nil for other steps.
	Source *Source
}

// Source is what a COPY or ADD takes from the build context, or brings itself.
type Source struct {
	// Path is a file, a directory or a pattern below the context's root, in the form of path.Match.
	Path string
	// Add refuses archives, which ADD would unpack.
	Add bool
	// Exclude are patterns, as in .dockerignore, of what is left out; they are relative to the context's root.
	Exclude []string
	// Name and Content are a file that the Dockerfile itself holds; Path is empty then.
	Name    string
	Content []byte
}

// Options are what a Dockerfile is read with.
type Options struct {
	// Args are the values of ARG, by name.
	Args map[string]string
	// FromTemplate says that a template is used in place of the image that FROM names, which may be missing then.
	FromTemplate bool
}

// ParseDockerfile reads a Dockerfile. As with E2B's own reader, its steps begin as root in /, and what it makes runs as
// "user" in /home/user unless it says otherwise. Errors are ErrInvalid and name the line.
func ParseDockerfile(text []byte, opt Options) (*Dockerfile, error) {
	if len(text) > MaxDockerfile {
		return nil, sandbox.Invalidf("Dockerfile of %d bytes: want at most %d", len(text), MaxDockerfile)
	}
	if bytes.IndexByte(text, 0) >= 0 {
		return nil, lineError(0, "a zero byte in it; want text")
	}
	if opt.FromTemplate && len(bytes.TrimSpace(text)) == 0 {
		return newReader(opt, parser.DefaultEscapeToken).finish()
	}
	ast, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return nil, located(err)
	}
	d := newReader(opt, ast.EscapeToken)
	for _, w := range ast.Warnings {
		d.warn(lineOf(ranges(w.Location)), "%s", w.Short)
	}
	for _, node := range ast.AST.Children {
		in, err := instructions.ParseInstruction(node)
		if err != nil {
			return nil, located(err)
		}
		if err := d.instruction(in, node.StartLine); err != nil {
			return nil, err
		}
	}
	return d.finish()
}

// ranges is a location that may be missing.
func ranges(at *parser.Range) []parser.Range {
	if at == nil {
		return nil
	}
	return []parser.Range{*at}
}

func lineOf(at []parser.Range) int {
	if len(at) == 0 {
		return 0
	}
	return at[0].Start.Line
}

// located turns an error of the parser into ours.
func located(err error) error {
	line := 0
	if at, ok := errors.AsType[*parser.LocationError](err); ok && len(at.Locations) > 0 {
		line = lineOf(at.Locations[0])
	}
	return lineError(line, "%v", err)
}

func lineError(line int, format string, args ...any) error {
	if line == 0 {
		return sandbox.Invalidf("Dockerfile: %s", fmt.Sprintf(format, args...))
	}
	return sandbox.Invalidf("Dockerfile, line %d: %s", line, fmt.Sprintf(format, args...))
}

// reader collects what the instructions read so far mean.
type reader struct {
	opt Options
	out Dockerfile
	lex *shell.Lex
	// escape is the escape character that the Dockerfile chose.
	escape rune
	from   bool
	// outer are the ARGs before FROM; build those after it, in order of declaration; env what ENV set.
	outer, build, env map[string]string
	// deferred are names whose ENV refers to what the image sets: only the sandbox knows their values.
	deferred   map[string]bool
	declared   []string
	used       map[string]bool
	shell      []string // of SHELL; nil for the default
	user, dir  bool
	entry, cmd *instructions.ShellDependantCmdLine
}

func newReader(opt Options, escape rune) *reader {
	return &reader{
		opt: opt, lex: shell.NewLex(escape), escape: escape, outer: platform(),
		build: map[string]string{}, env: map[string]string{}, deferred: map[string]bool{}, used: map[string]bool{},
	}
}

// platform is what Docker defines for ARG before FROM: sandboxes run on the architecture that builds them.
func platform() map[string]string {
	arch := runtime.GOARCH
	return map[string]string{
		"TARGETPLATFORM": "linux/" + arch, "TARGETOS": "linux", "TARGETARCH": arch, "TARGETVARIANT": "",
		"BUILDPLATFORM": "linux/" + arch, "BUILDOS": "linux", "BUILDARCH": arch, "BUILDVARIANT": "",
	}
}

func (d *reader) warn(line int, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if line > 0 {
		text = fmt.Sprintf("line %d: %s", line, text)
	}
	d.out.Warnings = append(d.out.Warnings, text)
}

func (d *reader) step(line int, kind string, args ...string) {
	d.out.Steps = append(d.out.Steps, Planned{Step: Step{Type: kind, Args: args}, Line: line})
}

// finish adds what follows the last instruction.
func (d *reader) finish() (*Dockerfile, error) {
	if !d.from {
		if !d.opt.FromTemplate {
			return nil, lineError(0, "no FROM; begin with one, such as FROM debian:trixie, or name a template to build on")
		}
		d.begin()
	}
	if !d.user {
		d.step(0, User, "user")
	}
	if !d.dir {
		d.step(0, WorkDir, "/home/user")
	}
	for _, name := range slices.Sorted(maps.Keys(d.opt.Args)) {
		if !d.used[name] {
			d.warn(0, "build argument %s is not declared by an ARG", name)
		}
	}
	d.out.StartCommand = d.startCommand()
	return &d.out, nil
}

// begin is the state that the steps start in.
func (d *reader) begin() {
	d.from = true
	d.step(0, User, "root")
	d.step(0, WorkDir, "/")
}

func (d *reader) stage(s *instructions.Stage, line int) error {
	if d.from && (len(d.out.Steps) > 2 || d.out.Image != "") {
		return lineError(line, "a second FROM: builds of several stages are not possible; build the first stage as a template or image of its own and begin with that")
	}
	if d.opt.FromTemplate {
		d.warn(line, "FROM %s does not count: a template to build on was named", s.BaseName)
		d.begin()
		return nil
	}
	if s.Platform != "" {
		d.warn(line, "--platform does not count: the image is taken for the machine's own architecture")
	}
	image, err := expand(d.lex, s.BaseName, d.outer, line)
	if err != nil {
		return err
	}
	if image == "" || strings.EqualFold(image, "scratch") {
		return lineError(line, "FROM %q: want an image with a shell, such as debian:trixie", image)
	}
	d.out.Image = image
	d.begin()
	return nil
}

// variables is what a word after FROM is expanded with: ENV goes before ARG.
func (d *reader) variables() map[string]string {
	all := maps.Clone(d.build)
	maps.Copy(all, d.env)
	for name := range d.deferred {
		delete(all, name)
	}
	return all
}

// expand replaces variables in what is needed before there is a sandbox. A name that nothing set is a mistake then.
func expand(lex *shell.Lex, word string, vars map[string]string, line int) (string, error) {
	out, unset, err := lex.ProcessWord(word, getter(vars))
	if err != nil {
		return "", lineError(line, "%.200q: %v", word, err)
	}
	for _, name := range slices.Sorted(maps.Keys(unset)) {
		if !hasOther(word, name) {
			return "", lineError(line, "%.200q: %s is not set by an ARG or ENV before it; what the base image sets is not known here", word, name)
		}
	}
	return out, nil
}

// hasOther reports whether a word says what else it means where the variable is not set, as in ${name:-other}.
func hasOther(word, name string) bool {
	_, rest, found := strings.Cut(word, "${"+name)
	return found && !strings.HasPrefix(rest, "}")
}

// word replaces variables in the argument of a step. One that nothing set may be set by the image: the reference to it stays
// for Expand, from which all else is kept by backslashes. Deferred says that there is such a reference.
func (d *reader) word(word string, line int) (out string, deferred bool, err error) {
	vars := d.variables()
	out, unset, err := d.lex.ProcessWord(word, getter(vars))
	if err != nil {
		return "", false, lineError(line, "%.200q: %v", word, err)
	}
	// A zero byte, which no Dockerfile has, tells a reference from a plain dollar sign.
	for name := range unset {
		if !hasOther(word, name) {
			vars[name], deferred = "\x00"+name+"\x01", true
		}
	}
	if deferred {
		if out, _, err = d.lex.ProcessWord(word, getter(vars)); err != nil {
			return "", false, lineError(line, "%.200q: %v", word, err)
		}
	}
	return strings.NewReplacer("\x00", "${", "\x01", "}", `\`, `\\`, "$", `\$`).Replace(out), deferred, nil
}

// literal keeps Expand from seeing variables in s.
func literal(s string) string { return strings.NewReplacer(`\`, `\\`, "$", `\$`).Replace(s) }

type getter map[string]string

func (g getter) Get(name string) (string, bool) { v, ok := g[name]; return v, ok }
func (g getter) Keys() []string                 { return slices.Collect(maps.Keys(g)) }

func (d *reader) arg(c *instructions.ArgCommand, line int) error {
	vars, into := d.variables(), d.build
	if !d.from {
		vars, into = d.outer, d.outer
	}
	for _, a := range c.Args {
		value, set := d.opt.Args[a.Key]
		d.used[a.Key] = true
		switch {
		case set:
		case a.Value != nil:
			var err error
			if value, err = expand(d.lex, *a.Value, vars, line); err != nil {
				return err
			}
			set = true
		case d.from:
			value, set = d.outer[a.Key]
		}
		if !set {
			continue
		}
		into[a.Key], vars[a.Key] = value, value
		if d.from && !slices.Contains(d.declared, a.Key) {
			d.declared = append(d.declared, a.Key)
		}
	}
	return nil
}

func (d *reader) setEnv(c *instructions.EnvCommand, line int) error {
	var args []string
	set, deferred := map[string]string{}, map[string]bool{}
	for _, kv := range c.Env { // each sees the variables as they were before the line
		name, err := expand(d.lex, kv.Key, d.variables(), line)
		if err != nil {
			return err
		}
		value, later, err := d.word(kv.Value, line)
		if err != nil {
			return err
		}
		args, deferred[name] = append(args, name, value), later
		if set[name], err = d.plain(kv.Value, line); err != nil {
			return err
		}
	}
	for name, later := range deferred {
		delete(d.env, name)
		delete(d.deferred, name)
		if later {
			d.deferred[name] = true
		} else {
			d.env[name] = set[name]
		}
	}
	d.step(line, Env, args...)
	return nil
}

// plain is a word with what is set here, and nothing for what is not.
func (d *reader) plain(word string, line int) (string, error) {
	out, _, err := d.lex.ProcessWord(word, getter(d.variables()))
	if err != nil {
		return "", lineError(line, "%.200q: %v", word, err)
	}
	return out, nil
}

func (d *reader) workDir(c *instructions.WorkdirCommand, line int) error {
	dir, _, err := d.word(c.Path, line)
	if err != nil {
		return err
	}
	if dir == "" {
		return lineError(line, "WORKDIR %q: want a directory", c.Path)
	}
	d.dir = true
	d.step(line, WorkDir, dir)
	return nil
}

func (d *reader) setUser(c *instructions.UserCommand, line int) error {
	name, _, err := d.word(c.User, line)
	if err != nil {
		return err
	}
	if name == "" {
		return lineError(line, "USER %q: want a name or number", c.User)
	}
	d.user = true
	d.step(line, User, name)
	return nil
}
