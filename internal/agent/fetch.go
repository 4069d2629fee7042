package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

const (
	// maxRounds is how often everybody who has an artifact is asked for it, as long as each round gets something of it.
	maxRounds = 10
	// maxDamaged is how often what was got may be found damaged before nobody is asked any more.
	maxDamaged = 2
	// sweepInterval is how often parts of artifacts are looked for that nobody gets any more.
	sweepInterval = 10 * time.Minute
)

// sources is where an artifact can be had.
type sources struct {
	peers  []*agentv1.Peer
	bucket bool
}

func (s sources) none() bool { return len(s.peers) == 0 && !s.bucket }

// Fetch gets an image or a checkpoint from a peer or the bucket.
func (a *Agent) Fetch(ctx context.Context, req *agentv1.FetchRequest) (*agentv1.FetchResponse, error) {
	from := sources{peers: req.GetPeers(), bucket: req.GetBucket()}
	var resp *agentv1.FetchResponse
	var err error
	switch digest, id := req.GetImageDigest(), req.GetCheckpointId(); {
	case (digest == "") == (id == ""):
		err = sandbox.Invalidf("fetch of image %.80q and checkpoint %.80q: want exactly one of them", digest, id)
	case digest != "":
		resp, err = a.fetchTemplate(ctx, req, from)
	default:
		resp, err = a.fetchSaved(ctx, req, from)
	}
	if err != nil {
		return nil, toWireError(err)
	}
	return resp, nil
}

// fetchTemplate gets the image of a template.
func (a *Agent) fetchTemplate(ctx context.Context, req *agentv1.FetchRequest, from sources) (*agentv1.FetchResponse, error) {
	digest, template := req.GetImageDigest(), sandbox.TemplateID(req.GetTemplateId())
	if !digestForm.MatchString(digest) {
		return nil, sandbox.Invalidf("image digest %.80q: want sha256: and 64 hex digits", digest)
	}
	moved, err := a.fetchImageFor(ctx, digest, template, from)
	if err != nil {
		return nil, err
	}
	a.warmFor(req, poolKey{digest: digest, size: fromWireResources(req.GetWarm())}, snapshot.Manifest{})
	return &agentv1.FetchResponse{MovedBytes: moved}, nil
}

// fetchSaved gets a checkpoint.
func (a *Agent) fetchSaved(ctx context.Context, req *agentv1.FetchRequest, from sources) (*agentv1.FetchResponse, error) {
	if req.GetReplica() {
		if err := a.dropUnmarked(req.GetCheckpointId()); err != nil {
			return nil, err
		}
	}
	m, moved, err := a.fetchCheckpoint(ctx, req.GetCheckpointId(), from, req.GetReplica())
	if err != nil {
		return nil, err
	}
	if !m.Pause {
		a.warmFor(req, poolKey{digest: m.ImageDigest, size: m.Resources, checkpoint: m.ID}, m)
	}
	return &agentv1.FetchResponse{MovedBytes: moved, Checkpoint: toWireCheckpoint(&m)}, nil
}

// dropUnmarked deletes a checkpoint that is to be kept as a replica and is here as something else: what was left of a sandbox that
// went elsewhere is deleted sooner or later. Errors: ErrConflict where a sandbox of this node needs it.
func (a *Agent) dropUnmarked(id string) error {
	m, err := a.saves.Get(id)
	if err != nil || m.Replica || !m.Pause {
		return nil //nolint:nilerr // what is not there is fetched
	}
	if in := a.ownerOf(id); in != nil {
		return sandbox.Conflictf("checkpoint %s is needed by sandbox %s on node %s itself: it cannot be kept for another now", id, in.id, a.node)
	}
	return a.saves.Remove(id)
}

// warmFor has warm sandboxes made, if the request asks for them.
func (a *Agent) warmFor(req *agentv1.FetchRequest, k poolKey, from snapshot.Manifest) {
	if req.GetWarm() == nil || k.size.MilliCPU <= 0 || k.size.MemoryBytes <= 0 || k.size.DiskBytes <= 0 {
		return
	}
	a.demand(&order{template: sandbox.TemplateID(req.GetTemplateId()), pool: k, from: from})
	a.poke()
}

