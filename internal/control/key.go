package control

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Key is an API key without what opens anything.
type Key struct {
	ID   string
	Name string
	// Hint is the key's first and last characters.
	Hint       string
	CreatedAt  time.Time
	LastUsedAt time.Time
}

// ListKeys returns all keys, the oldest first.
func (c *Control) ListKeys(ctx context.Context) ([]Key, error) {
	all, err := c.keys.Keys(ctx)
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	return all, nil
}

const maxKeyName = 64

// CreateKey makes a key and returns it with its secret, which can never be seen again. Errors: ErrInvalid.
func (c *Control) CreateKey(ctx context.Context, name string) (Key, string, error) {
	name = strings.TrimSpace(name)
	if name == "" || len(name) > maxKeyName || strings.ContainsFunc(name, unicode.IsControl) {
		return Key{}, "", sandbox.Invalidf("key name %.80q: want 1 to %d bytes without control characters, as in laptop", name, maxKeyName)
	}
	k, secret, err := c.keys.CreateKey(ctx, name)
	if err != nil {
		return Key{}, "", fmt.Errorf("create key %q: %w", name, err)
	}
	c.note(ctx, Event{Type: "key_created", Message: fmt.Sprintf("key %s created", name), Fields: map[string]string{"key_id": k.ID}})
	return k, secret, nil
}

// RevokeKey makes a key useless at once. Errors: ErrNotFound, ErrConflict for the last one.
func (c *Control) RevokeKey(ctx context.Context, id string) error {
	if err := c.keys.RevokeKey(ctx, id); err != nil {
		return fmt.Errorf("revoke key: %w", err)
	}
	c.note(ctx, Event{Type: "key_revoked", Message: "key revoked", Fields: map[string]string{"key_id": id}})
	return nil
}
