package recipe

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// lines writes the steps of a Dockerfile one by line: TYPE|argument|argument.
func lines(d *Dockerfile) string {
	var b strings.Builder
	for _, s := range d.Steps {
		b.WriteString(s.Type + "|" + strings.Join(s.Args, "|") + "\n")
	}
	return b.String()
}

const (
	root = "USER|root\nWORKDIR|/\n"
	user = "USER|user\nWORKDIR|/home/user\n"
)

func TestParseDockerfile(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		args       map[string]string
		image      string
		steps      string // without those that Cloister adds
		start      string
		warns      string // what the warnings hold, in order, separated by |
	}{
		{name: "smallest", text: "FROM debian:trixie", image: "debian:trixie"},
		{name: "stage name", text: "from python:3.13 AS app\n", image: "python:3.13"},
		{
			name: "run", text: "FROM a\nRUN apt-get update && \\\n  apt-get install -y curl\n", image: "a",
			steps: "RUN|apt-get update &&   apt-get install -y curl|\n",
		},
		{name: "run, exec form", text: "FROM a\nRUN [\"echo\", \"a b\", \"it's\"]\n", image: "a", steps: "RUN|echo 'a b' 'it'\\''s'|\n"},
		{name: "run keeps its variables", text: "FROM a\nENV X=1\nRUN echo $X ${Y}\n", image: "a", steps: "ENV|X|1\nRUN|echo $X ${Y}|\n"},
		{name: "here-document", text: "FROM a\nRUN <<EOF\necho a\necho b\nEOF\n", image: "a", steps: "RUN|echo a\necho b\n|\n"},
		{
			name: "here-document for a program", text: "FROM a\nRUN python3 <<EOF\nprint(1)\nEOF\n", image: "a",
			steps: "RUN|python3 <<EOF\nprint(1)\nEOF|\n",
		},
		{
			name: "here-document that names its program", text: "FROM a\nRUN <<EOF\n#!/bin/sed -f\nit's\nEOF\n", image: "a",
			steps: "RUN|script=$(mktemp) && printf %s '#!/bin/sed -f\nit'\\''s\n' > \"$script\" && chmod 755 \"$script\" && \"$script\" && rm \"$script\"|\n",
		},
		{
			name: "shell", text: "FROM a\nSHELL [\"/bin/bash\", \"-o\", \"pipefail\", \"-c\"]\nRUN a | b\n", image: "a",
			steps: "RUN|/bin/bash -o pipefail -c 'a | b'|\n",
		},
		{name: "cache mounts", text: "FROM a\nRUN --mount=type=cache,target=/c pip install x\n", image: "a", steps: "RUN|pip install x|\n", warns: "type=cache is left out"},
		{
			name: "env", text: "FROM a\nENV A=1 B=\"two words\"\nENV C three four\nENV A=2 D=$A\n", image: "a",
			steps: "ENV|A|1|B|two words\nENV|C|three four\nENV|A|2|D|1\n",
		},
		{name: "env of the image", text: "FROM a\nENV PATH=/opt/bin:$PATH X=${X:-y}\nENV Q=$PATH\nWORKDIR $HOME/a\n", image: "a", steps: "ENV|PATH|/opt/bin:${PATH}|X|y\nENV|Q|${PATH}\nWORKDIR|${HOME}/a\n"},
		{
			name: "dollar signs", text: "FROM a\nARG A='x\\y$'\nENV B='$b' C=\\$c D=$A\nCOPY '$x' /$B/$A\n", image: "a",
			steps: "ENV|B|\\$b|C|\\$c|D|x\\\\y\\$\nCOPY|\\$x|/\\$b/x\\\\y\\$||\n",
		},
		{
			name: "arg", text: "ARG V=3.12\nFROM python:${V}-slim\nARG V\nARG W=$V-w\nARG U\nENV V2=$V\nRUN echo $W\n", image: "python:3.12-slim",
			steps: "ENV|V2|3.12\nRUN|export V=3.12 W=3.12-w\necho $W|\n",
		},
		{
			name: "given arg", text: "ARG V=3.12\nFROM python:${V}\nARG V\nENV V=$V\nRUN true\n", args: map[string]string{"V": "3.13", "Z": "1"},
			image: "python:3.13", steps: "ENV|V|3.13\nRUN|true|\n", warns: "build argument Z is not declared",
		},
		{name: "arg with a default in place", text: "FROM a\nARG D\nWORKDIR /${D:-app-x}\n", image: "a", steps: "WORKDIR|/app-x\n"},
		{
			name: "copy", text: "FROM a\nENV D=app\nCOPY --chown=1000:www --chmod=755 src ../x/y.txt /$D/\n", image: "a",
			steps: "ENV|D|app\nCOPY|src|/app/|1000:www|0755\nCOPY|x/y.txt|/app/|1000:www|0755\n",
		},
		{name: "copy, exec form", text: "FROM a\nCOPY [\"a b\", \"/c d\"]\n", image: "a", steps: "COPY|a b|/c d||\n"},
		{name: "copy all", text: "FROM a\nCOPY . .\n", image: "a", steps: "COPY|.|.||\n"},
		{
			name: "copy a here-document", text: "FROM a\nENV P=80\nCOPY <<EOF <<'RAW' /etc/x/\nport \"$P\"\nEOF\nport $P\nRAW\n", image: "a",
			steps: "ENV|P|80\nCOPY|EOF|/etc/x/||\nCOPY|RAW|/etc/x/||\n",
		},
		{name: "add", text: "FROM a\nADD --link x.txt /x/\n", image: "a", steps: "COPY|x.txt|/x/||\n"},
		{name: "start, exec form", text: "FROM a\nCMD [\"nginx\", \"-g\", \"daemon off;\"]\n", image: "a", start: "nginx -g 'daemon off;'"},
		{name: "start, shell form", text: "FROM a\nCMD exec nginx $X\n", image: "a", start: "exec nginx $X"},
		{name: "start of both", text: "FROM a\nENTRYPOINT [\"python3\"]\nCMD [\"-m\", \"http.server\"]\n", image: "a", start: "python3 -m http.server"},
		{name: "entrypoint after cmd", text: "FROM a\nCMD [\"x\"]\nENTRYPOINT [\"y\"]\n", image: "a", start: "y"},
		{name: "entrypoint in shell form", text: "FROM a\nENTRYPOINT y z\nCMD [\"x\"]\n", image: "a", start: "y z"},
		{
			name: "what means nothing", text: "FROM a\nLABEL a=b\nEXPOSE 80\nVOLUME /x\nSTOPSIGNAL TERM\nHEALTHCHECK NONE\nMAINTAINER me\nONBUILD RUN x\n", image: "a",
			warns: "line 2: LABEL|line 3: EXPOSE|line 4: VOLUME|line 5: STOPSIGNAL|line 6: HEALTHCHECK|line 7: MAINTAINER|line 8: ONBUILD",
		},
		{name: "escape directive", text: "# escape=`\nFROM a\nRUN a `\n  b\n", image: "a", steps: "RUN|a   b|\n"},
		{name: "byte order mark and CR", text: "\ufeffFROM a\r\nRUN b\r\n", image: "a", steps: "RUN|b|\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, err := ParseDockerfile([]byte(tc.text), Options{Args: tc.args})
			if err != nil {
				t.Fatal(err)
			}
			want := root + tc.steps
			if !strings.Contains(tc.steps, "USER|") {
				want += "USER|user\n"
			}
			if !strings.Contains(tc.steps, "WORKDIR|") {
				want += "WORKDIR|/home/user\n"
			}
			if diff := cmp.Diff(want, lines(d)); diff != "" || d.Image != tc.image || d.StartCommand != tc.start {
				t.Errorf("image %q, start %q; steps (-want +got):\n%s", d.Image, d.StartCommand, diff)
			}
			warned := strings.Join(d.Warnings, "\n")
			for w := range strings.SplitSeq(tc.warns, "|") {
				if !strings.Contains(warned, w) || tc.warns == "" && warned != "" {
					t.Errorf("warnings %q, want %q", warned, w)
				}
			}
		})
	}
}

