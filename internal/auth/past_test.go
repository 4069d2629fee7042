package auth

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestReadPast(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	issue := func(by *Authority, m sandbox.Member) (certPEM, der []byte) {
		i, err := by.Issue(m, time.Minute, nil)
		if err != nil {
			t.Fatal(err)
		}
		certPEM, r, err := i.ReadmitRequest()
		if err != nil {
			t.Fatal(err)
		}
		return certPEM, r.DER
	}
	cert, der := issue(a, nodeMember)
	foreign, foreignDER := issue(other, nodeMember)
	ended := time.Now().Add(time.Minute)
	const grace = time.Hour
	past, err := a.ReadPast(cert, der, grace, ended.Add(grace/2))
	if err != nil || past.Member != nodeMember || past.Serial == "" || time.Since(past.IssuedAt) > 10*time.Second || past.IssuedAt.After(time.Now()) {
		t.Errorf("%+v, %v", past, err)
	}
	if _, err := a.ReadPast(cert, der, grace, time.Now()); err != nil {
		t.Errorf("one that has not ended: %v", err)
	}
	for name, tt := range map[string]struct {
		cert, der []byte
		at        time.Time
		kind      error
	}{
		"too late":        {cert, der, ended.Add(grace + time.Minute), sandbox.ErrDenied},
		"another key":     {cert, request(t, &x509.CertificateRequest{}), ended, sandbox.ErrDenied},
		"another cluster": {foreign, foreignDER, ended, sandbox.ErrDenied},
		"the authority's": {a.CertPEM(), der, ended, sandbox.ErrDenied},
		"no certificate":  {nil, der, ended, sandbox.ErrInvalid},
		"no request":      {cert, []byte("junk"), ended, sandbox.ErrInvalid},
		"much":            {make([]byte, maxChain+1), der, ended, sandbox.ErrInvalid},
	} {
		if _, err := a.ReadPast(tt.cert, tt.der, grace, tt.at); !errors.Is(err, tt.kind) {
			t.Errorf("%s: %v, want %v", name, err, tt.kind)
		}
	}
	if _, _, err := (&Identity{member: nodeMember}).ReadmitRequest(); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("before the join: %v", err)
	}
}

func FuzzReadPast(f *testing.F) {
	a, err := NewAuthority(testCluster)
	if err != nil {
		f.Fatal(err)
	}
	i, err := a.Issue(nodeMember, time.Minute, nil)
	if err != nil {
		f.Fatal(err)
	}
	cert, r, err := i.ReadmitRequest()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(cert, r.DER)
	f.Add(a.CertPEM(), r.DER)
	f.Fuzz(func(t *testing.T, cert, der []byte) {
		past, err := a.ReadPast(cert, der, time.Hour, time.Now())
		if err == nil && past.Member != nodeMember {
			t.Errorf("%v is let in", past.Member)
		}
	})
}
