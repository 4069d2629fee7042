package link

import "github.com/cloister-dev/cloister/internal/sandbox"

// Ready reports whether both connections of a link are there.
func Ready(l *Link) bool { return whole(l.present()) }

// HubReady reports whether both connections of a member's link are there.
func HubReady(h *Hub, m sandbox.Member) bool {
	h.mu.Lock()
	p := h.peers[m]
	h.mu.Unlock()
	return p != nil && whole(&p.pair)
}

func whole(p *pair) bool {
	control, _ := p.get(RPC)
	bulk, _ := p.get(Guest)
	return control != nil && bulk != nil
}

// CutBulk ends the bulk connection of a member's link.
func CutBulk(h *Hub, m sandbox.Member) {
	h.mu.Lock()
	p := h.peers[m]
	h.mu.Unlock()
	if bulk, _ := p.get(Guest); bulk != nil {
		bulk.close()
	}
}