// obtain gets what an order needs and the node lacks, from whoever the order names.
func (a *Agent) obtain(ctx context.Context, o *order) error {
	if o.lacking.none() {
		return nil
	}
	if id := o.pool.checkpoint; id != "" {
		if _, err := a.saves.Get(id); isNotFound(err) {
			_, _, err = a.fetchCheckpoint(ctx, id, o.lacking, false)
			return err
		}
	}
	if _, err := a.images.Path(o.pool.digest); !isNotFound(err) {
		return err
	}
	template := o.template
	if o.pool.checkpoint != "" {
		template = "" // the checkpoint needs it
	}
	_, err := a.fetchImageFor(ctx, o.pool.digest, template, o.lacking)
	return err
}

// fetchImage gets an image, and returns how many bytes that moved: 0 where it was there.
func (a *Agent) fetchImage(ctx context.Context, digest string, from sources) (moved int64, err error) {
	return a.fetchImageFor(ctx, digest, "", from)
}

// fetchImageFor gets an image for a template. Without one the image stays for as long as a sandbox or a checkpoint needs it.
func (a *Agent) fetchImageFor(ctx context.Context, digest string, template sandbox.TemplateID, from sources) (moved int64, err error) {
	a.builds.hold(digest)
	defer a.builds.drop(digest)
	im, err := a.images.Get(ctx, digest)
	if isNotFound(err) {
		moved, err = a.moves.once(ctx, a.crew, "image "+digest, func(ctx context.Context) (int64, error) {
			moved, err := a.getImage(ctx, digest, from)
			if errors.Is(err, sandbox.ErrConflict) { // a part that an earlier process has left was damaged: it is gone now
				var n int64
				n, err = a.getImage(ctx, digest, from)
				moved += n
			}
			return moved, err
		})
		if err == nil {
			im, err = a.images.Get(ctx, digest)
		}
	}
	if err == nil {
		err = a.noteImage(ctx, &im, template)
	}
	if err != nil {
		return moved, fmt.Errorf("fetch image %s: %w", digest, err)
	}
	return moved, nil
}

