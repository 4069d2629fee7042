package daemon

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// refused is whom a node lets in no more, as its server last told it. It is kept beside the node's identity: a node that starts
// again while no server is reached refuses the same.
type refused struct {
	// path is the file that keeps it.
	path string
	log  *slog.Logger
	// onNews is called after each change, without the lock.
	onNews func()

	mu      sync.RWMutex
	version string
	all     map[sandbox.Refusal]struct{}
	// unsaved means that the file does not have it yet. Of reports, which alone write it, there is one at a time.
	unsaved bool
}

// keptRefused is what the file holds.
type keptRefused struct {
	Version string        `json:"version"`
	Refused []keptRefusal `json:"refused"`
}

type keptRefusal struct {
	Member string `json:"member"`
	Serial string `json:"serial,omitempty"`
}

// openRefused reads whom the node refused when it last ran. A file that cannot be read is told of and counts as none: the
// server is then asked for all of it.
func openRefused(dataDir string, log *slog.Logger) *refused {
	r := &refused{path: filepath.Join(dataDir, identityDir, "refused.json"), log: log, onNews: func() {}}
	text, err := os.ReadFile(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return r
	}
	var k keptRefused
	if err == nil {
		err = json.Unmarshal(text, &k)
	}
	if err != nil {
		log.Warn("whom this node refuses is not known until a server is reached", slog.String("file", r.path), slog.Any("err", err))
		return r
	}
	r.version, r.all = k.Version, make(map[sandbox.Refusal]struct{}, len(k.Refused))
	for _, one := range k.Refused {
		r.add(r.all, one.Member, one.Serial)
	}
	return r
}

// add leaves out what is named as nobody's who could be a member.
func (*refused) add(all map[sandbox.Refusal]struct{}, member, serial string) {
	if m, err := sandbox.ParseMember(member); err == nil {
		all[sandbox.Refusal{Member: m, Serial: serial}] = struct{}{}
	}
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

// take takes what a server answered a report with, and keeps it; what could not be kept is tried again with the next answer.
func (r *refused) take(resp *nodev1.ReportResponse) {
	news := resp.GetRefusalsVersion() != ""
	if news {
		all := make(map[sandbox.Refusal]struct{}, len(resp.GetRefusals()))
		for _, w := range resp.GetRefusals() {
			r.add(all, w.GetMember(), w.GetSerial())
		}
		r.mu.Lock()
		r.version, r.all, r.unsaved = resp.GetRefusalsVersion(), all, true
		r.mu.Unlock()
		r.onNews()
	}
	r.save(news)
}

// save writes the file where it lacks something; only the first failure is told of.
func (r *refused) save(first bool) {
	k, unsaved := r.toKeep()
	if !unsaved {
		return
	}
	text, err := json.Marshal(k)
	if err == nil {
		err = writeSecret(r.path, string(text)+"\n")
	}
	if err != nil {
		if first {
			r.log.Warn("whom this node refuses was not kept, trying again", slog.Any("err", fmt.Errorf("write %s: %w", r.path, err)))
		}
		return
	}
	r.mu.Lock()
	r.unsaved = false
	r.mu.Unlock()
}

// toKeep returns what the file is to hold; false where it does already.
func (r *refused) toKeep() (keptRefused, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	k := keptRefused{Version: r.version}
	if !r.unsaved {
		return k, false
	}
	for one := range r.all {
		k.Refused = append(k.Refused, keptRefusal{Member: one.Member.String(), Serial: one.Serial})
	}
	slices.SortFunc(k.Refused, func(a, b keptRefusal) int {
		return cmp.Or(cmp.Compare(a.Member, b.Member), cmp.Compare(a.Serial, b.Serial))
	})
	return k, true
}
