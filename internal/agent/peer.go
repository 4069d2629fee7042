package agent

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// origin is somebody who may have artifacts.
type origin interface {
	fmt.Stringer
	// openImage returns what an image is, and its file from an offset on.
	openImage(ctx context.Context, digest string, from int64) (*image.Image, io.ReadCloser, error)
	// openCheckpoint returns what a checkpoint is, and the frames of its files from a place on.
	openCheckpoint(ctx context.Context, id string, at snapshot.Position) (*snapshot.Head, io.ReadCloser, error)
}

// origins returns who may have artifacts, in the order in which they are asked.
func (a *Agent) origins(s sources) []origin {
	var out []origin
	for _, p := range s.peers {
		if a.peers != nil && sandbox.NodeID(p.GetNodeId()) != a.node {
			out = append(out, &peer{peers: a.peers, wire: p})
		}
	}
	if s.bucket && a.bucket != nil {
		out = append(out, &bucketed{store: a.bucket})
	}
	return out
}

// dialTimeout bounds the connecting to a peer.
const dialTimeout = 10 * time.Second

// peer is another node.
type peer struct {
	peers peers
	wire  *agentv1.Peer
}

func (p *peer) String() string { return "node " + p.wire.GetNodeId() }

func (p *peer) openImage(ctx context.Context, digest string, from int64) (*image.Image, io.ReadCloser, error) {
	raw, body, err := p.get(ctx, "/images/"+digest, url.Values{"from": {strconv.FormatInt(from, 10)}}, image.MaxRecord)
	if err != nil {
		return nil, nil, err
	}
	im, err := image.ParseRecord(raw)
	if err != nil {
		_ = body.Close() // of no use
		return nil, nil, err
	}
	return &im, body, nil
}

func (p *peer) openCheckpoint(ctx context.Context, id string, at snapshot.Position) (*snapshot.Head, io.ReadCloser, error) {
	query := url.Values{"file": {at.File}, "from": {strconv.FormatInt(at.Offset, 10)}}
	raw, body, err := p.get(ctx, "/checkpoints/"+id, query, snapshot.MaxHead)
	if err != nil {
		return nil, nil, err
	}
	head, err := snapshot.ParseHead(raw)
	if err != nil {
		_ = body.Close() // of no use
		return nil, nil, err
	}
	return head, body, nil
}

// openGuest returns the stream of a guest that departs with a generation.
func (p *peer) openGuest(ctx context.Context, id sandbox.ID, generation int64) (io.ReadCloser, error) {
	_, body, err := p.get(ctx, "/guests/"+string(id), url.Values{"generation": {strconv.FormatInt(generation, 10)}}, maxGuestText)
	return body, err
}

// get asks for an artifact, and returns its head and the rest of the answer. Whoever is asked may do nothing for a while,
// but not for longer.
func (p *peer) get(ctx context.Context, path string, query url.Values, most int) (head []byte, body io.ReadCloser, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			return p.peers.DialPeer(ctx, sandbox.NodeID(p.wire.GetNodeId()), p.wire.GetAddress())
		},
		DisableKeepAlives: true, DisableCompression: true, ResponseHeaderTimeout: stallTimeout, ReadBufferSize: 64 << 10,
	}
	answer := &patientReader{cancel: cancel}
	defer func() {
		if err != nil {
			_ = answer.Close() // of no use
		}
	}()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node"+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, nil, sandbox.Invalidf("ask %s for %.200q: %v", p, path, err)
	}
	resp, err := transport.RoundTrip(req) //nolint:bodyclose // the answer closes it
	if err != nil {
		return nil, nil, p.lost(err)
	}
	answer.watch(ctx, p, resp.Body)
	if resp.StatusCode != http.StatusOK {
		return nil, nil, refusal(resp.StatusCode, answer)
	}
	if head, err = readArtifactHead(answer, most); err != nil {
		return nil, nil, err
	}
	return head, answer, nil
}

// lost gives what went wrong with a connection its kind.
func (p *peer) lost(err error) error {
	if isNotFound(err) {
		err = fmt.Errorf("%v", err) //nolint:errorlint // it is the node that is unknown, not the artifact
	}
	return fmt.Errorf("%w: %w", sandbox.ErrUnavailable, err)
}

// refusal is the error that a peer has answered with.
func refusal(status int, body io.Reader) error {
	text, err := io.ReadAll(io.LimitReader(body, 1<<10))
	if err != nil {
		return sandbox.Unavailablef("it answers with status %d, and breaks off", status)
	}
	said := strings.TrimSpace(string(text))
	for _, s := range statuses {
		if s.status == status {
			return fmt.Errorf("%w: it says: %.500s", s.kind, said)
		}
	}
	return sandbox.Unavailablef("it answers with status %d: %.500s", status, said)
}

// patientReader is a body that is given up when nothing comes for a while.
type patientReader struct {
	body   io.ReadCloser
	ctx    context.Context //nolint:containedctx // the request's; says why the body ended
	timer  *time.Timer
	cancel context.CancelCauseFunc
}

// patient returns a body of what an origin sends.
func patient(ctx context.Context, o origin, body io.ReadCloser) *patientReader {
	ctx, cancel := context.WithCancelCause(ctx)
	b := &patientReader{cancel: cancel}
	b.watch(ctx, o, body)
	return b
}

// watch begins to read a body, which ends when it is closed.
func (b *patientReader) watch(ctx context.Context, o origin, body io.ReadCloser) {
	b.body, b.ctx = body, ctx
	b.timer = time.AfterFunc(stallTimeout, func() {
		b.cancel(sandbox.Unavailablef("%s has sent nothing for %v", o, stallTimeout))
		_ = body.Close() // ends the Read that waits
	})
}

func (b *patientReader) Read(p []byte) (int, error) {
	b.timer.Reset(stallTimeout)
	n, err := b.body.Read(p)
	b.timer.Stop() // what is done with it takes its own time
	if err != nil && b.ctx.Err() != nil {
		err = context.Cause(b.ctx)
	}
	return n, err
}

func (b *patientReader) Close() error {
	var err error
	if b.body != nil {
		b.timer.Stop()
		err = b.body.Close()
	}
	b.cancel(nil)
	return err
}
