package control

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"strings"
	"sync"

	"golang.org/x/time/rate"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Signed is a signed file URL, which names no sandbox: the signature is made with the token of one.
type Signed struct {
	Path string
	// Operation is read or write.
	Operation string
	User      string
	// Expiration is the text of signature_expiration, "" where there is none.
	Expiration string
	// Signature is "v1_" and the unpadded base64 of a SHA-256.
	Signature string
}

const (
	signaturePrefix = "v1_"
	// maxTried bounds the sandboxes that are tried for one signature, the newest first.
	maxTried = 20_000
	// maxFound bounds the remembered answers.
	maxFound = 4096
	// maxSigned bounds the bytes that are hashed for each sandbox.
	maxSigned = 8192
	// searchesPerSecond bounds searches: a wrong signature costs a try of every sandbox.
	searchesPerSecond = 20
)

// finder remembers which sandbox a signature belongs to.
type finder struct {
	searches *rate.Limiter

	mu    sync.Mutex
	found map[[sha256.Size]byte]sandbox.ID
}

func newFinder() *finder {
	return &finder{searches: rate.NewLimiter(searchesPerSecond, searchesPerSecond), found: make(map[[sha256.Size]byte]sandbox.ID)}
}

func (f *finder) get(sum [sha256.Size]byte) (sandbox.ID, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id, ok := f.found[sum]
	return id, ok
}

func (f *finder) put(sum [sha256.Size]byte, id sandbox.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.found) >= maxFound {
		clear(f.found)
	}
	f.found[sum] = id
}

// SandboxBySignature finds the live sandbox whose token made the signature. It only finds: whether the URL has expired
// is for the agent inside to say. Errors: ErrInvalid for what can be no signature, ErrNotFound, and ErrExhausted while
// too many unknown signatures are asked for.
func (c *Control) SandboxBySignature(ctx context.Context, s Signed) (sandbox.ID, error) {
	text, ok := strings.CutPrefix(s.Signature, signaturePrefix)
	raw, err := base64.RawStdEncoding.DecodeString(text)
	if !ok || err != nil || len(raw) != sha256.Size {
		return "", sandbox.Invalidf("signature %.60q: want v1_ and 43 characters of base64", s.Signature)
	}
	if n := len(s.Path) + len(s.Operation) + len(s.User) + len(s.Expiration); n > maxSigned {
		return "", sandbox.Invalidf("the signed parts have %d bytes: want at most %d", n, maxSigned)
	}
	want := [sha256.Size]byte(raw)
	if id, ok := c.finder.get(want); ok && c.signed(id, s, want) {
		return id, nil
	}
	if !c.finder.searches.Allow() {
		return "", sandbox.Exhaustedf("too many unknown signatures: try again in a second")
	}
	id, err := c.search(ctx, s, want)
	if err == nil {
		c.finder.put(want, id)
	}
	return id, err
}

// signed reports whether the sandbox is live and the signature is its own.
func (c *Control) signed(id sandbox.ID, s Signed, want [sha256.Size]byte) bool {
	box, ok := c.index.get(id)
	if !ok || box.State.Ended() {
		return false
	}
	sum := c.sign(id, s)
	return subtle.ConstantTimeCompare(sum[:], want[:]) == 1
}

func (c *Control) sign(id sandbox.ID, s Signed) [sha256.Size]byte {
	text := s.Path + ":" + s.Operation + ":" + s.User + ":" + sandbox.AccessToken(c.secret, id)
	if s.Expiration != "" {
		text += ":" + s.Expiration
	}
	return sha256.Sum256([]byte(text))
}

// search tries the live sandboxes, some at a time, so that no lock is held while hashes are made.
func (c *Control) search(ctx context.Context, s Signed, want [sha256.Size]byte) (sandbox.ID, error) {
	const batch = 128
	_, from := ends()
	for tried, done := 0, false; !done && tried < maxTried && ctx.Err() == nil; {
		ids := make([]sandbox.ID, 0, batch)
		c.index.scan(true, from, func(e *entry) bool {
			from = e.place()
			if e.box.Secure && !e.box.State.Ended() {
				ids = append(ids, e.box.ID)
			}
			return len(ids) < batch
		})
		done = len(ids) < batch
		for _, id := range ids {
			sum := c.sign(id, s)
			if subtle.ConstantTimeCompare(sum[:], want[:]) == 1 {
				return id, nil
			}
		}
		tried += len(ids)
	}
	return "", sandbox.NotFoundf("no running sandbox made this signature")
}
