package recipe

import (
	"cmp"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// instruction adds what one instruction of a Dockerfile means.
func (d *reader) instruction(in any, line int) error {
	switch c := in.(type) {
	case *instructions.Stage:
		return d.stage(c, line)
	case *instructions.ArgCommand:
		return d.arg(c, line)
	}
	if !d.from {
		if !d.opt.FromTemplate {
			return lineError(line, "an instruction before FROM; only ARG may stand there")
		}
		d.begin()
	}
	switch c := in.(type) {
	case *instructions.EnvCommand:
		return d.setEnv(c, line)
	case *instructions.RunCommand:
		return d.run(c, line)
	case *instructions.CopyCommand:
		return d.copy(c, line)
	case *instructions.AddCommand:
		return d.add(c, line)
	case *instructions.WorkdirCommand:
		return d.workDir(c, line)
	case *instructions.UserCommand:
		return d.setUser(c, line)
	case *instructions.ShellCommand:
		d.shell = c.Shell
	case *instructions.CmdCommand:
		d.cmd = &c.ShellDependantCmdLine
	case *instructions.EntrypointCommand:
		d.entry, d.cmd = &c.ShellDependantCmdLine, nil // as Docker does, ENTRYPOINT takes a CMD before it away
	case instructions.Command:
		d.warn(line, "%s means nothing to a template and is left out", strings.ToUpper(c.Name()))
	}
	return nil
}

func (d *reader) run(c *instructions.RunCommand, line int) error {
	if err := d.runFlags(c, line); err != nil {
		return err
	}
	command, err := d.commandLine(c.ShellDependantCmdLine, line)
	if err != nil {
		return err
	}
	if strings.TrimSpace(command) == "" {
		return lineError(line, "RUN without a command")
	}
	d.step(line, Run, d.exports()+command, "")
	return nil
}

// runFlags refuses what changes the meaning of RUN, and warns of what only makes Docker faster.
func (d *reader) runFlags(c *instructions.RunCommand, line int) error {
	if err := c.Expand(func(word string) (string, error) { return d.plain(word, line) }); err != nil {
		return lineError(line, "%v", err)
	}
	for _, m := range instructions.GetMounts(c) {
		switch m.Type {
		case instructions.MountTypeCache, instructions.MountTypeTmpfs:
			d.warn(line, "RUN --mount=type=%s is left out: the command writes to the template's own files", m.Type)
		case instructions.MountTypeBind, instructions.MountTypeSecret, instructions.MountTypeSSH:
			return lineError(line, "RUN --mount=type=%s is not possible; COPY what the command needs, and remove it in the same RUN that uses it", m.Type)
		}
	}
	if n := instructions.GetNetwork(c); n != "" && n != instructions.NetworkDefault {
		return lineError(line, "RUN --network=%s is not possible: every step runs with the network of a sandbox", n)
	}
	return nil
}

// exports makes build arguments known to a command, without a trace in what the step leaves.
func (d *reader) exports() string {
	var b strings.Builder
	for _, name := range d.declared {
		if _, hidden := d.env[name]; !hidden && !d.deferred[name] {
			b.WriteString(" " + name + "=" + quote(d.build[name]))
		}
	}
	if b.Len() == 0 {
		return ""
	}
	return "export" + b.String() + "\n"
}

// commandLine is the text that a shell runs.
func (d *reader) commandLine(c instructions.ShellDependantCmdLine, line int) (string, error) {
	if !c.PrependShell { // the exec form
		if len(c.Files) > 0 {
			return "", lineError(line, "a here-document with the exec form; write the command without [ ]")
		}
		return join(c.CmdLine), nil
	}
	command := strings.Join(c.CmdLine, " ")
	if len(c.Files) > 0 {
		command = hereDocument(command, c.Files)
	}
	if d.shell != nil && strings.TrimSpace(command) != "" {
		return join(append(slices.Clip(d.shell), command)), nil
	}
	return command, nil
}

// hereDocument puts the bodies of here-documents back behind a command. One that stands alone is the script itself, for
// the program that its first line names.
func hereDocument(command string, files []instructions.ShellInlineFile) string {
	alone := parser.MustParseHeredoc(command) != nil
	if !alone {
		var b strings.Builder
		b.WriteString(command)
		for _, f := range files {
			b.WriteString("\n" + f.Data + f.Name)
		}
		return b.String()
	}
	text := files[0].Data
	if files[0].Chomp {
		text = parser.ChompHeredocContent(text)
	}
	if !strings.HasPrefix(text, "#!") {
		return text
	}
	return `script=$(mktemp) && printf %s ` + quote(text) + ` > "$script" && chmod 755 "$script" && "$script" && rm "$script"`
}

// startCommand is what Docker would run in a container of the image.
func (d *reader) startCommand() string {
	switch {
	case d.entry != nil && d.cmd != nil && !d.entry.PrependShell && !d.cmd.PrependShell:
		return join(append(slices.Clip(d.entry.CmdLine), d.cmd.CmdLine...))
	case d.entry != nil && d.entry.PrependShell, d.entry != nil && d.cmd == nil:
		return d.start(d.entry)
	case d.entry != nil: // CMD in shell form are arguments: a shell and its command
		return join(append(slices.Clip(d.entry.CmdLine), "/bin/sh", "-c", strings.Join(d.cmd.CmdLine, " ")))
	case d.cmd != nil:
		return d.start(d.cmd)
	}
	return ""
}

func (d *reader) start(c *instructions.ShellDependantCmdLine) string {
	text, err := d.commandLine(*c, 0)
	if err != nil {
		return "" // CMD and ENTRYPOINT have no here-documents
	}
	return text
}

func (d *reader) copy(c *instructions.CopyCommand, line int) error {
	if c.From != "" {
		return lineError(line, "COPY --from=%s is not possible: a template has one stage; copy the files from the build context, or RUN what fetches them", c.From)
	}
	if c.Parents {
		return lineError(line, "COPY --parents is not possible; copy each directory to its own destination")
	}
	return d.files(copied{SourcesAndDest: c.SourcesAndDest, owner: c.Chown, mode: c.Chmod, exclude: c.ExcludePatterns, line: line})
}

func (d *reader) add(c *instructions.AddCommand, line int) error {
	for _, src := range c.SourcePaths {
		if strings.Contains(src, "://") || strings.HasPrefix(src, "git@") {
			return lineError(line, "ADD %s: nothing is fetched from the network; use RUN with curl or git in place of it", src)
		}
	}
	return d.files(copied{SourcesAndDest: c.SourcesAndDest, owner: c.Chown, mode: c.Chmod, exclude: c.ExcludePatterns, line: line, add: true})
}

// copied is a COPY or an ADD.
type copied struct {
	instructions.SourcesAndDest
	owner, mode string
	exclude     []string
	line        int
	add         bool
}

// files adds one step for each source.
func (d *reader) files(c copied) error {
	mode, err := d.permissions(c.mode, c.line)
	if err != nil {
		return err
	}
	owner, _, err := d.word(c.owner, c.line)
	if err != nil {
		return err
	}
	dest, _, err := d.word(c.DestPath, c.line)
	if err != nil {
		return err
	}
	if dest == "" {
		return lineError(c.line, "COPY to an empty destination; want a path, such as /app/")
	}
	sources, err := d.sources(c)
	if err != nil {
		return err
	}
	if len(sources) > 1 && !isDir(dest) {
		return lineError(c.line, "several sources are copied to %q: want a directory, %q", dest, dest+"/")
	}
	for _, src := range sources {
		step := Step{Type: Copy, Args: []string{literal(src.Path + src.Name), dest, owner, mode}}
		d.out.Steps = append(d.out.Steps, Planned{Step: step, Line: c.line, Source: src})
	}
	return nil
}

func (d *reader) sources(c copied) ([]*Source, error) {
	var out []*Source
	for _, word := range c.SourcePaths {
		p, err := expand(d.lex, word, d.variables(), c.line)
		if err != nil {
			return nil, err
		}
		// As with Docker, nothing leads out of the context: / and .. are its root.
		at := cmp.Or(strings.TrimPrefix(path.Clean("/"+p), "/"), ".")
		out = append(out, &Source{Path: at, Add: c.add, Exclude: c.exclude})
	}
	for _, f := range c.SourceContents {
		if f.Path == "" || strings.Contains(f.Path, "/") || isPattern(f.Path) || f.Path == "." || f.Path == ".." {
			return nil, lineError(c.line, "here-document %q: want a plain file name", f.Path)
		}
		text := f.Data
		if f.Expand {
			raw := shell.NewLex(d.escape)
			raw.RawQuotes, raw.RawEscapes = true, true
			var err error
			if text, err = expand(raw, text, d.variables(), c.line); err != nil {
				return nil, err
			}
		}
		out = append(out, &Source{Name: f.Path, Content: []byte(text)})
	}
	return out, nil
}

func isDir(dest string) bool {
	return strings.HasSuffix(dest, "/") || dest == "." || dest == ".." || strings.HasSuffix(dest, "/.") || strings.HasSuffix(dest, "/..")
}

// permissions reads --chmod into the form of a step.
func (d *reader) permissions(word string, line int) (string, error) {
	text, err := expand(d.lex, word, d.variables(), line)
	if err != nil || text == "" {
		return "", err
	}
	n, err := strconv.ParseUint(text, 8, 16)
	if err != nil || n > 0o7777 {
		return "", lineError(line, "--chmod=%s: want octal digits, such as 755", text)
	}
	out := strconv.FormatUint(n, 8)
	return strings.Repeat("0", max(4-len(out), 0)) + out, nil
}

// join writes arguments as a line that a shell reads as just these.
func join(args []string) string {
	quoted := make([]string, 0, len(args))
	for _, a := range args {
		quoted = append(quoted, quote(a))
	}
	return strings.Join(quoted, " ")
}

// quote keeps a shell from reading anything into s.
func quote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-./:=@%+,", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
