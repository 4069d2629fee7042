package sandbox

import (
	"regexp"
	"strings"
	"time"
)

// Role is what a member of the cluster does.
type Role string

// The roles.
const (
	RoleServer Role = "server"
	RoleNode   Role = "node"
	RoleProxy  Role = "proxy"
)

// Valid reports whether r is one of the roles.
func (r Role) Valid() bool { return r == RoleServer || r == RoleNode || r == RoleProxy }

// Member says who is at the other end of a connection between members. A node's ID is its NodeID; the ids of the other
// roles have the same form.
type Member struct {
	Role Role
	ID   string
}

// String writes the member as ROLE/ID.
func (m Member) String() string { return string(m.Role) + "/" + m.ID }

var memberIDForm = regexp.MustCompile(`^[a-z0-9]{6}$`)

// CheckMember refuses what cannot be a member. Errors: ErrInvalid.
func CheckMember(m Member) error {
	if !m.Role.Valid() {
		return Invalidf("role %.40q: want node, proxy or server", m.Role)
	}
	if !memberIDForm.MatchString(m.ID) {
		return Invalidf("id %.40q: want 6 characters of a-z and 0-9", m.ID)
	}
	return nil
}

// Refusal is a member's certificate that is worthless before its end: it was removed, or the certificate is of an earlier stay.
type Refusal struct {
	Member Member
	// Serial is the certificate's number in lower-case hex; empty for all of the member's.
	Serial string
}

// ParseMember reads ROLE/ID. Errors: ErrInvalid.
func ParseMember(text string) (Member, error) {
	role, id, _ := strings.Cut(text, "/")
	m := Member{Role: Role(role), ID: id}
	return m, CheckMember(m)
}

// PastCertificate is the certificate of a member, which may have ended.
type PastCertificate struct {
	Member Member
	// Serial is its number in lower-case hex.
	Serial string
	// IssuedAt is when it was given, to the second.
	IssuedAt  time.Time
	ExpiresAt time.Time
}
