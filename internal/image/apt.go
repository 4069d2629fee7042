package image

import (
	"errors"
	"io"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// defaultMirror serves all of Debian.
const defaultMirror = "https://deb.debian.org/debian"

// aptSource is one archive of the machine's apt configuration.
type aptSource struct {
	uri        string
	suite      string
	components []string
	signedBy   string
}

// mirror is where debootstrap fetches a suite from. An empty keyring means that of Debian.
type mirror struct{ url, keyring string }

// readApt reads the machine's package sources. What cannot be read or understood is left out.
func readApt(dir string) []aptSource {
	var all []aptSource
	lists := []string{filepath.Join(dir, "sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		found, err := filepath.Glob(filepath.Join(dir, "sources.list.d", pattern))
		if err == nil {
			lists = append(lists, found...)
		}
	}
	for _, list := range lists {
		text := readText(list)
		if strings.HasSuffix(list, ".sources") {
			all = append(all, parseDeb822(text)...)
		} else {
			all = append(all, parseOneLine(text)...)
		}
	}
	return all
}

func readText(name string) string {
	const limit = 1 << 20
	f, err := os.Open(name) //nolint:gosec // the machine's own configuration
	if err != nil {
		return ""
	}
	data, err := io.ReadAll(io.LimitReader(f, limit))
	if errors.Join(err, f.Close()) != nil {
		return ""
	}
	return string(data)
}

// parseOneLine reads the format of sources.list(5): deb [options] uri suite component...
func parseOneLine(text string) []aptSource {
	var all []aptSource
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == "" || rest[0] != ' ' && rest[0] != '\t' {
			continue
		}
		rest = strings.TrimSpace(rest)
		options := ""
		if inner, ok := strings.CutPrefix(rest, "["); ok {
			if options, rest, ok = strings.Cut(inner, "]"); !ok {
				continue
			}
		}
		words := strings.Fields(rest)
		if len(words) < 2 {
			continue
		}
		src := aptSource{uri: words[0], suite: words[1], components: words[2:]}
		for option := range strings.FieldsSeq(options) {
			if key, value, _ := strings.Cut(option, "="); strings.EqualFold(key, "signed-by") {
				src.signedBy = value
			}
		}
		all = append(all, src)
	}
	return all
}

// parseDeb822 reads the format of *.sources files: paragraphs of "Field: values", continued on indented lines.
func parseDeb822(text string) []aptSource {
	var all []aptSource
	fields := map[string]string{}
	last := ""
	flush := func() {
		all = append(all, fromParagraph(fields)...)
		fields, last = map[string]string{}, ""
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				fields[last] += "\n" + strings.TrimSpace(line)
			}
		default:
			key, value, _ := strings.Cut(line, ":")
			last = strings.ToLower(strings.TrimSpace(key))
			fields[last] = strings.TrimSpace(value)
		}
	}
	flush()
	return all
}

// maxCombined bounds how many archives one paragraph can stand for.
const maxCombined = 1000

func fromParagraph(fields map[string]string) []aptSource {
	if !slices.Contains(strings.Fields(fields["types"]), "deb") || strings.EqualFold(fields["enabled"], "no") {
		return nil
	}
	var all []aptSource
	for uri := range strings.FieldsSeq(fields["uris"]) {
		for suite := range strings.FieldsSeq(fields["suites"]) {
			if len(all) == maxCombined {
				return all
			}
			all = append(all, aptSource{
				uri: uri, suite: suite, components: strings.Fields(fields["components"]), signedBy: fields["signed-by"],
			})
		}
	}
	return all
}

// mirrorsFor says where to fetch a Debian suite from, the best first: where the machine gets that suite from, where it
// gets other suites of Debian from, and deb.debian.org.
func mirrorsFor(suite string, sources []aptSource) []mirror {
	const most = 4
	var exact, other, odd []mirror
	for _, src := range sources {
		if !strings.HasPrefix(src.uri, "http://") && !strings.HasPrefix(src.uri, "https://") ||
			!slices.Contains(src.components, "main") {
			continue
		}
		u, err := url.Parse(src.uri)
		if err != nil || u.Host == "" {
			continue
		}
		m := mirror{url: strings.TrimRight(src.uri, "/"), keyring: binaryKeyring(src.signedBy)}
		isDebian := path.Base(strings.TrimRight(u.Path, "/")) == "debian"
		switch {
		case src.suite == suite && isDebian:
			exact = append(exact, m)
		case isDebian && isDebianSuite(src.suite):
			other = append(other, m)
		case src.suite == suite && (src.signedBy == "" || strings.Contains(src.signedBy, "debian-archive")):
			odd = append(odd, m)
		}
	}
	all := slices.Concat(exact, other, odd)
	if len(all) >= most {
		all = all[:most-1]
	}
	var unique []mirror
	for _, m := range append(all, mirror{url: defaultMirror}) {
		if !slices.ContainsFunc(unique, func(u mirror) bool { return u.url == m.url }) {
			unique = append(unique, m)
		}
	}
	return unique
}

// binaryKeyring returns a Signed-By value where it is one file of the kind that debootstrap takes.
func binaryKeyring(signedBy string) string {
	if ext := path.Ext(signedBy); path.IsAbs(signedBy) && (ext == ".gpg" || ext == ".pgp") &&
		!strings.ContainsAny(signedBy, " \n,") {
		return signedBy
	}
	return ""
}

func isDebianSuite(suite string) bool {
	base, _, _ := strings.Cut(suite, "-")
	return slices.Contains([]string{
		"bullseye", "bookworm", "trixie", "forky", "duke", "sid", "unstable", "testing", "stable", "oldstable", "oldoldstable",
	}, base)
}
