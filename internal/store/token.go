package store

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// MaxTokenUses is the most uses that a token with a limit has; each is kept in its record.
	MaxTokenUses = 1000
	// keptUses is how many uses are kept of a token without a limit: the last ones.
	keptUses = 100
	// tokenKept is how long a token that is worth nothing any more stays to be seen.
	tokenKept = 7 * 24 * time.Hour
)

// Token is a join token as the cluster keeps it: never the secret, only what recognises it.
type Token struct {
	ID   string       `json:"id"`
	Role sandbox.Role `json:"role"`
	// Hash is the lower-case hex SHA-256 of the secret.
	Hash string `json:"hash"`
	// Uses is how many machines it lets in; 0 for any number. Used is how many it has.
	Uses int `json:"uses"`
	Used int `json:"used"`
	// Replace means that who it lets in may take the place of a node that is down, by its name.
	Replace   bool      `json:"replace,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at"`
	RevokedAt time.Time `json:"revoked_at,omitzero"`
	// UsedBy are the machines that it let in, the last 100 where their number has no limit.
	UsedBy []TokenUse `json:"used_by,omitempty"`
}

// TokenUse is one machine that a token let in.
type TokenUse struct {
	Member string `json:"member"`
	Name   string `json:"name"`
	// KeyFingerprint is the hex SHA-256 of the machine's public key.
	KeyFingerprint string    `json:"key"`
	At             time.Time `json:"at"`
}

// Ended reports whether the token lets nobody in any more.
func (t *Token) Ended(now time.Time) bool {
	return !t.RevokedAt.IsZero() || !now.Before(t.ExpiresAt) || (t.Uses > 0 && t.Used >= t.Uses)
}

func (s *Store) tokens() collection[Token] {
	return newCollection[Token](s.client, "tokens", "join token")
}

// CreateToken stores a token, and forgets those that ended more than 7 days ago. Errors: ErrInvalid, ErrConflict when the ID is taken.
func (s *Store) CreateToken(ctx context.Context, t Token) error {
	if err := checkName("token id", t.ID); err != nil {
		return err
	}
	if t.Hash == "" || !t.Role.Valid() || t.ExpiresAt.IsZero() || t.Uses < 0 || t.Uses > MaxTokenUses {
		return sandbox.Invalidf("join token %s: want a hash, a role, an end, and 0 to %d uses", t.ID, MaxTokenUses)
	}
	if _, err := s.tokens().create(ctx, t.ID, t); err != nil {
		return err
	}
	all, _, err := s.tokens().list(ctx)
	if err != nil {
		return err
	}
	for _, old := range all {
		if t.CreatedAt.Sub(old.Value.ExpiresAt) < tokenKept {
			continue
		}
		if _, err := s.tokens().remove(ctx, old.Name); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			return err
		}
	}
	return nil
}

// Tokens returns all tokens, the oldest first.
func (s *Store) Tokens(ctx context.Context) ([]Token, error) {
	records, _, err := s.tokens().list(ctx)
	if err != nil {
		return nil, err
	}
	return sortedByTime(records, func(t Token) time.Time { return t.CreatedAt }), nil
}

// RevokeToken makes a token worthless at once; whom it let in stays. Revoking it twice does nothing. Errors: ErrNotFound.
func (s *Store) RevokeToken(ctx context.Context, id string, now time.Time) error {
	for range maxRetries {
		r, err := s.tokens().get(ctx, id)
		if err != nil {
			return err
		}
		if !r.Value.RevokedAt.IsZero() {
			return nil
		}
		r.Value.RevokedAt = now
		if _, err := s.tokens().swap(ctx, r, r.Value); !isConflict(err) {
			return err
		}
	}
	return s.tokens().changed(id)
}

// Admission is a machine that asks to become a member.
type Admission struct {
	TokenID   string
	TokenHash string
	// Member has exactly one certificate.
	Member Member
}