// noteImage writes into the journal who needs an image that was fetched.
func (a *Agent) noteImage(ctx context.Context, im *image.Image, template sandbox.TemplateID) error {
	known, err := a.journal.Images(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(known, func(k journal.Image) bool { return k.Digest == im.Digest })
	if i >= 0 && (template == "" || slices.Contains(known[i].Templates, template)) {
		return nil
	}
	err = a.journal.PutImage(ctx, journal.Image{Digest: im.Digest, TemplateID: template, Bytes: im.Bytes, Source: im.Source, BuiltAt: now()})
	if err != nil {
		return err
	}
	if template != "" {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.garbage, im.Digest)
		return nil
	}
	if removed, err := a.journal.ReleaseImage(ctx, "", im.Digest); err != nil || !removed {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.garbage[im.Digest] == nil {
		a.garbage[im.Digest] = &garbage{}
	}
	return nil
}

// getImage gets an image from the first who gives it.
func (a *Agent) getImage(ctx context.Context, digest string, from sources) (moved int64, err error) {
	began := time.Now()
	if _, err := a.images.Get(ctx, digest); err == nil {
		return 0, nil // it came meanwhile
	}
	im, err := a.images.Import(ctx, digest)
	if err != nil {
		return 0, err
	}
	defer im.Close()
	var record *image.Image
	moved, err = a.fromAny(ctx, "image "+digest, from, func(ctx context.Context, o origin) (int64, error) {
		r, body, err := o.openImage(ctx, digest, im.Have())
		if err != nil {
			return 0, err
		}
		defer func() { _ = body.Close() }() // what counts has been read
		record = r
		return im.Receive(ctx, r, body)
	})
	if err != nil {
		return moved, errors.Join(err, discardIf(local(err), im.Discard))
	}
	if _, err := im.Commit(record); err != nil {
		return moved, err
	}
	a.log.InfoContext(ctx, "image fetched", slog.String("op", "fetch"), slog.String("image", digest), slog.Int64("bytes", moved),
		slog.Duration("after", time.Since(began)))
	return moved, nil
}

// fetchCheckpoint gets a checkpoint and its image, and returns how many bytes that moved: 0 where both were there. A replica
// is kept for the case that the node is lost which its sandbox is paused on.
func (a *Agent) fetchCheckpoint(ctx context.Context, id string, from sources, replica bool) (m snapshot.Manifest, moved int64, err error) {
	if err := snapshot.CheckID(id); err != nil {
		return m, 0, err
	}
	m, err = a.saves.Get(id)
	if isNotFound(err) {
		moved, err = a.moves.once(ctx, a.crew, "checkpoint "+id, func(ctx context.Context) (int64, error) {
			return a.getCheckpoint(ctx, id, from, replica)
		})
		if err == nil {
			m, err = a.saves.Get(id)
		}
	}
	if err == nil {
		var n int64
		n, err = a.fetchImageFor(ctx, m.ImageDigest, "", from)
		moved += n
	}
	if err != nil {
		return m, moved, fmt.Errorf("fetch checkpoint %s: %w", id, err)
	}
	return m, moved, nil
}

// getCheckpoint gets a checkpoint from the first who gives it. Its image comes before it counts.
func (a *Agent) getCheckpoint(ctx context.Context, id string, from sources, replica bool) (moved int64, err error) {
	began := time.Now()
	if _, err := a.saves.Get(id); err == nil {
		return 0, nil // it came meanwhile
	}
	im, err := a.saves.Import(id)
	if err != nil {
		return 0, err
	}
	defer im.Close()
	moved, err = a.fromAny(ctx, "checkpoint "+id, from, func(ctx context.Context, o origin) (int64, error) {
		return receiveFrom(ctx, o, im, id)
	})
	if err != nil {
		return moved, errors.Join(err, discardIf(local(err), im.Discard))
	}
	digest := im.Head().Manifest.ImageDigest
	a.builds.hold(digest)
	defer a.builds.drop(digest)
	n, err := a.fetchImageFor(ctx, digest, "", from)
	if err != nil {
		return moved, err
	}
	m, err := im.Commit(func(m *snapshot.Manifest) { m.Replica = replica })
	if err != nil {
		return moved + n, err
	}
	a.log.InfoContext(ctx, "checkpoint fetched", slog.String("op", "fetch"), slog.String("checkpoint_id", id), slog.Int64("bytes", moved),
		slog.Int64("occupied", m.Bytes), slog.Duration("after", time.Since(began)))
	return moved + n, nil
}

// receiveFrom gets the rest of a checkpoint from one who has it.
func receiveFrom(ctx context.Context, o origin, im *snapshot.Import, id string) (moved int64, err error) {
	for again := true; ; again = false {
		at, more, err := im.Next(ctx)
		if err != nil || !more {
			return 0, err
		}
		head, body, err := o.openCheckpoint(ctx, id, at)
		if err != nil {
			return 0, err
		}
		err = im.Begin(head)
		if err == nil {
			moved, err = receiveAll(ctx, im, body)
			_ = body.Close() // what counts has been read
			return moved, err
		}
		_ = body.Close() // of no use
		if !again || !errors.Is(err, sandbox.ErrConflict) {
			return 0, err
		}
		if err := im.Reset(); err != nil {
			return 0, err
		}
	}
}

func receiveAll(ctx context.Context, im *snapshot.Import, body io.Reader) (moved int64, err error) {
	for {
		_, more, err := im.Next(ctx)
		if err != nil || !more {
			return moved, err
		}
		n, err := im.Receive(ctx, body)
		moved += n
		if err != nil {
			return moved, err
		}
	}
}

// fromAny tries all who may have something, in their order, until one has given what is missing. Where transfers break off,
// it starts over with the first, as long as that brings something now and then. Errors: ErrNotFound when nobody has it, else
// ErrUnavailable.
func (a *Agent) fromAny(ctx context.Context, what string, s sources, try func(context.Context, origin) (int64, error)) (moved int64, err error) {
	origins := a.origins(s)
	if len(origins) == 0 {
		return 0, sandbox.NotFoundf("%s is not on node %s, and nobody was named who has it", what, a.node)
	}
	damaged, idle := 0, 0
	for round := 0; ; round++ {
		var failures []string
		before, unknown := moved, 0
		for _, o := range origins {
			n, err := try(ctx, o)
			moved += n
			switch {
			case err == nil:
				return moved, nil
			case ctx.Err() != nil:
				return moved, context.Cause(ctx)
			case local(err):
				return moved, err
			case isNotFound(err):
				unknown++
			case errors.Is(err, sandbox.ErrConflict):
				damaged++
			}
			a.log.WarnContext(ctx, "artifact not got", slog.String("artifact", what), slog.String("from", o.String()),
				slog.Int64("bytes", n), slog.Any("err", err))
			failures = append(failures, fmt.Sprintf("%s: %v", o, err))
		}
		text := strings.Join(failures, "; ")
		if unknown == len(origins) {
			return moved, sandbox.NotFoundf("nobody has %s: %s", what, text)
		}
		if idle++; moved > before {
			idle = 0
		}
		if round == maxRounds || damaged > maxDamaged || idle > 1 {
			return moved, sandbox.Unavailablef("%s cannot be had now: %s", what, text)
		}
		if !pause(ctx, backoff(round)) {
			return moved, context.Cause(ctx)
		}
	}
}

// local reports whether it is this node's disk that has no room.
func local(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func discardIf(yes bool, discard func() error) error {
	if !yes {
		return nil
	}
	return discard()
}

// keptParcel returns what came along with a checkpoint that was fetched. ErrNotFound where nothing did.
func (a *Agent) keptParcel(id string) (*agentv1.Parcel, error) {
	raw, err := a.saves.Parcel(id)
	if err != nil {
		return nil, err
	}
	p := &agentv1.Parcel{}
	if err := proto.Unmarshal(raw, p); err != nil {
		return nil, sandbox.Invalidf("what came along with checkpoint %s is no parcel: %v", id, err)
	}
	return p, nil
}

// forgetReplica deletes the checkpoint that is kept of another node's sandbox. What is not there is no error, and one that a
// sandbox of this node needs stays.
func (a *Agent) forgetReplica(ctx context.Context, id string) error {
	if err := snapshot.CheckID(id); err != nil {
		return err
	}
	if m, err := a.saves.Get(id); err != nil || !m.Replica || a.ownerOf(id) != nil {
		return nil //nolint:nilerr // what is not there is forgotten
	}
	if err := a.saves.Remove(id); err != nil {
		return err
	}
	a.log.InfoContext(ctx, "replica forgotten", slog.String("op", "forget"), slog.String("checkpoint_id", id))
	a.poke() // its image may have lost its last user
	return nil
}

// replicas returns the checkpoints that are kept of sandboxes of other nodes.
func (a *Agent) replicas() (ids []string) {
	own := map[string]bool{}
	for _, in := range a.instances() {
		own[in.record().Checkpoint] = true
	}
	for _, m := range a.saves.List() {
		if m.Replica && !own[m.ID] {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// ownerOf returns the sandbox that is paused or migrating in a checkpoint; nil where none is.
func (a *Agent) ownerOf(id string) *instance {
	for _, in := range a.instances() {
		if in.record().Checkpoint == id {
			return in
		}
	}
	return nil
}

// sweepParts deletes parts of artifacts that nobody gets any more, every so often.
func (a *Agent) sweepParts(ctx context.Context) error {
	t := time.NewTicker(sweepInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := errors.Join(a.saves.Sweep(ctx), a.images.SweepPartial(ctx)); err != nil && ctx.Err() == nil {
			a.log.WarnContext(ctx, "parts of artifacts not deleted", slog.Any("err", err))
		}
	}
}
