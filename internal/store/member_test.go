package store

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// start is the time of day in these tests.
var start = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

func token(t *testing.T, s *Store, id string, change func(*Token)) Token {
	t.Helper()
	made := Token{ID: id, Role: sandbox.RoleNode, Hash: "hash-" + id, Uses: 1, CreatedAt: start, ExpiresAt: start.Add(time.Hour)}
	if change != nil {
		change(&made)
	}
	if err := s.CreateToken(t.Context(), made); err != nil {
		t.Fatal(err)
	}
	return made
}

// machine asks to join as a node, with a key and certificate of its own.
func machine(tokenID, id, name string) Admission {
	return Admission{TokenID: tokenID, TokenHash: "hash-" + tokenID, Member: Member{
		Role: sandbox.RoleNode, ID: id, Name: name, KeyFingerprint: "key-" + id, JoinedAt: start, Version: "v1",
		Certificates: []Certificate{{Serial: "serial-" + id, ExpiresAt: start.Add(24 * time.Hour)}},
	}}
}

func TestAdmit(t *testing.T) {
	s := fresh(t)
	token(t, s, "t1", nil)
	got, err := s.Admit(t.Context(), machine("t1", "aaaaaa", "one"), start)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(machine("t1", "aaaaaa", "one").Member, got); diff != "" {
		t.Error(diff)
	}
	// The answer was lost: the machine asks again, with another certificate, and uses nothing up.
	again := machine("t1", "aaaaaa", "one")
	again.Member.Certificates[0].Serial, again.Member.JoinedAt = "serial-2", start.Add(time.Minute)
	if got, err = s.Admit(t.Context(), again, start.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if len(got.Certificates) != 2 || !got.JoinedAt.Equal(start) {
		t.Errorf("after the second time: %+v", got)
	}
	all, err := s.Tokens(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("%v, %v", all, err)
	}
	want := []TokenUse{{Member: "node/aaaaaa", Name: "one", KeyFingerprint: "key-aaaaaa", At: start}}
	if diff := cmp.Diff(want, all[0].UsedBy); diff != "" || all[0].Used != 1 {
		t.Errorf("used %d times\n%s", all[0].Used, diff)
	}
	members, err := s.Members(t.Context())
	if err != nil || len(members) != 1 || members[0].Name != "one" {
		t.Errorf("%+v, %v", members, err)
	}
}

func TestAdmitRefusals(t *testing.T) {
	s := fresh(t)
	token(t, s, "good", func(t *Token) { t.Uses = 0 })
	token(t, s, "old", func(t *Token) { t.ExpiresAt = start })
	token(t, s, "revoked", nil)
	token(t, s, "proxy", func(t *Token) { t.Role = sandbox.RoleProxy })
	token(t, s, "used", nil)
	if err := s.RevokeToken(t.Context(), "revoked", start); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Admit(t.Context(), machine("used", "aaaaaa", "one"), start); err != nil {
		t.Fatal(err)
	}
	changed := func(a Admission, change func(*Admission)) Admission { change(&a); return a }
	tests := map[string]struct {
		ask  Admission
		kind error
		want string
	}{
		"unknown":          {machine("none", "bbbbbb", "two"), sandbox.ErrDenied, `"none" does not exist`},
		"no id":            {machine("", "bbbbbb", "two"), sandbox.ErrDenied, "does not exist"},
		"a path":           {machine("a b", "bbbbbb", "two"), sandbox.ErrDenied, "does not exist"},
		"wrong secret":     {changed(machine("good", "bbbbbb", "two"), func(a *Admission) { a.TokenHash = "x" }), sandbox.ErrDenied, "secret is wrong"},
		"no secret":        {changed(machine("good", "bbbbbb", "two"), func(a *Admission) { a.TokenHash = "" }), sandbox.ErrDenied, "secret is wrong"},
		"expired":          {machine("old", "bbbbbb", "two"), sandbox.ErrDenied, "expired on 2030-01-02 03:04:05"},
		"revoked":          {machine("revoked", "bbbbbb", "two"), sandbox.ErrDenied, "was revoked"},
		"used up":          {machine("used", "bbbbbb", "two"), sandbox.ErrDenied, "is used up: it let in node/aaaaaa (one)"},
		"wrong role":       {machine("proxy", "bbbbbb", "two"), sandbox.ErrDenied, "is for a proxy, not for a node"},
		"same id, new key": {changed(machine("good", "aaaaaa", "one"), func(a *Admission) { a.Member.KeyFingerprint = "x" }), sandbox.ErrConflict, "with another key"},
		"same, used token": {changed(machine("used", "aaaaaa", "one"), func(a *Admission) { a.Member.KeyFingerprint = "x" }), sandbox.ErrDenied, "used up"},
		"name taken":       {machine("good", "bbbbbb", "one"), sandbox.ErrConflict, `"one" is that of node/aaaaaa already: choose another with --name`},
		"bad name":         {machine("good", "bbbbbb", "a/b"), sandbox.ErrInvalid, `"a/b"`},
		"bad id":           {machine("good", "b", "two"), sandbox.ErrInvalid, `id "b"`},
		"no certificate":   {changed(machine("good", "bbbbbb", "two"), func(a *Admission) { a.Member.Certificates = nil }), sandbox.ErrInvalid, "certificate"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := s.Admit(t.Context(), tt.ask, start)
			if !errors.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %v with %q", err, tt.kind, tt.want)
			}
		})
	}
	members, err := s.Members(t.Context())
	if err != nil || len(members) != 1 {
		t.Errorf("%+v, %v: want the one that was let in", members, err)
	}
	// The same name in another role is nobody's business.
	ask := machine("proxy", "bbbbbb", "one")
	ask.Member.Role = sandbox.RoleProxy
	if _, err := s.Admit(t.Context(), ask, start); err != nil {
		t.Error(err)
	}
}

