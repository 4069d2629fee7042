package client

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// Token is one entry of GET /v1/tokens: a join token, without what lets anybody in.
type Token struct {
	ID   string `json:"id"`
	Role string `json:"role"`
	// State is "valid", "expired", "used" or "revoked".
	State string `json:"state"`
	// Uses is how many machines it lets in, 0 for any number; Used how many it has.
	Uses int `json:"uses"`
	Used int `json:"used"`
	// Replace means that who it lets in may take the place of a node that is down, by its name.
	Replace   bool      `json:"replace"`
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at"`
	RevokedAt time.Time `json:"revoked_at,omitzero"`
	// UsedBy are the machines that it let in, the last 100 where their number has no limit.
	UsedBy []TokenUse `json:"used_by"`
}

// TokenUse is one machine that a token let in.
type TokenUse struct {
	// Member is ROLE/ID.
	Member string    `json:"member"`
	Name   string    `json:"name"`
	At     time.Time `json:"at"`
}

// CreateToken is the body of POST /v1/tokens; all of it may be left out.
type CreateToken struct {
	// Role is "node", which is the default, or "proxy".
	Role string `json:"role,omitempty"`
	// TTLSeconds is 1 to 2592000, which is 30 days; 3600 by default.
	TTLSeconds int64 `json:"ttl_seconds,omitempty"`
	// Uses is how many machines the token lets in: 1 to 1000, or 0 for any number; 1 by default.
	Uses *int `json:"uses,omitempty"`
	// Replace lets a machine take the place of a node of its name that is down: that node is taken out of the cluster.
	Replace bool `json:"replace,omitempty"`
}

// CreatedToken answers POST /v1/tokens: the only time that the token itself is shown.
type CreatedToken struct {
	Token
	Text string `json:"token"`
	// Servers are HOST:PORT by which machines come in.
	Servers []string `json:"servers"`
}

// ClusterMember is one entry of GET /v1/members: a machine that joined.
type ClusterMember struct {
	Role     string    `json:"role"`
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	Version  string    `json:"version"`
	JoinedAt time.Time `json:"joined_at"`
	// CertificateExpiresAt is the end of its newest certificate, unless that is renewed.
	CertificateExpiresAt time.Time `json:"certificate_expires_at"`
	// KeyFingerprint is the hex SHA-256 of its public key.
	KeyFingerprint string `json:"key_fingerprint"`
}

// Tokens returns the join tokens, the oldest first.
func (c *Client) Tokens(ctx context.Context) ([]Token, error) {
	return get[[]Token](ctx, c, "/v1/tokens")
}

// CreateToken makes a join token; the answer is the only one that holds it.
func (c *Client) CreateToken(ctx context.Context, t CreateToken) (CreatedToken, error) {
	var out CreatedToken
	_, err := c.call(ctx, http.MethodPost, "/v1/tokens", t, &out)
	return out, err
}

// RevokeToken makes a join token worthless at once; whom it let in stays.
func (c *Client) RevokeToken(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "/v1/tokens/"+url.PathEscape(id), nil, nil)
	return err
}

// Members returns the machines that joined, by role and name.
func (c *Client) Members(ctx context.Context) ([]ClusterMember, error) {
	return get[[]ClusterMember](ctx, c, "/v1/members")
}