func TestHereDocumentContent(t *testing.T) {
	d, err := ParseDockerfile([]byte("FROM a\nENV P=80\nCOPY <<EOF <<'RAW' /etc/x/\nport \"$P\"\nEOF\nport $P\nRAW\n"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := string(d.Steps[3].Source.Content) + string(d.Steps[4].Source.Content); got != "port \"80\"\nport $P\n" {
		t.Errorf("%q", got)
	}
}

func TestFromTemplate(t *testing.T) {
	for text, want := range map[string]string{
		"":                    root + user,
		"RUN a":               root + "RUN|a|\n" + user,
		"FROM b\nRUN a\n":     root + "RUN|a|\n" + user,
		"USER root\nRUN a":    root + "USER|root\nRUN|a|\nWORKDIR|/home/user\n",
		"ARG A=1\nRUN a":      root + "RUN|a|\n" + user,
		"FROM b\nWORKDIR /x/": root + "WORKDIR|/x/\nUSER|user\n",
	} {
		d, err := ParseDockerfile([]byte(text), Options{FromTemplate: true})
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if diff := cmp.Diff(want, lines(d)); diff != "" || d.Image != "" {
			t.Errorf("%q: image %q (-want +got):\n%s", text, d.Image, diff)
		}
	}
}

func TestDockerfileMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"":                                       "no instructions",
		"ARG A=1":                                "no FROM",
		"FROM a\nENV A=\x00":                     "zero byte",
		"RUN a":                                  "line 1: an instruction before FROM",
		"FROM a\nFROM b":                         "line 2: a second FROM",
		"FROM a\nRUN x\nFROM b":                  "line 3: a second FROM",
		"FROM scratch":                           `line 1: FROM "scratch"`,
		"FROM $X":                                "X is not set",
		"FROM a\n\nFOO x":                        "line 3: unknown instruction: FOO",
		"FROM a\nCOPY --from=b x y":              "line 2: COPY --from=b",
		"FROM a\nCOPY a b c":                     `want a directory, "c/"`,
		"FROM a\nCOPY a":                         "line 2",
		"FROM a\nCOPY --chmod=u+x a b":           "--chmod=u+x: want octal",
		"FROM a\nCOPY --chmod=99999 a b":         "want octal",
		"FROM a\nADD https://x.test/y /y":        "line 2: ADD https://x.test/y",
		"FROM a\nADD git@x.test:y/z.git /y":      "use RUN with curl or git",
		"FROM a\nRUN --mount=type=secret,id=x y": "line 2: RUN --mount=type=secret",
		"FROM a\nRUN --network=none y":           "--network=none",
		"FROM a\nRUN":                            "line 2",
		"FROM a\nCOPY $NOPE/x /y":                "line 2: \"$NOPE/x\": NOPE is not set",
		"FROM a\nENV X":                          "line 2",
		"FROM a\nCOPY <<EOF /x\n$NOPE\nEOF\n":    "NOPE is not set",
		"FROM a\nCOPY <<EOF /x\nx":               "unterminated heredoc",
		"FROM a\nARG \"=\"":                      "line 2",
	} {
		_, err := ParseDockerfile([]byte(text), Options{})
		if err == nil || !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "Dockerfile") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if _, err := ParseDockerfile(make([]byte, MaxDockerfile+1), Options{}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Error(err)
	}
}

func FuzzDockerfile(f *testing.F) {
	for _, text := range []string{
		"FROM a\nRUN b", "ARG A=1\nFROM a:$A\nARG A\nENV B=${A:-x} C='$A'\nCOPY --chown=$A [\"x\", \"y\"]\n",
		"FROM a\nRUN <<EOF\n#!/bin/sh\nEOF\nCOPY <<A <<B /x/\n$PATH\nA\nB\n", "# escape=`\nFROM a\nSHELL [\"x\"]\nRUN y `\nz",
		"FROM a\nCMD x\nENTRYPOINT [\"y\"]\nRUN --mount=type=cache,target=$X z",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := ParseDockerfile(text, Options{Args: map[string]string{"A": "1"}})
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("%v is no mistake of the file", err)
			}
			return
		}
		for _, s := range d.Steps {
			if s.Type == Copy && (s.Source == nil || len(s.Args) != 4 || strings.HasPrefix(s.Source.Path, "..") || strings.HasPrefix(s.Source.Path, "/")) {
				t.Errorf("COPY %q takes %+v", s.Args, s.Source)
			}
		}
	})
}