// Of many machines with one token as many get in as it has uses, and of many with one name one does.
func TestAdmitAtOnce(t *testing.T) {
	s := fresh(t)
	token(t, s, "three", func(t *Token) { t.Uses = 3 })
	token(t, s, "any", func(t *Token) { t.Uses = 0 })
	count := func(tokenID string, name func(i int) string, id string) int {
		var wg sync.WaitGroup
		var mu sync.Mutex
		admitted := 0
		for i := range 10 {
			wg.Go(func() {
				_, err := s.Admit(t.Context(), machine(tokenID, fmt.Sprintf("%s%05d", id, i), name(i)), start)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					admitted++
				case !errors.Is(err, sandbox.ErrDenied) && !errors.Is(err, sandbox.ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		return admitted
	}
	if got := count("three", func(i int) string { return fmt.Sprint("name", i) }, "a"); got != 3 {
		t.Errorf("%d machines came in with a token for 3", got)
	}
	if got := count("any", func(int) string { return "same" }, "b"); got != 1 {
		t.Errorf("%d machines have one name", got)
	}
}

func TestRemoveMember(t *testing.T) {
	s := fresh(t)
	run(t, s)
	token(t, s, "t1", nil)
	token(t, s, "t2", func(t *Token) { t.Uses = 0 })
	who := sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}
	if s.Denied(who, "serial-aaaaaa") {
		t.Error("somebody unknown is denied: another server may have let it in just now")
	}
	if _, err := s.Admit(t.Context(), machine("t1", "aaaaaa", "one"), start); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RenewMember(t.Context(), who, "key-2", Certificate{Serial: "serial-2", ExpiresAt: start.Add(30 * time.Hour)}, start); err != nil {
		t.Fatal(err)
	}
	for _, serial := range []string{"serial-aaaaaa", "serial-2"} {
		if s.Denied(who, serial) {
			t.Errorf("%s is denied to a member", serial)
		}
	}
	if _, err := s.RemoveMember(t.Context(), who, start); err != nil {
		t.Fatal(err)
	}
	if !s.Denied(who, "serial-2") || !s.Denied(who, "serial-aaaaaa") {
		t.Error("one that left is not denied at once")
	}
	left, all := s.Refused()
	if len(all) != 1 || all[0] != (sandbox.Refusal{Member: who}) {
		t.Errorf("refused: %v; want the one that left", all)
	}
	if _, err := s.RemoveMember(t.Context(), who, start); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := s.RenewMember(t.Context(), who, "k", Certificate{Serial: "x"}, start); !errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("renewed by one that left: %v", err)
	}
	if err := s.NoteMember(t.Context(), who, "a", "b"); !errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("noted of one that left: %v", err)
	}
	// The token that it came in with is used up, also for it.
	if _, err := s.Admit(t.Context(), machine("t1", "aaaaaa", "one"), start); !errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("back in with the old token: %v", err)
	}
	// Its name is free; with a new token it comes in again, and the certificates of its first stay are worth nothing.
	if _, err := s.Admit(t.Context(), machine("t2", "bbbbbb", "one"), start); err != nil {
		t.Error(err)
	}
	back := machine("t2", "aaaaaa", "two")
	back.Member.KeyFingerprint, back.Member.Certificates[0].Serial = "key-3", "serial-3"
	if _, err := s.Admit(t.Context(), back, start); err != nil {
		t.Fatal(err)
	}
	if s.Denied(who, "serial-3") || !s.Denied(who, "serial-2") {
		t.Error("of the second stay nothing should be denied, of the first all")
	}
	version, all := s.Refused()
	if version == left || len(all) != 2 || all[0].Serial == "" || all[0].Serial == "serial-3" {
		t.Errorf("refused by version %s, after %s: %v; want the certificates of the first stay", version, left, all)
	}
}

func TestRefusalsOutliveARestart(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	token(t, s, "t1", nil)
	who := sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}
	_, err := s.Admit(t.Context(), machine("t1", "aaaaaa", "one"), start)
	_, err2 := s.RemoveMember(t.Context(), who, start)
	if err := errors.Join(err, err2, s.Close()); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	defer func() { _ = s.Close() }()
	if !s.Denied(who, "serial-aaaaaa") {
		t.Error("one that left is welcome after a restart")
	}
	for at, want := range map[time.Duration]bool{23 * time.Hour: true, 24 * time.Hour: false} {
		err := s.PruneMembers(t.Context(), start.Add(at))
		_, gone := s.Member(t.Context(), who)
		if err != nil || (gone == nil) != want {
			t.Errorf("after %s: %v, %v, want its record there: %v", at, err, gone, want)
		}
		if !want {
			break
		}
	}
}