// Admit makes a machine a member and uses the token up once, in one transaction. The same machine with the same key that asks again
// is a member already and uses nothing up. Errors: ErrDenied, which says what is wrong with the token; ErrConflict where the
// name, or the id, is another member's; ErrInvalid.
func (s *Store) Admit(ctx context.Context, a Admission, now time.Time) (Member, error) {
	if err := a.Member.check(); err != nil {
		return Member{}, err
	}
	for range maxRetries {
		m, done, err := s.tryAdmit(ctx, a, now)
		if err != nil || done {
			return m, err
		}
	}
	return Member{}, s.tokens().changed(a.TokenID)
}

// CheckToken returns the token that a machine asks to be admitted with, and uses nothing up. Errors: ErrDenied, which says what is
// wrong with the token.
func (s *Store) CheckToken(ctx context.Context, a Admission, now time.Time) (Token, error) {
	token, err := s.tokenOf(ctx, a)
	if err != nil {
		return Token{}, err
	}
	old, err := orNone(s.members().get(ctx, a.Member.key()))
	if err != nil {
		return Token{}, err
	}
	_, err = token.Value.use(a, again(a, old.Value), now)
	return token.Value, err
}

// again reports whether the machine that asks is the member that is there already.
func again(a Admission, old Member) bool {
	return old.ID != "" && old.RemovedAt.IsZero() && old.KeyFingerprint == a.Member.KeyFingerprint
}

func (s *Store) tokenOf(ctx context.Context, a Admission) (Record[Token], error) {
	if checkName("token id", a.TokenID) != nil {
		return Record[Token]{}, unknownToken(a.TokenID)
	}
	token, err := s.tokens().get(ctx, a.TokenID)
	if errors.Is(err, sandbox.ErrNotFound) {
		return Record[Token]{}, unknownToken(a.TokenID)
	}
	return token, err
}

// tryAdmit reads, decides and writes once; done is false where someone changed what it had read.
func (s *Store) tryAdmit(ctx context.Context, a Admission, now time.Time) (m Member, done bool, err error) {
	token, err := s.tokenOf(ctx, a)
	if err != nil {
		return m, false, err
	}
	old, err := orNone(s.members().get(ctx, a.Member.key()))
	if err != nil {
		return m, false, err
	}
	name, err := orNone(s.memberNames().get(ctx, a.Member.nameKey()))
	if err != nil {
		return m, false, err
	}
	used, m, err := decideAdmit(token.Value, old.Value, name.Value, a, now)
	if err != nil {
		return m, false, err
	}
	return s.writeAdmission(ctx, m, []clientv3.Cmp{
		unchanged(s.tokens().key(a.TokenID), token.Revision), unchanged(s.members().key(m.key()), old.Revision),
		unchanged(s.memberNames().key(m.nameKey()), name.Revision),
	}, used, old.Value)
}

func (s *Store) writeAdmission(ctx context.Context, m Member, when []clientv3.Cmp, used Token, old Member) (Member, bool, error) {
	tokenText, err := s.tokens().encode(used)
	if err != nil {
		return m, false, err
	}
	text, err := s.members().encode(m)
	if err != nil {
		return m, false, err
	}
	nameText, err := s.memberNames().encode(nameOwner{ID: m.ID})
	if err != nil {
		return m, false, err
	}
	then := []clientv3.Op{
		clientv3.OpPut(s.tokens().key(used.ID), tokenText), clientv3.OpPut(s.members().key(m.key()), text),
		clientv3.OpPut(s.memberNames().key(m.nameKey()), nameText),
	}
	if old.Name != "" && old.Name != m.Name && old.RemovedAt.IsZero() {
		then = append(then, clientv3.OpDelete(s.memberNames().key(old.nameKey())))
	}
	done, rev, err := commit(ctx, s.client, when, then)
	if err != nil {
		return m, false, fmt.Errorf("admit %s: %w", m.Member(), err)
	}
	if done {
		s.refusals.put(Record[Member]{Name: m.key(), Value: m, Revision: rev})
	}
	return m, done, nil
}

