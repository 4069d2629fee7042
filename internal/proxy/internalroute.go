package proxy

import "strings"

// maxDecodings is how often a path is unescaped in search of a hidden name; a path that still changes after that is
// refused, since nobody writes one in good faith.
const maxDecodings = 4

// internalRoute reports whether a path could mean one of the routes by which a node governs the agent inside a sandbox:
// they carry secrets in, or stop the sandbox, and the agent cannot tell a node from a stranger there.
//
// The agent serves these routes at the root, for single methods. Refusing every path that has such a name as any of its
// segments, in any encoding, by any method, covers whatever cleaning and unescaping the agent does, because those only
// ever take segments away.
func internalRoute(escaped string) bool {
	path := escaped
	for range maxDecodings {
		if hasInternalSegment(path) {
			return true
		}
		decoded := unescape(path)
		if decoded == path {
			return false
		}
		path = decoded
	}
	return true
}

func hasInternalSegment(path string) bool {
	for segment := range strings.FieldsFuncSeq(path, func(r rune) bool { return r == '/' || r == '\\' }) {
		name, _, _ := strings.Cut(segment, ";")
		name = strings.TrimFunc(name, func(r rune) bool { return r <= ' ' || r == '.' || r == 0x7f })
		switch strings.ToLower(name) {
		case "init", "freeze", "unfreeze", "fsfreeze", "fsthaw", "fsunfreeze", "thaw", "collapse", "upgrade", "logs", "loopback",
			"copy", "accounts":
			return true
		}
	}
	return false
}

// unescape replaces every well-formed %xx once and leaves the rest alone.
func unescape(s string) string {
	if !strings.Contains(s, "%") {
		return s
	}
	var b strings.Builder
	b.Grow(len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			hi, okHi := hexDigit(s[i+1])
			lo, okLo := hexDigit(s[i+2])
			if okHi && okLo {
				b.WriteByte(hi<<4 | lo)
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}
