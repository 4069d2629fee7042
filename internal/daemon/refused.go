package daemon

import (
	"sync"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// refused is whom a node lets in no more, as its server last told it.
type refused struct {
	// onNews is called after each change, without the lock.
	onNews func()

	mu      sync.RWMutex
	version string
	all     map[sandbox.Refusal]struct{}
}

// denied is meant for every handshake.
func (r *refused) denied(m sandbox.Member, serial string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, gone := r.all[sandbox.Refusal{Member: m}]
	_, old := r.all[sandbox.Refusal{Member: m, Serial: serial}]
	return gone || old
}

// gone reports whether a member was removed, whatever its certificate.
func (r *refused) gone(m sandbox.Member) bool { return r.denied(m, "") }

func (r *refused) known() string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.version
}

// take takes what a server answered a report with. What it does not name as a member is nobody here, and left out.
func (r *refused) take(resp *nodev1.ReportResponse) {
	if resp.GetRefusalsVersion() == "" {
		return
	}
	all := make(map[sandbox.Refusal]struct{}, len(resp.GetRefusals()))
	for _, w := range resp.GetRefusals() {
		if m, err := sandbox.ParseMember(w.GetMember()); err == nil {
			all[sandbox.Refusal{Member: m, Serial: w.GetSerial()}] = struct{}{}
		}
	}
	r.mu.Lock()
	r.version, r.all = resp.GetRefusalsVersion(), all
	r.mu.Unlock()
	r.onNews()
}