// orNone makes the zero record, whose revision is that of a key that is not there, of ErrNotFound.
func orNone[T any](r Record[T], err error) (Record[T], error) {
	if errors.Is(err, sandbox.ErrNotFound) {
		return Record[T]{}, nil
	}
	return r, err
}

// decideAdmit returns the token after its use and the member, or why not. old and name are zero where there are none.
func decideAdmit(t Token, old Member, name nameOwner, a Admission, now time.Time) (Token, Member, error) {
	m := a.Member
	present := old.ID != "" && old.RemovedAt.IsZero()
	t, err := t.use(a, again(a, old), now)
	if err != nil {
		return t, m, err
	}
	if present && old.KeyFingerprint != m.KeyFingerprint {
		return t, m, sandbox.Conflictf("%s is a member already, with another key: remove it from the cluster first, "+
			"or join with an empty data directory, which makes a new id", m.Member())
	}
	if name.ID != "" && name.ID != m.ID {
		return t, m, sandbox.Conflictf("the name %q is that of %s/%s already: choose another with --name, or take that one out of the cluster: `cloister %s rm %s`",
			m.Name, m.Role, name.ID, m.Role, name.ID)
	}
	if present {
		m.JoinedAt = old.JoinedAt
	}
	return t, succeed(m, old, now), nil
}

// use returns the token after it has let the member in; again says that the member is there already with the same key.
func (t *Token) use(a Admission, again bool, now time.Time) (Token, error) {
	who := a.Member.Member().String()
	same := func(u TokenUse) bool { return u.Member == who && u.KeyFingerprint == a.Member.KeyFingerprint }
	switch {
	case subtle.ConstantTimeCompare([]byte(t.Hash), []byte(a.TokenHash)) != 1:
		return *t, sandbox.Deniedf("join token %s: its secret is wrong; was it cut or changed when it was copied?", t.ID)
	case !t.RevokedAt.IsZero():
		return *t, sandbox.Deniedf("join token %s was revoked on %s: `cloister token create` makes a new one", t.ID, t.RevokedAt.UTC().Format(time.DateTime))
	case !now.Before(t.ExpiresAt):
		return *t, sandbox.Deniedf("join token %s expired on %s: `cloister token create` makes a new one", t.ID, t.ExpiresAt.UTC().Format(time.DateTime))
	case t.Role != a.Member.Role:
		return *t, sandbox.Deniedf("join token %s is for a %s, not for a %s: `cloister token create --role %s` makes one", t.ID, t.Role, a.Member.Role, a.Member.Role)
	case again && slices.ContainsFunc(t.UsedBy, same):
		return *t, nil
	case t.Uses > 0 && t.Used >= t.Uses:
		return *t, sandbox.Deniedf("join token %s is used up: it let in %s; `cloister token create` makes a new one", t.ID, t.guests())
	}
	next := *t
	next.Used++
	next.UsedBy = append(slices.Clone(t.UsedBy), TokenUse{Member: who, Name: a.Member.Name, KeyFingerprint: a.Member.KeyFingerprint, At: now})
	if next.Uses == 0 && len(next.UsedBy) > keptUses {
		next.UsedBy = next.UsedBy[len(next.UsedBy)-keptUses:]
	}
	return next, nil
}

// guests names whom the token let in, for people.
func (t *Token) guests() string {
	last := t.UsedBy[len(t.UsedBy)-1]
	if len(t.UsedBy) == 1 {
		return fmt.Sprintf("%s (%s)", last.Member, last.Name)
	}
	return fmt.Sprintf("%d machines, %s (%s) being the last", len(t.UsedBy), last.Member, last.Name)
}

func unknownToken(id string) error {
	return sandbox.Deniedf("join token %.40q does not exist here: `cloister token create` makes one", id)
}
