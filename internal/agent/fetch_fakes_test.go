package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Images that the fake has are names alone: what is moved between nodes is in realImages.
func (f *fakeImages) Open(_ context.Context, digest string) (image.Image, *os.File, error) {
	return image.Image{}, nil, sandbox.NotFoundf("image %s has no file", digest)
}

func (f *fakeImages) Import(_ context.Context, digest string) (*image.Import, error) {
	return nil, sandbox.Unsupportedf("image %s cannot be got", digest)
}

func (f *fakeImages) SweepPartial(context.Context) error { return nil }

// realImages has images with contents, and those of the fake.
type realImages struct {
	*fakeImages
	store *image.Store
}

func (r realImages) Open(ctx context.Context, digest string) (image.Image, *os.File, error) {
	return r.store.Open(ctx, digest)
}

func (r realImages) Import(ctx context.Context, digest string) (*image.Import, error) {
	return r.store.Import(ctx, digest)
}

func (r realImages) SweepPartial(ctx context.Context) error { return r.store.SweepPartial(ctx) }

func (r realImages) Get(ctx context.Context, digest string) (image.Image, error) {
	if im, err := r.store.Get(ctx, digest); err == nil {
		return im, nil
	}
	return r.fakeImages.Get(ctx, digest)
}

func (r realImages) Path(digest string) (string, error) {
	if path, err := r.store.Path(digest); err == nil {
		return path, nil
	}
	return r.fakeImages.Path(digest)
}

func (r realImages) List(ctx context.Context) ([]image.Image, error) {
	all, err := r.store.List(ctx)
	if err != nil {
		return nil, err
	}
	more, err := r.fakeImages.List(ctx)
	return append(all, more...), err
}

func (r realImages) Remove(ctx context.Context, digest string) error {
	if err := r.store.Remove(ctx, digest); err == nil {
		return nil
	}
	return r.fakeImages.Remove(ctx, digest)
}

// realImages gives a machine images with contents, and makes one if it is asked for.
func (m *machine) realImages(content string) (digest string) {
	m.t.Helper()
	store, err := image.New(image.Config{Dir: filepath.Join(m.dir, "images")})
	m.check(err)
	m.check(store.Recover(m.t.Context()))
	m.files = func(f *fakeImages) images { return realImages{f, store} }
	if content == "" {
		return ""
	}
	dir := m.t.TempDir()
	m.check(os.WriteFile(filepath.Join(dir, "content"), []byte(content), 0o600))
	im, err := store.Build(m.t.Context(), image.Request{Sources: []string{"dir:" + dir}}, nil)
	m.check(err)
	return im.Digest
}

// wire connects nodes to each other.
type wire struct {
	mu    sync.Mutex
	nodes map[sandbox.NodeID]*node
	dials int
	// image is one that the first node has.
	image string
	// spoil may put something around each connection, from the side of who dials.
	spoil func(net.Conn) net.Conn
}

func newWire() *wire { return &wire{nodes: map[sandbox.NodeID]*node{}} }

// add makes nodes reachable, and returns them as peers.
func (w *wire) add(nodes ...*node) (out []*agentv1.Peer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range nodes {
		w.nodes[n.node] = n
		out = append(out, &agentv1.Peer{NodeId: string(n.node), Address: string(n.node)})
	}
	return out
}

func (w *wire) DialPeer(_ context.Context, id sandbox.NodeID, _ string) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dials++
	n := w.nodes[id]
	if n == nil {
		return nil, sandbox.NotFoundf("node %s is not known", id)
	}
	near, far := net.Pipe()
	srv := &http.Server{Handler: n.Artifacts()}
	go func() { _ = srv.Serve(&oneConn{conn: far}) }() // ends with the listener
	if w.spoil != nil {
		near = w.spoil(near)
	}
	return near, nil
}

// count returns how often somebody was dialed.
func (w *wire) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dials
}

// oneConn is a listener that has one connection.
type oneConn struct{ conn net.Conn }

func (l *oneConn) Accept() (net.Conn, error) {
	if l.conn == nil {
		return nil, io.EOF
	}
	c := l.conn
	l.conn = nil
	return c, nil
}
func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// breaking is a connection that is lost after so many bytes have come.
type breaking struct {
	net.Conn
	left int
}

func (b *breaking) Read(p []byte) (int, error) {
	if b.left <= 0 {
		_ = b.Close() // as the other side sees it, too
		return 0, errors.New("connection reset")
	}
	n, err := b.Conn.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// checkpoints returns the ids of the checkpoints that a node has.
func (n *node) checkpoints() (ids []string) {
	for _, m := range n.saves.List() {
		ids = append(ids, m.ID)
	}
	return slices.Clip(ids)
}

// recordOf returns a sandbox's record.
func (n *node) recordOf(id sandbox.ID) journal.Record {
	n.m.t.Helper()
	in, ok := n.get(id)
	if !ok {
		n.m.t.Fatalf("sandbox %s is not on the node", id)
	}
	return in.record()
}
