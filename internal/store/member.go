package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxCertificates bounds how many good certificates of one member are remembered: the newest.
const maxCertificates = 16

var memberNameForm = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)

// Member is a machine that joined, in one role.
type Member struct {
	Role sandbox.Role `json:"role"`
	ID   string       `json:"id"`
	// Name is for people, and unique among the present members of a role.
	Name string `json:"name"`
	// KeyFingerprint is the hex SHA-256 of its public key.
	KeyFingerprint string `json:"key"`
	// Certificates are those that it was given and that have not ended, the newest last.
	Certificates []Certificate `json:"certificates"`
	// Refused are those of an earlier stay under the same id that have not ended.
	Refused  []Certificate `json:"refused,omitempty"`
	JoinedAt time.Time     `json:"joined_at"`
	Version  string        `json:"version"`
	// Address is the HOST:PORT on which it answers members; empty where it cannot be dialed.
	Address string `json:"address,omitempty"`
	// RemovedAt is set for one that left. Its record stays for as long as a certificate of its would be good.
	RemovedAt time.Time `json:"removed_at,omitzero"`
}

// Certificate is one that was given to a member.
type Certificate struct {
	// Serial is its number in lower-case hex.
	Serial    string    `json:"serial"`
	ExpiresAt time.Time `json:"expires_at"`
}

// nameOwner says whose a name is.
type nameOwner struct {
	ID string `json:"id"`
}

// Member returns who it is.
func (m *Member) Member() sandbox.Member { return sandbox.Member{Role: m.Role, ID: m.ID} }

// ExpiresAt returns when its newest certificate ends.
func (m *Member) ExpiresAt() time.Time {
	if len(m.Certificates) == 0 {
		return time.Time{}
	}
	return m.Certificates[len(m.Certificates)-1].ExpiresAt
}

func (m *Member) key() string     { return m.Member().String() }
func (m *Member) nameKey() string { return string(m.Role) + "/" + m.Name }

func (m *Member) check() error {
	if err := sandbox.CheckMember(m.Member()); err != nil {
		return err
	}
	if !memberNameForm.MatchString(m.Name) {
		return sandbox.Invalidf("name %.80q: want 1 to 63 letters, digits, '.', '_' and '-', beginning and ending with a letter or digit", m.Name)
	}
	if m.KeyFingerprint == "" || len(m.Certificates) == 0 {
		return sandbox.Invalidf("%s: want the fingerprint of its key, and a certificate", m.Member())
	}
	return nil
}

// succeed returns m as the record that follows old, which is zero where there is none.
func succeed(m, old Member, now time.Time) Member {
	if old.RemovedAt.IsZero() {
		m.Certificates, m.Refused = slices.Concat(old.Certificates, m.Certificates), old.Refused
	} else {
		m.Refused = slices.Concat(old.Refused, old.Certificates)
	}
	m.Certificates, m.Refused = lasting(m.Certificates, now), lasting(m.Refused, now)
	return m
}

// lasting returns the newest certificates that have not ended.
func lasting(all []Certificate, now time.Time) []Certificate {
	out := slices.DeleteFunc(slices.Clone(all), func(c Certificate) bool { return !now.Before(c.ExpiresAt) })
	return out[max(0, len(out)-maxCertificates):]
}

func (s *Store) members() collection[Member] {
	return newCollection[Member](s.client, "members", "member")
}

func (s *Store) memberNames() collection[nameOwner] {
	return newCollection[nameOwner](s.client, "member-names", "name of a member")
}

// Member returns a member, also one that left a while ago. Errors: ErrNotFound.
func (s *Store) Member(ctx context.Context, m sandbox.Member) (Member, error) {
	r, err := s.members().get(ctx, m.String())
	return r.Value, err
}

// Members returns the members that are present, by role and id.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	records, _, err := s.members().list(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(values(records), func(m Member) bool { return !m.RemovedAt.IsZero() }), nil
}

