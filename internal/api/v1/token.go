package v1

import (
	"math"
	"net/http"
	"time"

	"github.com/cloister-dev/cloister/internal/api/exchange"
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func (s *server) listTokens(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListTokens(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, tokenToWire))
}

func (s *server) createToken(w http.ResponseWriter, r *http.Request) error {
	var body client.CreateToken
	if err := exchange.Read(w, r, &body); err != nil {
		return err
	}
	const longest = int64(math.MaxInt64 / time.Second)
	ttl := time.Duration(max(-longest, min(longest, body.TTLSeconds))) * time.Second
	t, err := s.control.CreateToken(r.Context(), control.TokenRequest{Role: sandbox.Role(body.Role), TTL: ttl, Uses: body.Uses, Replace: body.Replace})
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusCreated, client.CreatedToken{Token: tokenToWire(t.Token), Text: t.Text, Servers: each(t.Servers, same)})
}

func (s *server) revokeToken(w http.ResponseWriter, r *http.Request) error {
	if err := s.control.RevokeToken(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	return exchange.Empty(w)
}

func (s *server) listMembers(w http.ResponseWriter, r *http.Request) error {
	all, err := s.control.ListMembers(r.Context())
	if err != nil {
		return err
	}
	return exchange.JSON(w, http.StatusOK, each(all, clusterMemberToWire))
}

// same makes [] of no list.
func same(s string) string { return s }

func tokenToWire(t control.Token) client.Token {
	return client.Token{
		ID: t.ID, Role: string(t.Role), State: t.State, Uses: t.Uses, Used: t.Used, Replace: t.Replace, CreatedAt: t.CreatedAt, ExpiresAt: t.ExpiresAt,
		RevokedAt: t.RevokedAt,
		UsedBy:    each(t.UsedBy, func(u control.TokenUse) client.TokenUse { return client.TokenUse(u) }),
	}
}

func clusterMemberToWire(m control.ClusterMember) client.ClusterMember {
	return client.ClusterMember{
		Role: string(m.Role), ID: m.ID, Name: m.Name, Version: m.Version, JoinedAt: m.JoinedAt, CertificateExpiresAt: m.ExpiresAt,
		KeyFingerprint: m.KeyFingerprint,
	}
}
