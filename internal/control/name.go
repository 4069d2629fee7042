package control

import (
	"regexp"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const maxNameLen = 128

var (
	namePart = regexp.MustCompile(`^[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?$`)
	tagPart  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]*$`)
)

// Name is a template's name as people write it: [namespace/]alias[:tag].
type Name struct {
	Namespace string
	Alias     string
	// Tag is "default" where none is written.
	Tag string
}

// ParseName reads [namespace/]alias[:tag], case-insensitively but for the tag. A template id is an alias by form.
func ParseName(s string) (Name, error) {
	if s == "" {
		return Name{}, sandbox.Invalidf("template name is empty: want [namespace/]alias[:tag], as in base")
	}
	if len(s) > maxNameLen {
		return Name{}, sandbox.Invalidf("template name %.40q... has %d characters: want at most %d", s, len(s), maxNameLen)
	}
	n := Name{Alias: s, Tag: sandbox.DefaultTag}
	if rest, tag, tagged := strings.Cut(s, ":"); tagged {
		if !tagPart.MatchString(tag) {
			return Name{}, sandbox.Invalidf("template name %.80q: tag %.80q: want letters, digits, '.', '_' and '-'", s, tag)
		}
		n.Alias, n.Tag = rest, tag
	}
	n.Alias = strings.ToLower(n.Alias)
	if namespace, alias, spaced := strings.Cut(n.Alias, "/"); spaced {
		if !namePart.MatchString(namespace) {
			return Name{}, sandbox.Invalidf("template name %.80q: namespace %.80q: want letters, digits, '.', '_' and '-', "+
				"beginning and ending with a letter or digit", s, namespace)
		}
		n.Namespace, n.Alias = namespace, alias
	}
	if !namePart.MatchString(n.Alias) {
		return Name{}, sandbox.Invalidf("template name %.80q: alias %.80q: want letters, digits, '.', '_' and '-', "+
			"beginning and ending with a letter or digit", s, n.Alias)
	}
	return n, nil
}

// Key is the name without its tag, which is what finds a template.
func (n Name) Key() string {
	if n.Namespace == "" {
		return n.Alias
	}
	return n.Namespace + "/" + n.Alias
}

// String is the shortest text that ParseName reads as n.
func (n Name) String() string {
	if n.Tag == sandbox.DefaultTag {
		return n.Key()
	}
	return n.Key() + ":" + n.Tag
}
