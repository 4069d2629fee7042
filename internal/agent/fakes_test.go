package agent

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// fakeNet hands out addresses. Its networks outlive the node's process; what the process knows of them does not.
type fakeNet struct {
	mu       sync.Mutex
	next     uint32
	exists   map[sandbox.ID]netip.Addr
	known    map[sandbox.ID]guestnet.Policy
	failNext error
}

func newFakeNet() *fakeNet {
	return &fakeNet{exists: map[sandbox.ID]netip.Addr{}, known: map[sandbox.ID]guestnet.Policy{}}
}

func (f *fakeNet) restart() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.known)
}

// wipe takes every network away, as a restart of the machine does.
func (f *fakeNet) wipe() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.exists)
	clear(f.known)
}

func (f *fakeNet) ids() []sandbox.ID {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.exists))
}

func (f *fakeNet) owner(a netip.Addr) (sandbox.ID, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, o := range f.exists {
		if o == a {
			return id, true
		}
	}
	return "", false
}

func (f *fakeNet) policy(id sandbox.ID) guestnet.Policy {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.known[id]
}

func (f *fakeNet) Acquire(_ context.Context, id sandbox.ID, p guestnet.Policy) (guestnet.Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failNext; err != nil {
		f.failNext = nil
		return guestnet.Attachment{}, err
	}
	if _, has := f.exists[id]; has {
		return guestnet.Attachment{}, sandbox.Conflictf("sandbox %s has a network", id)
	}
	f.next++
	addr := netip.AddrFrom4([4]byte{10, byte(f.next >> 16), byte(f.next >> 8), byte(f.next)})
	f.exists[id], f.known[id] = addr, p
	return guestnet.Attachment{SandboxID: id, NetNS: "/proc/1/fd/9", Link: "clo" + string(id), GuestAddr: addr, Gateway: addr}, nil
}

func (f *fakeNet) SetPolicy(_ context.Context, id sandbox.ID, p guestnet.Policy) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.known[id]; !ok {
		return sandbox.NotFoundf("sandbox %s has no network", id)
	}
	f.known[id] = p
	return nil
}

func (f *fakeNet) Adopt(_ context.Context, a guestnet.Attachment, p guestnet.Policy) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.exists[a.SandboxID] != a.GuestAddr || !a.GuestAddr.IsValid() {
		return sandbox.NotFoundf("link %s is gone", a.Link)
	}
	f.known[a.SandboxID] = p
	return nil
}

func (f *fakeNet) Release(_ context.Context, id sandbox.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.known[id]; ok {
		delete(f.known, id)
		delete(f.exists, id)
	}
	return nil
}

func (f *fakeNet) Sweep(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range f.exists {
		if _, ok := f.known[id]; !ok {
			delete(f.exists, id)
		}
	}
	return nil
}

// fakeImages has images by name.
type fakeImages struct {
	mu    sync.Mutex
	have  map[string]image.Image
	build func(ctx context.Context, r image.Request, progress func(image.Progress)) (image.Image, error)
	fakeComposer
}

func (f *fakeImages) add(name string) image.Image {
	f.mu.Lock()
	defer f.mu.Unlock()
	im := image.Image{Digest: digestOf(name), Bytes: 100 * mib, Source: name}
	f.have[im.Digest] = im
	return im
}

func (f *fakeImages) Build(ctx context.Context, r image.Request, progress func(image.Progress)) (image.Image, error) {
	f.mu.Lock()
	build := f.build
	f.mu.Unlock()
	if build != nil {
		return build(ctx, r, progress)
	}
	progress(image.Progress{Step: "pull", Fraction: 0.5, Message: "pulling " + r.Sources[0]})
	return f.add(r.Sources[0]), nil
}

func (f *fakeImages) Path(digest string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.have[digest]; !ok {
		return "", sandbox.NotFoundf("image %s is not in the cache", digest)
	}
	return "/images/" + digest, nil
}

