package link

import "github.com/cloister-dev/cloister/internal/sandbox"

// Ready reports whether both connections of a link are there.
func Ready(l *Link) bool { return l.sessionFor(RPC) != nil && l.sessionFor(Guest) != nil }

// HubReady reports whether both connections of a member's link are there.
func HubReady(h *Hub, m sandbox.Member) bool {
	h.mu.Lock()
	p := h.peers[m]
	h.mu.Unlock()
	return p != nil && p.sessionFor(RPC) != nil && p.sessionFor(Guest) != nil
}
