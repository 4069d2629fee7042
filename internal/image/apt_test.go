package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReadApt(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sources.list.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"sources.list": "# deb http://no/debian bookworm main\n" +
			"deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian/ bookworm main contrib # here\n" +
			"deb-src http://mirror/debian bookworm main\n\tdeb   https://b/debian sid main\ndeb [broken http://x/ y z\ndeb http://short\n",
		"sources.list.d/a.sources": "# comment\nTypes: deb deb-src\nURIs: http://one/debian\n  http://two/debian\n" +
			"Suites: trixie\n trixie-updates\nComponents: main\nSigned-By:\n -----BEGIN PGP\n .\n -----END\n\n" +
			"Types: deb\nEnabled: no\nURIs: http://off\nSuites: a\n\nTypes: deb-src\nURIs: http://src\nSuites: a\n",
		"sources.list.d/z.list":   "deb http://z/ubuntu noble main universe\n",
		"sources.list.d/z.ignore": "deb http://ignored/ noble main\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	armor := "\n-----BEGIN PGP\n.\n-----END"
	main := []string{"main"}
	want := []aptSource{
		{"http://mirror/debian/", "bookworm", []string{"main", "contrib"}, "/k.gpg"},
		{"https://b/debian", "sid", main, ""},
		{"http://z/ubuntu", "noble", []string{"main", "universe"}, ""},
		{"http://one/debian", "trixie", main, armor},
		{"http://one/debian", "trixie-updates", main, armor},
		{"http://two/debian", "trixie", main, armor},
		{"http://two/debian", "trixie-updates", main, armor},
	}
	if diff := cmp.Diff(want, readApt(dir), cmp.AllowUnexported(aptSource{})); diff != "" {
		t.Errorf("sources (-want +got):\n%s", diff)
	}
	if got := readApt(filepath.Join(dir, "nothing")); len(got) != 0 {
		t.Errorf("no configuration gives %v", got)
	}
}

func TestMirrorsFor(t *testing.T) {
	src := func(line string) []aptSource { return parseOneLine("deb " + line) }
	def := mirror{url: defaultMirror}
	tests := []struct {
		name string
		apt  []aptSource
		want []mirror
	}{
		{"nothing configured", nil, []mirror{def}},
		{"Ubuntu", src("http://archive.ubuntu.com/ubuntu noble main"), []mirror{def}},
		{"the suite itself", src("[signed-by=/k.gpg] http://m/debian/ bookworm main"), []mirror{{"http://m/debian", "/k.gpg"}, def}},
		{"another suite of Debian", src("http://m/debian trixie-updates main"), []mirror{{"http://m/debian", ""}, def}},
		{"its security archive is none", src("http://m/debian-security trixie-security main"), []mirror{def}},
		{"a vendor with the suite's name", src("[signed-by=/usr/share/keyrings/microsoft.gpg] https://p/debian/12/prod bookworm main"), []mirror{def}},
		{"a mirror with a name of its own", src("http://m/debian-remote bookworm main"), []mirror{{"http://m/debian-remote", ""}, def}},
		{"no network mirror", src("file:/srv/debian bookworm main"), []mirror{def}},
		{"the default itself", src(defaultMirror + " bookworm main"), []mirror{def}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, mirrorsFor("bookworm", tt.apt), cmp.AllowUnexported(mirror{})); diff != "" {
				t.Errorf("mirrors (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzApt(f *testing.F) {
	f.Add("deb [signed-by=/k.gpg] http://m/debian bookworm main\ndeb http://m/debian sid main")
	f.Add("Types: deb\nURIs: http://one/debian\n http://two\nSuites: bookworm sid\nComponents: main\n\nTypes: deb")
	f.Add("deb [\ndeb ]\n: x\n  y\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, parse := range []func(string) []aptSource{parseOneLine, parseDeb822} {
			for _, m := range mirrorsFor("bookworm", parse(text)) {
				if !strings.HasPrefix(m.url, "http://") && !strings.HasPrefix(m.url, "https://") {
					t.Errorf("mirror %q", m.url)
				}
				if m.keyring != "" && !filepath.IsAbs(m.keyring) {
					t.Errorf("keyring %q", m.keyring)
				}
			}
		}
	})
}