func (f *fakeImages) Remove(_ context.Context, digest string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.have[digest]; !ok {
		return sandbox.NotFoundf("image %s is not in the cache", digest)
	}
	delete(f.have, digest)
	return nil
}

func (f *fakeImages) List(context.Context) ([]image.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.have)), nil
}

func (f *fakeImages) Recover(context.Context) error { return nil }

// fakeServer takes reports as a server does.
type fakeServer struct {
	secret []byte

	mu         sync.Mutex
	epoch      int64
	acked      int64
	history    []string // type, id and sequence of each change, once
	seen       map[int64]bool
	index      map[string]*agentv1.Sandbox
	reports    []*nodev1.ReportRequest
	registered *nodev1.RegisterRequest // the last one
	// before is called with each report and may refuse it, also after it was taken (lost answers).
	before, after func(*nodev1.ReportRequest) error
	refuse        error
	cordoned      bool
	decides       time.Duration
}

func (s *fakeServer) Register(_ context.Context, r *nodev1.RegisterRequest) (*nodev1.RegisterResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.registered = r
	if s.refuse != nil {
		return nil, s.refuse
	}
	s.epoch++
	return &nodev1.RegisterResponse{Epoch: s.epoch, TokenSecret: s.secret, AcknowledgedSequence: s.acked}, nil
}

func (s *fakeServer) Report(_ context.Context, r *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.GetEpoch() != s.epoch {
		return nil, toWireError(sandbox.Conflictf("epoch %d is not %d", r.GetEpoch(), s.epoch))
	}
	if s.before != nil {
		if err := s.before(r); err != nil {
			return nil, err
		}
	}
	s.reports = append(s.reports, r)
	if s.seen == nil {
		s.seen, s.index = map[int64]bool{}, map[string]*agentv1.Sandbox{}
	}
	named := map[string]bool{}
	for _, c := range r.GetChanges() {
		b := c.GetSandbox()
		named[b.GetId()] = true
		if old := s.index[b.GetId()]; old == nil || old.GetGeneration() <= b.GetGeneration() {
			s.index[b.GetId()] = b
		}
		if !s.seen[c.GetSequence()] {
			s.seen[c.GetSequence()] = true
			s.history = append(s.history, fmt.Sprintf("%d %s %s", c.GetSequence(), c.GetType(), b.GetId()))
		}
		s.acked = max(s.acked, c.GetSequence())
	}
	if r.GetFull() {
		maps.DeleteFunc(s.index, func(id string, _ *agentv1.Sandbox) bool { return !named[id] })
	}
	if s.after != nil {
		if err := s.after(r); err != nil {
			return nil, err
		}
	}
	return &nodev1.ReportResponse{AcknowledgedSequence: s.acked, Cordoned: s.cordoned, Decides: durationpb.New(s.decides)}, nil
}

// decide has the server say from now on that it sees to ends, for so long from each report; 0: it does not.
func (s *fakeServer) decide(lasts time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decides = lasts
}

// busy returns what the newest report says is in use.
func (s *fakeServer) busy() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reports[len(s.reports)-1].GetBusy()
}

func (s *fakeServer) cordon(cordoned bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cordoned = cordoned
}

// restart imitates a server that forgot its nodes, and perhaps everything.
func (s *fakeServer) restart(forget bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch += 100
	if forget {
		s.acked, s.index = 0, map[string]*agentv1.Sandbox{}
	}
}

// types returns the types of the changes of a sandbox, in their order.
func (s *fakeServer) types(id sandbox.ID) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, h := range s.history {
		if f := strings.Fields(h); f[2] == string(id) {
			out = append(out, f[1])
		}
	}
	return strings.Join(out, " ")
}

func (s *fakeServer) state(id sandbox.ID) agentv1.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index[string(id)].GetState()
}

func (s *fakeServer) lastLoad() *agentv1.Load {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reports[len(s.reports)-1].GetLoad()
}
