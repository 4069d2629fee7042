package recipe

import (
	"cmp"
	"maps"
	"path"
	"regexp"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// What is in force where no step and no image says otherwise.
const (
	DefaultUser = "user"
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// Limits of one step.
const (
	maxArgs     = 512
	maxArgBytes = 1 << 20
	maxPath     = 4095
	// maxExpanded bounds what variables make of one argument, maxEnvBytes the whole environment: each step can refer to a
	// variable many times, and the next one to the result.
	maxExpanded = 128 << 10
	maxEnvBytes = 1 << 20
)

var (
	userForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}$`)
	ownForm  = regexp.MustCompile(`^([A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?$`)
	modeForm = regexp.MustCompile(`^[0-7]{1,5}$`)
	hashForm = regexp.MustCompile(`^[a-z0-9-]{1,128}$`)
)

// Check says what is wrong with a step. Errors: ErrInvalid.
func Check(s Step) error {
	total := 0
	for _, a := range s.Args {
		if total += len(a); strings.ContainsRune(a, 0) {
			return sandbox.Invalidf("%s has an argument with a zero byte", s.Type)
		}
	}
	if len(s.Args) > maxArgs || total > maxArgBytes {
		return sandbox.Invalidf("%s has %d arguments of %d bytes: at most %d of %d", s.Type, len(s.Args), total, maxArgs, maxArgBytes)
	}
	switch s.Type {
	case Run:
		return checkRun(s.Args)
	case Copy:
		return checkCopy(s)
	case Env:
		return checkEnv(s.Args)
	case WorkDir:
		if len(s.Args) != 1 || s.Args[0] == "" || len(s.Args[0]) > maxPath {
			return sandbox.Invalidf("WORKDIR requires a path argument")
		}
	case User:
		if len(s.Args) < 1 || s.Args[0] == "" {
			return sandbox.Invalidf("USER requires a username argument")
		}
	default:
		return sandbox.Invalidf("step type %.40q: want COPY, ENV, RUN, WORKDIR or USER", s.Type)
	}
	return nil
}

func checkRun(args []string) error {
	if len(args) < 1 || len(args) > 2 || strings.TrimSpace(args[0]) == "" {
		return sandbox.Invalidf("RUN requires command argument")
	}
	if len(args) == 2 && args[1] != "" && !userForm.MatchString(args[1]) {
		return badUser(args[1])
	}
	return nil
}

func checkCopy(s Step) error {
	switch {
	case len(s.Args) < 2 || len(s.Args) > 4 || s.Args[1] == "":
		return sandbox.Invalidf("COPY requires a local path and a container path argument")
	case s.FilesHash == "":
		return sandbox.Invalidf("COPY requires files hash to be set")
	case !hashForm.MatchString(s.FilesHash):
		return sandbox.Invalidf("files hash %.80q: want 1 to 128 characters of a-z, 0-9 and '-'", s.FilesHash)
	case len(s.Args[0]) > maxPath || len(s.Args[1]) > maxPath:
		return sandbox.Invalidf("COPY has a path of more than %d bytes", maxPath)
	case len(s.Args) > 2 && !ownForm.MatchString(s.Args[2]):
		return sandbox.Invalidf("owner %.80q: want user, user:group, or their numbers", s.Args[2])
	case len(s.Args) > 3 && s.Args[3] != "" && !modeForm.MatchString(s.Args[3]):
		return sandbox.Invalidf("mode %.20q: want 0 to 7777, in octal", s.Args[3])
	}
	return nil
}

func checkEnv(args []string) error {
	if len(args) == 0 {
		return sandbox.Invalidf("ENV does not support passing no arguments")
	}
	if len(args)%2 != 0 {
		return sandbox.Invalidf("ENV requires both a key and value arguments")
	}
	for i := 0; i < len(args); i += 2 {
		if args[i] == "" || strings.Contains(args[i], "=") {
			return sandbox.Invalidf("environment variable %.80q: want a name without '='", args[i])
		}
	}
	return nil
}

func badUser(name string) error {
	return sandbox.Invalidf("user %.80q: want 1 to 32 letters, digits, '_', '-' and '.'", name)
}

// After returns the settings in force after a step: what ENV, USER and WORKDIR change. The values of one ENV step see the
// variables as they were before it. Errors: those of Check, and ErrInvalid for what variables expand to.
func After(g sandbox.GuestSettings, s Step) (sandbox.GuestSettings, error) {
	if err := Check(s); err != nil {
		return g, err
	}
	switch s.Type {
	case Env:
		return afterEnv(g, s.Args)
	case WorkDir:
		dir, err := Expand(s.Args[0], g)
		if err != nil {
			return g, err
		}
		if g.WorkDir = Resolve(dir, g); len(g.WorkDir) > maxPath {
			return g, sandbox.Invalidf("WORKDIR has a path of %d bytes: want at most %d", len(g.WorkDir), maxPath)
		}
	case User:
		text, err := Expand(s.Args[0], g)
		if err != nil {
			return g, err
		}
		// A group is not kept: processes have those that the image's files say.
		name, _, _ := strings.Cut(text, ":")
		if !userForm.MatchString(name) {
			return g, badUser(name)
		}
		g.User = name
	}
	return g, nil
}

func afterEnv(g sandbox.GuestSettings, args []string) (sandbox.GuestSettings, error) {
	env := make(map[string]string, len(g.Env)+len(args)/2)
	maps.Copy(env, g.Env)
	for i := 0; i < len(args); i += 2 {
		value, err := Expand(args[i+1], g)
		if err != nil {
			return g, err
		}
		env[args[i]] = value
	}
	total := 0
	for name, value := range env {
		total += len(name) + len(value)
	}
	if total > maxEnvBytes {
		return g, sandbox.Invalidf("environment of %d bytes: want at most %d", total, maxEnvBytes)
	}
	g.Env = env
	return g, nil
}

// Resolve returns the absolute path that a relative one means below the working directory in force. A trailing slash stays.
// Without a working directory, which is then a home that only the sandbox knows, it stays relative.
func Resolve(name string, g sandbox.GuestSettings) string {
	if path.IsAbs(name) || strings.HasPrefix(name, "~") || g.WorkDir == "" {
		return name
	}
	joined := path.Join(g.WorkDir, name)
	if strings.HasSuffix(name, "/") && joined != "/" {
		joined += "/"
	}
	return joined
}

// Expand replaces variables as Docker does in ENV, WORKDIR, USER and COPY: $NAME, ${NAME}, ${NAME:-other} where it is empty,
// ${NAME:+other} where it is not; a backslash takes the next '$' or backslash literally. What is not set is empty, but for
// PATH and HOME. What is none of these stays as it is. Errors: ErrInvalid for a result that is too long.
func Expand(text string, g sandbox.GuestSettings) (string, error) {
	e := expander{g: g}
	e.text(text, 0)
	if e.out.Len() > maxExpanded {
		return "", sandbox.Invalidf("%.40q becomes longer than %d bytes", text, maxExpanded)
	}
	return e.out.String(), nil
}

// maxNesting is how deep one alternative may be in another.
const maxNesting = 8

// expander writes what a text becomes, and stops soon after that is too long.
type expander struct {
	g   sandbox.GuestSettings
	out strings.Builder
}

func (e *expander) value(name string) string {
	if v, ok := e.g.Env[name]; ok {
		return v
	}
	switch name {
	case "PATH":
		return defaultPath
	case "HOME":
		if e.g.User == "root" {
			return "/root"
		}
		return "/home/" + cmp.Or(e.g.User, DefaultUser)
	}
	return ""
}

func (e *expander) text(text string, depth int) {
	for i := 0; i < len(text) && e.out.Len() <= maxExpanded; {
		switch {
		case text[i] == '\\' && i+1 < len(text) && (text[i+1] == '$' || text[i+1] == '\\'):
			e.out.WriteByte(text[i+1])
			i += 2
		case text[i] == '$' && i+1 < len(text):
			i += 1 + e.variable(text[i+1:], depth)
		default:
			e.out.WriteByte(text[i])
			i++
		}
	}
}

// variable writes what stands for the variable that follows a '$', and returns how much of text names it.
func (e *expander) variable(text string, depth int) int {
	if text[0] != '{' {
		n := nameLength(text)
		if n == 0 {
			e.out.WriteByte('$')
			return 0
		}
		e.out.WriteString(e.value(text[:n]))
		return n
	}
	end := closing(text)
	if end < 0 || depth == maxNesting {
		e.out.WriteByte('$')
		return 0
	}
	inner := text[1:end]
	n := nameLength(inner)
	v, rest := e.value(inner[:n]), inner[n:]
	switch {
	case n > 0 && rest == "", n > 0 && strings.HasPrefix(rest, ":-") && v != "":
		e.out.WriteString(v)
	case n > 0 && strings.HasPrefix(rest, ":-"), n > 0 && strings.HasPrefix(rest, ":+") && v != "":
		e.text(rest[2:], depth+1)
	case n > 0 && strings.HasPrefix(rest, ":+"):
	default:
		e.out.WriteByte('$')
		return 0
	}
	return end + 1
}

// closing returns where the brace that text begins with is closed, or -1.
func closing(text string) int {
	open := 0
	for i := range len(text) {
		switch text[i] {
		case '{':
			open++
		case '}':
			if open--; open == 0 {
				return i
			}
		}
	}
	return -1
}

// nameLength returns how many bytes at the beginning are a variable's name.
func nameLength(text string) int {
	for i := range len(text) {
		c := text[i]
		letter := c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return i
		}
	}
	return len(text)
}
