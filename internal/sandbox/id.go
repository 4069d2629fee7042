package sandbox

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// The parts of a sandbox's id: a letter, the id of the node that made it, and a random rest.
const (
	idPrefix   = "i"
	nodeIDLen  = 6
	idRandLen  = 13
	maxIDLen   = 64
	idLen      = len(idPrefix) + nodeIDLen + idRandLen
	idAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
)

// ID names a sandbox. It matches ^[a-z0-9]+$, as the E2B SDKs require, is 20 characters long, and carries the NodeID of
// the node that made it, so that a proxy without an index can find the sandbox.
type ID string

// NodeID names a node: 6 characters of [a-z0-9], chosen once by the node.
type NodeID string

// TemplateID names a template: 20 characters of [a-z0-9].
type TemplateID string

// NewID returns a fresh sandbox id of the given node. The random part has 67 bits.
func NewID(node NodeID) ID { return ID(idPrefix + string(node) + randomText(idRandLen)) }

// NewNodeID returns a fresh node id.
func NewNodeID() NodeID { return NodeID(randomText(nodeIDLen)) }

// NewTemplateID returns a fresh template id.
func NewTemplateID() TemplateID { return TemplateID(randomText(20)) }

// ParseID checks that s can name a sandbox: 1 to 64 characters of [a-z0-9].
func ParseID(s string) (ID, error) {
	if len(s) < 1 || len(s) > maxIDLen || strings.Trim(s, idAlphabet) != "" {
		return "", Invalidf("sandbox id %.80q: want 1 to 64 characters of a-z and 0-9", s)
	}
	return ID(s), nil
}

// Node returns the node that made the sandbox, or "" where the id was not made by NewID.
func (id ID) Node() NodeID {
	if len(id) != idLen || id[:len(idPrefix)] != idPrefix {
		return ""
	}
	return NodeID(id[len(idPrefix) : len(idPrefix)+nodeIDLen])
}

// randomText returns n characters of idAlphabet, each equally likely.
func randomText(n int) string {
	const limit = 256 - 256%len(idAlphabet)
	out := make([]byte, 0, n)
	var buf [32]byte
	for len(out) < n {
		_, _ = rand.Read(buf[:]) // never fails: crypto/rand ends the program first
		for _, b := range buf {
			if int(b) < limit && len(out) < n {
				out = append(out, idAlphabet[int(b)%len(idAlphabet)])
			}
		}
	}
	return string(out)
}

// AccessToken returns the token that the agent inside a secure sandbox demands: hex of HMAC-SHA-256 over the id, keyed
// with the cluster's token secret. Deriving it means that no copy of it is ever stored or reported.
func AccessToken(secret []byte, id ID) string {
	mac := hmac.New(sha256.New, secret)
	_, _ = mac.Write([]byte("access:" + id)) // a hash never fails
	return hex.EncodeToString(mac.Sum(nil))
}
