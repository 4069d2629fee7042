package h1

// Classes of bytes.
const (
	classToken  = 1 << iota // of a method or a field's name
	classValue              // of a field's value
	classTarget             // of a request's target
	classHost               // of a Host field
)

//nolint:gochecknoglobals // a table, never written
var classes = makeClasses()

func makeClasses() (t [256]uint8) {
	for i := range t {
		c := byte(i)
		alnum := '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
		if alnum || contains("!#$%&'*+-.^_`|~", c) {
			t[i] |= classToken
		}
		if c == '\t' || c >= ' ' && c != 0x7f {
			t[i] |= classValue
		}
		if c > ' ' && c != 0x7f {
			t[i] |= classTarget
		}
		if alnum || contains("!$%&()*+,-.:;=@[]'_~", c) {
			t[i] |= classHost
		}
	}
	return t
}

func contains(set string, c byte) bool {
	for i := range len(set) {
		if set[i] == c {
			return true
		}
	}
	return false
}

// all reports whether every byte of b is of the class.
func all(b []byte, class uint8) bool {
	for _, c := range b {
		if classes[c]&class == 0 {
			return false
		}
	}
	return true
}

// Is reports whether b is the lower-case name, in whatever case.
func Is(b []byte, name string) bool {
	if len(b) != len(name) {
		return false
	}
	for i := range b {
		c := b[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != name[i] {
			return false
		}
	}
	return true
}

// trim takes the white space off both ends that may stand around a value.
func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}
