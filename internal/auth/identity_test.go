package auth

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// joined returns an identity in dir as a join would make it.
func joined(t *testing.T, a *Authority, dir string, m sandbox.Member, life time.Duration) *Identity {
	t.Helper()
	i, err := NewIdentity(dir, m)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Reissue(i, life, []string{"10.0.0.1:3003"}); err != nil {
		t.Fatal(err)
	}
	return i
}

// shake connects a client to a server and returns whom each takes the other for, or the first error.
func shake(t *testing.T, server, client *tls.Config) (atServer, atClient sandbox.Member, err error) {
	t.Helper()
	left, right := net.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, c := tls.Server(left, server), tls.Client(right, client)
	served := make(chan error, 1)
	go func() {
		err := s.HandshakeContext(ctx)
		if err == nil {
			_, err = s.Write([]byte("x")) // a client learns of a refusal with its first read
		}
		served <- errors.Join(err, left.Close())
	}()
	err = c.HandshakeContext(ctx)
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 1))
	}
	_ = right.Close() // the other end may be closed already
	if err := errors.Join(<-served, err); err != nil {
		return sandbox.Member{}, sandbox.Member{}, err
	}
	atServer, err = MemberOf(s.ConnectionState())
	if err != nil && !errors.Is(err, sandbox.ErrDenied) {
		return atServer, sandbox.Member{}, err
	}
	atClient, _ = MemberOf(c.ConnectionState()) // a pinned one verifies by itself and has no chains
	return atServer, atClient, nil
}