// The watch repeats old news after newer local ones.
func TestRefusalsKeepTheNewer(t *testing.T) {
	r := newRefusals()
	who := sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}
	present := machine("t", "aaaaaa", "one").Member
	left := present
	left.RemovedAt = start
	r.put(Record[Member]{Name: who.String(), Value: left, Revision: 5})
	r.put(Record[Member]{Name: who.String(), Value: present, Revision: 4})
	r.reset([]Record[Member]{{Name: who.String(), Value: present, Revision: 4}}, 4)
	if !r.denied(who, "x") {
		t.Error("older news was taken for newer")
	}
	r.forget(who.String(), 4)
	if !r.denied(who, "x") {
		t.Error("an older deletion was taken for newer")
	}
	r.reset(nil, 6)
	if r.denied(who, "x") {
		t.Error("a record that is gone still denies")
	}
}

func TestNoteMember(t *testing.T) {
	s := fresh(t)
	token(t, s, "t1", nil)
	if _, err := s.Admit(t.Context(), machine("t1", "aaaaaa", "one"), start); err != nil {
		t.Fatal(err)
	}
	who := sandbox.Member{Role: sandbox.RoleNode, ID: "aaaaaa"}
	before := s.Status().Revision
	for range 3 {
		if err := s.NoteMember(t.Context(), who, "10.0.0.2:3004", "v2"); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Member(t.Context(), who)
	if err != nil || got.Address != "10.0.0.2:3004" || got.Version != "v2" || s.Status().Revision != before+1 {
		t.Errorf("%+v, %v, %d writes", got, err, s.Status().Revision-before)
	}
}

func TestTokens(t *testing.T) {
	s := fresh(t)
	token(t, s, "t1", nil)
	token(t, s, "t2", func(t *Token) { t.CreatedAt = start.Add(-time.Hour) })
	if err := s.CreateToken(t.Context(), Token{ID: "t1", Hash: "x", Role: sandbox.RoleNode, ExpiresAt: start}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("an id twice: %v", err)
	}
	for name, bad := range map[string]Token{
		"no hash":   {ID: "x", Role: sandbox.RoleNode, ExpiresAt: start},
		"no role":   {ID: "x", Hash: "x", ExpiresAt: start},
		"no end":    {ID: "x", Hash: "x", Role: sandbox.RoleNode},
		"much use":  {ID: "x", Hash: "x", Role: sandbox.RoleNode, ExpiresAt: start, Uses: MaxTokenUses + 1},
		"less use":  {ID: "x", Hash: "x", Role: sandbox.RoleNode, ExpiresAt: start, Uses: -1},
		"no id":     {Hash: "x", Role: sandbox.RoleNode, ExpiresAt: start},
		"spaced id": {ID: "a b", Hash: "x", Role: sandbox.RoleNode, ExpiresAt: start},
	} {
		if err := s.CreateToken(t.Context(), bad); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	all, err := s.Tokens(t.Context())
	if err != nil || len(all) != 2 || all[0].ID != "t2" {
		t.Errorf("%+v, %v", all, err)
	}
	if err := s.RevokeToken(t.Context(), "none", start); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("revoke nothing: %v", err)
	}
	for i := range 2 {
		if err := s.RevokeToken(t.Context(), "t1", start.Add(time.Duration(i))); err != nil {
			t.Error(err)
		}
	}
	all, err = s.Tokens(t.Context())
	if err != nil || !all[1].RevokedAt.Equal(start) || !all[1].Ended(start) || all[0].Ended(start) || !all[0].Ended(start.Add(time.Hour)) {
		t.Errorf("%+v, %v", all, err)
	}
	// Old ones are forgotten when another one is made.
	token(t, s, "t3", func(t *Token) { t.CreatedAt = start.Add(30 * 24 * time.Hour); t.ExpiresAt = t.CreatedAt.Add(time.Hour) })
	all, err = s.Tokens(t.Context())
	if err != nil || len(all) != 1 || all[0].ID != "t3" {
		t.Errorf("%+v, %v", all, err)
	}
}

// A token for any number of machines remembers the last of them, and stays small.
func TestTokenForMany(t *testing.T) {
	made := Token{ID: "t", Hash: "hash-t", Role: sandbox.RoleNode, ExpiresAt: start.Add(time.Hour)}
	for i := range 3 * keptUses {
		var err error
		if made, err = made.use(machine("t", fmt.Sprintf("%06d", i), fmt.Sprint("n", i)), false, start); err != nil {
			t.Fatal(err)
		}
	}
	if made.Used != 3*keptUses || len(made.UsedBy) != keptUses || made.UsedBy[keptUses-1].Name != fmt.Sprint("n", 3*keptUses-1) {
		t.Errorf("used %d times, %d kept", made.Used, len(made.UsedBy))
	}
}
