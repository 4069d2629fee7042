package control

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// How long a join token lets machines in.
const (
	DefaultTokenTTL = time.Hour
	MinTokenTTL     = time.Second
	MaxTokenTTL     = 30 * 24 * time.Hour
)

// tokens keeps join tokens.
type tokens interface {
	CreateToken(ctx context.Context, t store.Token) error
	Tokens(ctx context.Context) ([]store.Token, error)
	RevokeToken(ctx context.Context, id string, now time.Time) error
}

// Token is a join token without what lets anybody in.
type Token struct {
	ID   string
	Role sandbox.Role
	// Uses is how many machines it lets in, 0 for any number; Used how many it has.
	Uses int
	Used int
	// Replace means that who it lets in may take the place of a node that is down, by its name.
	Replace   bool
	CreatedAt time.Time
	ExpiresAt time.Time
	// RevokedAt is set for one that was revoked.
	RevokedAt time.Time
	// State is "valid", "expired", "used" or "revoked".
	State  string
	UsedBy []TokenUse
}

// TokenUse is one machine that a token let in.
type TokenUse struct {
	// Member is ROLE/ID.
	Member string
	Name   string
	At     time.Time
}

// TokenRequest is what a join token shall be.
type TokenRequest struct {
	// Role is node where it is empty.
	Role sandbox.Role
	// TTL is 1 h where it is 0.
	TTL time.Duration
	// Uses is 1 where it is nil; 0 lets in any number.
	Uses *int
	// Replace lets a machine take the place of a node of its name that is down: that node is taken out of the cluster.
	Replace bool
}

// CreatedToken is a fresh token with its text, which can never be seen again.
type CreatedToken struct {
	Token
	Text string
	// Servers are HOST:PORT by which machines come in.
	Servers []string
}

// CreateToken makes a join token, and opens the port by which machines come in where it is not open yet.
// Errors: ErrInvalid, ErrUnsupported for servers, ErrConflict where the port is taken.
func (c *Control) CreateToken(ctx context.Context, req TokenRequest) (CreatedToken, error) {
	if err := c.joining.check(); err != nil {
		return CreatedToken{}, err
	}
	uses, err := req.check()
	if err != nil {
		return CreatedToken{}, err
	}
	if err := c.joining.gate.Open(ctx); err != nil {
		return CreatedToken{}, fmt.Errorf("create join token: %w", err)
	}
	text, err := c.joining.authority.MintToken()
	if err != nil {
		return CreatedToken{}, fmt.Errorf("create join token: %w", err)
	}
	id, hash, err := c.joining.authority.ReadToken(text)
	if err != nil {
		return CreatedToken{}, fmt.Errorf("create join token: %w", err)
	}
	now := time.Now().UTC()
	kept := store.Token{ID: id, Role: req.Role, Hash: hash, Uses: uses, Replace: req.Replace, CreatedAt: now, ExpiresAt: now.Add(req.TTL)}
	if err := c.joining.tokens.CreateToken(ctx, kept); err != nil {
		return CreatedToken{}, fmt.Errorf("create join token: %w", err)
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "join token created", slog.String("token_id", id), slog.String("role", string(req.Role)),
		slog.Int("uses", uses), slog.Time("expires", kept.ExpiresAt))
	c.note(ctx, Event{
		Type: "token_created", Message: fmt.Sprintf("join token %s for a %s created", id, req.Role),
		Fields: map[string]string{"token_id": id, "role": string(req.Role), "expires": kept.ExpiresAt.Format(time.RFC3339)},
	})
	return CreatedToken{Token: tokenFrom(kept, now), Text: text, Servers: c.joining.gate.Servers()}, nil
}

// check fills in what is left out, and returns the number of uses.
func (r *TokenRequest) check() (uses int, err error) {
	setDefault(&r.Role, sandbox.RoleNode)
	setDefault(&r.TTL, DefaultTokenTTL)
	uses = 1
	if r.Uses != nil {
		uses = *r.Uses
	}
	switch {
	case !r.Role.Valid():
		return 0, sandbox.Invalidf("role %.40q: want node or proxy", r.Role)
	case r.Role == sandbox.RoleServer:
		return 0, errOneServer()
	case r.Replace && r.Role != sandbox.RoleNode:
		return 0, sandbox.Invalidf("a %s takes nobody's place: replace is for nodes, what a %s had is gone with it", r.Role, r.Role)
	case r.TTL < MinTokenTTL || r.TTL > MaxTokenTTL:
		return 0, sandbox.Invalidf("ttl %s: want %s to %s", r.TTL, MinTokenTTL, MaxTokenTTL)
	case uses < 0 || uses > store.MaxTokenUses:
		return 0, sandbox.Invalidf("uses %d: want 1 to %d, or 0 for any number", uses, store.MaxTokenUses)
	}
	return uses, nil
}

// ListTokens returns all join tokens, the oldest first; those that ended more than 7 days ago may be missing.
func (c *Control) ListTokens(ctx context.Context) ([]Token, error) {
	if !c.joining.on() {
		return []Token{}, nil
	}
	all, err := c.joining.tokens.Tokens(ctx)
	if err != nil {
		return nil, fmt.Errorf("list join tokens: %w", err)
	}
	now := time.Now()
	out := make([]Token, 0, len(all))
	for _, t := range all {
		out = append(out, tokenFrom(t, now))
	}
	return out, nil
}

// RevokeToken makes a join token worthless at once; whom it let in stays. Errors: ErrNotFound.
func (c *Control) RevokeToken(ctx context.Context, id string) error {
	if err := c.joining.check(); err != nil {
		return err
	}
	if err := c.joining.tokens.RevokeToken(ctx, id, time.Now().UTC()); err != nil {
		return fmt.Errorf("revoke join token: %w", err)
	}
	c.note(ctx, Event{Type: "token_revoked", Message: fmt.Sprintf("join token %s revoked", id), Fields: map[string]string{"token_id": id}})
	return nil
}

func tokenFrom(t store.Token, now time.Time) Token {
	out := Token{
		ID: t.ID, Role: t.Role, Uses: t.Uses, Used: t.Used, Replace: t.Replace, CreatedAt: t.CreatedAt, ExpiresAt: t.ExpiresAt, RevokedAt: t.RevokedAt, State: "valid",
	}
	switch {
	case !t.RevokedAt.IsZero():
		out.State = "revoked"
	case t.Uses > 0 && t.Used >= t.Uses:
		out.State = "used"
	case t.Ended(now):
		out.State = "expired"
	}
	for _, u := range t.UsedBy {
		out.UsedBy = append(out.UsedBy, TokenUse{Member: u.Member, Name: u.Name, At: u.At})
	}
	return out
}