// RenewMember notes that a present member was given another certificate, for the key with the fingerprint.
// Errors: ErrDenied for one that is no member, or not any more.
func (s *Store) RenewMember(ctx context.Context, m sandbox.Member, keyFingerprint string, c Certificate, now time.Time) (Member, error) {
	return s.updateMember(ctx, m, func(old *Member) error {
		next := *old
		next.KeyFingerprint, next.Certificates = keyFingerprint, []Certificate{c}
		*old = succeed(next, *old, now)
		return nil
	})
}

// NoteMember keeps where a present member answers, and what it runs. It writes only what is new.
func (s *Store) NoteMember(ctx context.Context, m sandbox.Member, address, version string) error {
	_, err := s.updateMember(ctx, m, func(old *Member) error {
		if old.Address == address && old.Version == version {
			return errUnchanged
		}
		old.Address, old.Version = address, version
		return nil
	})
	if errors.Is(err, errUnchanged) {
		return nil
	}
	return err
}

var errUnchanged = errors.New("unchanged")

// updateMember changes a present member by compare-and-swap; its name stays.
func (s *Store) updateMember(ctx context.Context, m sandbox.Member, change func(*Member) error) (Member, error) {
	for range maxRetries {
		r, err := orNone(s.members().get(ctx, m.String()))
		if err != nil {
			return Member{}, err
		}
		if r.Revision == 0 || !r.Value.RemovedAt.IsZero() {
			return Member{}, sandbox.Deniedf("%s is no member of the cluster any more: it can join again with a new token", m)
		}
		next := r.Value
		if err := change(&next); err != nil {
			return Member{}, err
		}
		rev, err := s.members().swap(ctx, r, next)
		if err == nil {
			s.refusals.put(Record[Member]{Name: m.String(), Value: next, Revision: rev})
		}
		if !isConflict(err) {
			return next, err
		}
	}
	return Member{}, s.members().changed(m.String())
}

// RemoveMember takes a member out: its certificates are refused from now on, and its name is free. Errors: ErrNotFound for one
// that is no member, or not any more.
func (s *Store) RemoveMember(ctx context.Context, m sandbox.Member, now time.Time) (Member, error) {
	for range maxRetries {
		r, err := s.members().get(ctx, m.String())
		if err != nil {
			return Member{}, err
		}
		next := r.Value
		if !next.RemovedAt.IsZero() {
			return Member{}, sandbox.NotFoundf("%s left the cluster on %s", m, next.RemovedAt.UTC().Format(time.DateTime))
		}
		next.RemovedAt = now
		text, err := s.members().encode(next)
		if err != nil {
			return Member{}, err
		}
		done, rev, err := commit(ctx, s.client, []clientv3.Cmp{unchanged(s.members().key(r.Name), r.Revision)}, []clientv3.Op{
			clientv3.OpPut(s.members().key(r.Name), text), clientv3.OpDelete(s.memberNames().key(next.nameKey())),
		})
		if err != nil {
			return Member{}, fmt.Errorf("remove %s: %w", m, err)
		}
		if done {
			s.refusals.put(Record[Member]{Name: r.Name, Value: next, Revision: rev})
			return next, nil
		}
	}
	return Member{}, s.members().changed(m.String())
}

// PruneMembers forgets the members that left and whose certificates have all ended.
func (s *Store) PruneMembers(ctx context.Context, now time.Time) error {
	records, _, err := s.members().list(ctx)
	if err != nil {
		return err
	}
	for _, r := range records {
		m := r.Value
		if m.RemovedAt.IsZero() || len(lasting(m.Certificates, now))+len(lasting(m.Refused, now)) > 0 {
			continue
		}
		_, _, err := commit(ctx, s.client, []clientv3.Cmp{unchanged(s.members().key(r.Name), r.Revision)},
			[]clientv3.Op{clientv3.OpDelete(s.members().key(r.Name))})
		if err != nil {
			return fmt.Errorf("forget %s: %w", m.Member(), err)
		}
	}
	return nil
}

// WatchMembers feeds w with all members, those that left included, until ctx ends.
func (s *Store) WatchMembers(ctx context.Context, w Watcher[Member]) error {
	return s.members().watch(ctx, w)
}

