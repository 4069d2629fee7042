package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Kind is what a stream is for.
type Kind uint8

// The kinds of stream.
const (
	// RPC carries HTTP/2: calls to the handler of whoever accepts it.
	RPC Kind = 1
	// Guest carries the bytes of a connection to a port of a sandbox.
	Guest Kind = 2
	// Artifact carries HTTP/1.1: images and checkpoints.
	Artifact Kind = 3
)

// String names the kind for people.
func (k Kind) String() string {
	switch k {
	case RPC:
		return "rpc"
	case Guest:
		return "guest"
	case Artifact:
		return "artifact"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Head begins a stream.
type Head struct {
	Kind Kind
	// Node is who shall accept the stream; empty for whoever is at the other end. A server passes a stream on to the node.
	Node sandbox.NodeID
	// Sandbox and Port are where a guest stream goes.
	Sandbox sandbox.ID
	Port    uint16
	// From is who opened a stream that a server passes on. Only servers may set it.
	From sandbox.Member
}

// GuestHead returns the head of a stream to a port of a sandbox on a node.
func GuestHead(node sandbox.NodeID, id sandbox.ID, port uint16) Head {
	return Head{Kind: Guest, Node: node, Sandbox: id, Port: port}
}

const (
	headVersion = 1
	maxHead     = 255
)

// check refuses what cannot be a head. Errors: ErrInvalid.
func (h *Head) check() error {
	if h.Kind < RPC || h.Kind > Artifact {
		return sandbox.Invalidf("stream of %s: want rpc, guest or artifact", h.Kind)
	}
	if h.Node != "" {
		if err := sandbox.CheckMember(sandbox.Member{Role: sandbox.RoleNode, ID: string(h.Node)}); err != nil {
			return fmt.Errorf("node of a stream: %w", err)
		}
	}
	if h.From != (sandbox.Member{}) {
		if err := sandbox.CheckMember(h.From); err != nil {
			return fmt.Errorf("origin of a stream: %w", err)
		}
	}
	if h.Kind != Guest {
		if h.Sandbox != "" || h.Port != 0 {
			return sandbox.Invalidf("stream of %s with sandbox %.20q and port %d: want none", h.Kind, string(h.Sandbox), h.Port)
		}
		return nil
	}
	if _, err := sandbox.ParseID(string(h.Sandbox)); err != nil {
		return err
	}
	if h.Port == 0 {
		return sandbox.Invalidf("port 0 of sandbox %s: want 1 to 65535", h.Sandbox)
	}
	return nil
}

// append adds the head to b: its length, the version, the kind, three texts with their lengths, the port, the origin's role.
func (h *Head) append(b []byte) ([]byte, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	at := len(b)
	b = append(b, 0, headVersion, byte(h.Kind), roleCode(h.From.Role))
	b = appendText(b, h.From.ID)
	b = appendText(b, string(h.Node))
	b = appendText(b, string(h.Sandbox))
	b = binary.BigEndian.AppendUint16(b, h.Port)
	b[at] = byte(len(b) - at - 1) //nolint:gosec // check has bounded every text: 255 are never reached
	return b, nil
}

func appendText(b []byte, text string) []byte {
	return append(append(b, byte(len(text))), text...) //nolint:gosec // check has bounded it
}

// readHead reads one head and not a byte more. Errors: ErrInvalid for what is no head of this version.
func readHead(r io.Reader) (Head, error) {
	var buf [1 + maxHead]byte
	if _, err := io.ReadFull(r, buf[:1]); err != nil {
		return Head{}, fmt.Errorf("read head: %w", err)
	}
	body := buf[1 : 1+int(buf[0])]
	if _, err := io.ReadFull(r, body); err != nil {
		return Head{}, fmt.Errorf("read head: %w", err)
	}
	return parseHead(body)
}

func parseHead(body []byte) (Head, error) {
	if len(body) < 3 || body[0] != headVersion {
		return Head{}, sandbox.Invalidf("head of %d bytes, version %d: this version speaks %d", len(body), versionOf(body), headVersion)
	}
	role, ok := roleOf(body[2])
	if !ok {
		return Head{}, sandbox.Invalidf("role %d in a head", body[2])
	}
	h := Head{Kind: Kind(body[1])}
	rest := body[3:]
	var texts [3]string
	for i := range texts {
		if len(rest) == 0 || len(rest)-1 < int(rest[0]) {
			return Head{}, sandbox.Invalidf("head of %d bytes ends early", len(body))
		}
		texts[i], rest = string(rest[1:1+rest[0]]), rest[1+rest[0]:]
	}
	if len(rest) != 2 {
		return Head{}, sandbox.Invalidf("head of %d bytes: want 2 after its texts, not %d", len(body), len(rest))
	}
	h.From = sandbox.Member{Role: role, ID: texts[0]}
	h.Node, h.Sandbox = sandbox.NodeID(texts[1]), sandbox.ID(texts[2])
	h.Port = binary.BigEndian.Uint16(rest)
	return h, h.check()
}

func versionOf(body []byte) byte {
	if len(body) == 0 {
		return 0
	}
	return body[0]
}

func roleCode(r sandbox.Role) byte {
	switch r {
	case sandbox.RoleServer:
		return 1
	case sandbox.RoleNode:
		return 2
	case sandbox.RoleProxy:
		return 3
	}
	return 0
}

func roleOf(code byte) (sandbox.Role, bool) {
	switch code {
	case 0:
		return "", true
	case 1:
		return sandbox.RoleServer, true
	case 2:
		return sandbox.RoleNode, true
	case 3:
		return sandbox.RoleProxy, true
	}
	return "", false
}

// MayOpen refuses kinds of stream that a member of a role may not open on a node: proxies open guest streams, nodes
// artifacts, servers everything. Errors: ErrDenied.
func MayOpen(role sandbox.Role, kind Kind) error {
	switch {
	case role == sandbox.RoleServer,
		role == sandbox.RoleProxy && kind == Guest,
		role == sandbox.RoleNode && kind == Artifact:
		return nil
	}
	return sandbox.Deniedf("a %s may not open %s streams on a node", role, kind)
}

// errShort is what a stream ends with that was cut while its head or answer was read.
var errShort = errors.Join(io.ErrUnexpectedEOF, sandbox.ErrUnavailable)