func TestHandshakes(t *testing.T) {
	a := newAuthority(t)
	server, node := joined(t, a, "", serverMember, time.Hour), joined(t, a, "", nodeMember, time.Hour)
	stranger := joined(t, newAuthority(t), "", nodeMember, time.Hour)
	expired := joined(t, a, "", nodeMember, time.Nanosecond)
	removed := joined(t, a, "", sandbox.Member{Role: sandbox.RoleNode, ID: "gone00"}, time.Hour)
	server.Denied = func(m sandbox.Member, serial string) bool { return m.ID == "gone00" && serial == removed.Serial() }
	anyServer := sandbox.Member{Role: sandbox.RoleServer}
	blank, err := NewIdentity("", nodeMember)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		server, client *tls.Config
		want           [2]sandbox.Member
		refused        string
	}{
		"member to a server":           {server.ServerTLS(), node.ClientTLS(anyServer), [2]sandbox.Member{nodeMember, serverMember}, ""},
		"member to this server":        {server.ServerTLS(), node.ClientTLS(serverMember), [2]sandbox.Member{nodeMember, serverMember}, ""},
		"member at the join port":      {server.JoinTLS(), node.ClientTLS(anyServer), [2]sandbox.Member{nodeMember, serverMember}, ""},
		"token at the join port":       {server.JoinTLS(), PinnedTLS(a.Fingerprint()), [2]sandbox.Member{{}, {}}, ""},
		"token where members are":      {server.ServerTLS(), PinnedTLS(a.Fingerprint()), [2]sandbox.Member{}, "certificate required"},
		"token of another cluster":     {server.JoinTLS(), PinnedTLS(newAuthority(t).Fingerprint()), [2]sandbox.Member{}, "not of the cluster that the join token is for"},
		"token at a node":              {node.JoinTLS(), PinnedTLS(a.Fingerprint()), [2]sandbox.Member{}, "not good for a server"},
		"another server":               {server.ServerTLS(), node.ClientTLS(sandbox.Member{Role: sandbox.RoleServer, ID: "srv002"}), [2]sandbox.Member{}, "not srv002.server"},
		"a node as server":             {node.ServerTLS(), node.ClientTLS(anyServer), [2]sandbox.Member{}, "not server.cloister.internal"},
		"another cluster's client":     {server.ServerTLS(), stranger.ClientTLS(anyServer), [2]sandbox.Member{}, "certificate"},
		"another cluster's server":     {stranger.ServerTLS(), node.ClientTLS(nodeMember), [2]sandbox.Member{}, "certificate"},
		"expired client":               {server.ServerTLS(), expired.ClientTLS(anyServer), [2]sandbox.Member{}, "expired"},
		"expired at the join port":     {server.JoinTLS(), expired.ClientTLS(anyServer), [2]sandbox.Member{}, "expired"},
		"expired server":               {expired.ServerTLS(), server.ClientTLS(nodeMember), [2]sandbox.Member{}, "expired"},
		"removed client":               {server.ServerTLS(), removed.ClientTLS(anyServer), [2]sandbox.Member{}, "was removed"},
		"removed at the join port":     {server.JoinTLS(), removed.ClientTLS(anyServer), [2]sandbox.Member{}, "was removed"},
		"removed server":               {removed.ServerTLS(), server.ClientTLS(removed.Member()), [2]sandbox.Member{}, "was removed"},
		"client that has not joined":   {server.ServerTLS(), blank.ClientTLS(anyServer), [2]sandbox.Member{}, "certificate"},
		"listener that has not joined": {blank.ServerTLS(), node.ClientTLS(nodeMember), [2]sandbox.Member{}, "no certificate yet"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			atServer, atClient, err := shake(t, tt.server, tt.client)
			if tt.refused != "" {
				if err == nil || !strings.Contains(err.Error(), tt.refused) {
					t.Fatalf("error %v, want one with %q", err, tt.refused)
				}
				return
			}
			if diff := cmp.Diff(tt.want, [2]sandbox.Member{atServer, atClient}); err != nil || diff != "" {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}

func TestProtocols(t *testing.T) {
	a := newAuthority(t)
	server, node := joined(t, a, "", serverMember, time.Hour), joined(t, a, "", nodeMember, time.Hour)
	client := node.ClientTLS(serverMember)
	client.NextProtos = []string{"other"}
	if _, _, err := shake(t, server.ServerTLS("cloister"), client); err == nil || !strings.Contains(err.Error(), "application protocol") {
		t.Errorf("another protocol: %v", err)
	}
	client.NextProtos = []string{"cloister"}
	if _, _, err := shake(t, server.ServerTLS("cloister"), client); err != nil {
		t.Error(err)
	}
}

func TestIdentityIsKept(t *testing.T) {
	a, dir := newAuthority(t), filepath.Join(t.TempDir(), "identity")
	if _, err := OpenIdentity(dir); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("nothing there: %v, want ErrNotFound", err)
	}
	first, err := NewIdentity(dir, nodeMember)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewIdentity(dir, nodeMember); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("a second identity: %v, want ErrConflict", err)
	}
	// A join that was cut off goes on with the same key.
	again, err := OpenIdentity(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again.Joined() || again.ClusterID() != "" || again.Serial() != "" || !again.Expires().IsZero() || again.Member() != nodeMember {
		t.Errorf("%+v before the join", again.now().kept)
	}
	if keyOf(t, first) != keyOf(t, again) {
		t.Error("the second attempt has another key")
	}
	if err := a.Reissue(again, time.Hour, []string{"10.0.0.1:3003"}); err != nil {
		t.Fatal(err)
	}
	before := again.Serial()
	opened, err := OpenIdentity(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !opened.Joined() || opened.ClusterID() != testCluster || opened.Serial() != before || !opened.Expires().Equal(again.Expires()) ||
		!cmp.Equal(opened.Servers(), []string{"10.0.0.1:3003"}) {
		t.Errorf("opened %+v", opened.now().kept)
	}
	key := keyOf(t, opened)
	if err := a.Reissue(opened, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	if opened.Serial() == before || keyOf(t, opened) == key {
		t.Error("a renewal changed neither key nor certificate")
	}
	info, err := os.Stat(filepath.Join(dir, identityFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for range 2 {
		if err := Remove(dir); err != nil {
			t.Error(err)
		}
	}
}

func keyOf(t *testing.T, i *Identity) string {
	t.Helper()
	text, err := encodeKey(i.now().key)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A handshake after a renewal uses the new certificate, without new settings for the listener.
func TestRenewalIsInForce(t *testing.T) {
	a := newAuthority(t)
	server, node := joined(t, a, "", serverMember, time.Nanosecond), joined(t, a, "", nodeMember, time.Hour)
	listener := server.ServerTLS()
	if _, _, err := shake(t, listener, node.ClientTLS(serverMember)); err == nil {
		t.Error("an expired server was good enough")
	}
	if err := a.Reissue(server, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := shake(t, listener, node.ClientTLS(serverMember)); err != nil {
		t.Error(err)
	}
}

func TestSaveRefusals(t *testing.T) {
	a, i := newAuthority(t), joined(t, newAuthority(t), "", nodeMember, time.Hour)
	r, err := i.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	sign := func(by *Authority, der []byte, m sandbox.Member) []byte {
		chain, _, err := by.Sign(der, m, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return chain
	}
	other, err := i.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	before := i.Serial()
	for name, g := range map[string]Grant{
		"nothing":           {AuthorityPEM: a.CertPEM()},
		"junk":              {CertPEM: []byte("junk"), AuthorityPEM: a.CertPEM()},
		"another key":       {CertPEM: sign(a, other.DER, nodeMember), AuthorityPEM: a.CertPEM()},
		"another member":    {CertPEM: sign(a, r.DER, serverMember), AuthorityPEM: a.CertPEM()},
		"another authority": {CertPEM: sign(newAuthority(t), r.DER, nodeMember), AuthorityPEM: a.CertPEM()},
		"no authority":      {CertPEM: sign(a, r.DER, nodeMember)},
	} {
		if err := i.Save(r, g); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if i.Serial() != before {
		t.Error("a refused grant is in force")
	}
}

func TestDamagedIdentity(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "no member": "{}", "no key": `{"role":"node","id":"abc123"}`, "no object": `[]`,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, identityFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenIdentity(dir); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
}

func TestRenewAt(t *testing.T) {
	i := joined(t, newAuthority(t), "", nodeMember, 24*time.Hour)
	now := time.Now()
	for random, share := range map[float64]float64{0: 0.5, 0.5: 0.585, 0.999: 0.67} {
		got := i.RenewAt(now, random).Sub(now).Hours() / 24
		if got < share-0.001 || got > share+0.001 {
			t.Errorf("at %g: after %.3f of the life, want %.3f", random, got, share)
		}
	}
	if late := now.Add(48 * time.Hour); !i.RenewAt(late, 0).Equal(late) {
		t.Error("a late renewal is not due now")
	}
	blank, err := NewIdentity("", nodeMember)
	if err != nil || !blank.RenewAt(now, 0).Equal(now) {
		t.Errorf("without a certificate: %v", err)
	}
}

// TestRotation replaces the authority in three steps, while old and new members talk to each other.
func TestRotation(t *testing.T) {
	old, next := newAuthority(t), newAuthority(t)
	first, err := old.Trusting(next)
	if err != nil {
		t.Fatal(err)
	}
	second, err := next.Trusting(old)
	if err != nil {
		t.Fatal(err)
	}
	talk := func(step string, a, b *Identity, want bool) {
		t.Helper()
		if _, _, err := shake(t, a.ServerTLS(), b.ClientTLS(serverMember)); (err == nil) != want {
			t.Errorf("%s: %v, want success %v", step, err, want)
		}
	}
	server, node := joined(t, first, "", serverMember, time.Hour), joined(t, old, "", nodeMember, time.Hour)
	talk("one renewed, trusting both", server, node, true)
	if err := first.Reissue(node, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	if err := second.Reissue(server, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	talk("the server has one of the new", server, node, true)
	if err := second.Reissue(node, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	if err := next.Reissue(server, time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	talk("the server trusts the new alone", server, node, true)
	talk("one that was left behind", server, joined(t, old, "", nodeMember, time.Hour), false)

	key, err := second.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := LoadAuthority(second.CertPEM(), key)
	if err != nil || loaded.Fingerprint() != next.Fingerprint() {
		t.Fatalf("fingerprint %v, %v", loaded, err)
	}
	token, err := old.MintToken()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := loaded.ReadToken(token); err != nil {
		t.Errorf("a token from before: %v", err)
	}
	third, err := NewAuthority("other")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := old.Trusting(third); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("another cluster's authority: %v", err)
	}
}