// Denied reports whether a member's certificate is worthless before its end: it left, or the certificate is of an earlier
// stay. It reads memory only and is meant for every handshake.
func (s *Store) Denied(m sandbox.Member, serial string) bool { return s.refusals.denied(m, serial) }

// Refused returns all for whom Denied is true, and a version that changes when they do. The caller must not change them.
func (s *Store) Refused() (version string, all []sandbox.Refusal) { return s.refusals.list() }

// refusals is what Denied reads. Writers on this server apply their change at once; the watch repeats it later, and revisions
// decide which of two is newer.
type refusals struct {
	mu      sync.RWMutex
	members map[string]Record[Member]
	// all and version are what list returns; an empty version means that they are to be made anew.
	all     []sandbox.Refusal
	version string
}

func newRefusals() *refusals { return &refusals{members: make(map[string]Record[Member])} }

func (r *refusals) watcher() Watcher[Member] {
	return Watcher[Member]{Reset: r.reset, Put: r.put, Delete: r.forget}
}

func (r *refusals) denied(m sandbox.Member, serial string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	known, ok := r.members[m.String()]
	if !ok {
		return false
	}
	is := func(c Certificate) bool { return c.Serial == serial }
	return !known.Value.RemovedAt.IsZero() || slices.ContainsFunc(known.Value.Refused, is)
}

// list returns what is refused.
func (r *refusals) list() (version string, all []sandbox.Refusal) {
	r.mu.RLock()
	version, all = r.version, r.all
	r.mu.RUnlock()
	if version != "" {
		return version, all
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var newest int64
	r.all = nil
	for _, record := range r.members {
		m := &record.Value
		if !m.RemovedAt.IsZero() {
			r.all = append(r.all, sandbox.Refusal{Member: m.Member()})
		}
		for _, c := range m.Refused {
			r.all = append(r.all, sandbox.Refusal{Member: m.Member(), Serial: c.Serial})
		}
		if refuses(m) {
			newest = max(newest, record.Revision)
		}
	}
	r.version = fmt.Sprintf("%d-%d", newest, len(r.all))
	return r.version, r.all
}

// refuses reports whether anything of a member is refused.
func refuses(m *Member) bool { return !m.RemovedAt.IsZero() || len(m.Refused) > 0 }

// reset replaces everything up to revision.
func (r *refusals) reset(records []Record[Member], revision int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.version = ""
	for name, known := range r.members {
		if known.Revision <= revision {
			delete(r.members, name)
		}
	}
	for _, record := range records {
		r.apply(record)
	}
}

func (r *refusals) put(record Record[Member]) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.apply(record)
}

// apply takes a record where nothing newer is known. It requires mu.
func (r *refusals) apply(record Record[Member]) {
	known := r.members[record.Name]
	if known.Revision > record.Revision {
		return
	}
	r.members[record.Name] = record
	if refuses(&known.Value) || refuses(&record.Value) {
		r.version = ""
	}
}

func (r *refusals) forget(name string, revision int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.members[name].Revision < revision {
		delete(r.members, name)
		r.version = ""
	}
}

// loadMembers fills the refusals, so that they are in force before Run.
func (s *Store) loadMembers(ctx context.Context) error {
	records, rev, err := s.members().list(ctx)
	if err != nil {
		return err
	}
	s.refusals.reset(records, rev)
	return nil
}

// pruneEvery is how often members that left are looked at.
const pruneEvery = time.Hour

// followMembers keeps the refusals in step with other servers' changes, and forgets members that left, until ctx ends.
func (s *Store) followMembers(ctx context.Context) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	watched := make(chan error, 1)
	go func() { watched <- s.members().watch(ctx, s.refusals.watcher()) }()
	for {
		select {
		case err := <-watched:
			return err
		case now := <-tick.C:
			if err := s.PruneMembers(ctx, now); err != nil && ctx.Err() == nil {
				s.log.WarnContext(ctx, "members that left are not forgotten yet", slog.Any("err", err))
			}
		}
	}
}
