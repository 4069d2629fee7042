package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// In the bucket, checkpoints/ID/ has head.json and files/NAME with the frames of each file; images/HEX/ has image.json,
// rootfs.erofs and uses/ID, an empty file for each checkpoint there that needs the image. What the two JSON files describe
// counts, so they are written last and removed first.
const (
	bucketHead   = "head.json"
	bucketRecord = "image.json"
	bucketRootfs = "rootfs.erofs"
	// smallFile is up to which size a file is written in one request, from memory.
	smallFile = 4 << 20
)

func bucketSave(id, name string) string { return "checkpoints/" + id + "/" + name }

func bucketImage(digest, name string) string {
	return "images/" + strings.TrimPrefix(digest, "sha256:") + "/" + name
}

// bucketed has what was written to the bucket.
type bucketed struct {
	store bucketStore
}

func (b *bucketed) String() string { return "the bucket" }

// document reads a file that is small.
func (b *bucketed) document(ctx context.Context, name string, most int) ([]byte, error) {
	body, err := b.store.Get(ctx, name, 0)
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(body, int64(most)+1))
	if err := errors.Join(err, body.Close()); err != nil {
		return nil, sandbox.Unavailablef("read %s: %v", name, err)
	}
	if len(raw) > most {
		return nil, sandbox.Invalidf("%s in the bucket has more than %d bytes", name, most)
	}
	return raw, nil
}

func (b *bucketed) openImage(ctx context.Context, digest string, from int64) (*image.Image, io.ReadCloser, error) {
	raw, err := b.document(ctx, bucketImage(digest, bucketRecord), image.MaxRecord)
	if err != nil {
		return nil, nil, err
	}
	im, err := image.ParseRecord(raw)
	if err != nil {
		return nil, nil, err
	}
	if from >= im.Bytes {
		return &im, io.NopCloser(strings.NewReader("")), nil
	}
	body, err := b.store.Get(ctx, bucketImage(digest, bucketRootfs), from)
	if err != nil {
		return nil, nil, err
	}
	return &im, patient(ctx, b, body), nil
}

func (b *bucketed) openCheckpoint(ctx context.Context, id string, at snapshot.Position) (*snapshot.Head, io.ReadCloser, error) {
	head, err := b.head(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	c := &chain{from: at.Frames, open: func(name string, from int64) (io.ReadCloser, error) {
		body, err := b.store.Get(ctx, bucketSave(id, "files/"+name), from)
		if err != nil {
			return nil, err
		}
		return patient(ctx, b, body), nil
	}}
	for _, name := range head.Manifest.Names() {
		if name >= at.File {
			c.names = append(c.names, name)
		}
	}
	return head, c, nil
}

func (b *bucketed) head(ctx context.Context, id string) (*snapshot.Head, error) {
	raw, err := b.document(ctx, bucketSave(id, bucketHead), snapshot.MaxHead)
	if err != nil {
		return nil, err
	}
	return snapshot.ParseHead(raw)
}

// chain reads files one after the other, the first from an offset on.
type chain struct {
	names []string
	from  int64
	open  func(name string, from int64) (io.ReadCloser, error)
	body  io.ReadCloser
}

func (c *chain) Read(p []byte) (int, error) {
	for {
		if c.body == nil {
			if len(c.names) == 0 {
				return 0, io.EOF
			}
			body, err := c.open(c.names[0], c.from)
			if err != nil {
				return 0, err
			}
			c.body, c.names, c.from = body, c.names[1:], 0
		}
		n, err := c.body.Read(p)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		err = c.Close()
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *chain) Close() error {
	if c.body == nil {
		return nil
	}
	err := c.body.Close()
	c.body = nil
	return err
}

// Store writes a checkpoint, and the image that it needs, to the bucket.
func (a *Agent) Store(ctx context.Context, req *agentv1.StoreRequest) (*agentv1.StoreResponse, error) {
	id := req.GetCheckpointId()
	err := snapshot.CheckID(id)
	if err == nil && a.bucket == nil {
		err = sandbox.Unsupportedf("node %s has no bucket: set s3-bucket", a.node)
	}
	if err != nil {
		return nil, toWireError(err)
	}
	began := time.Now()
	moved, err := a.moves.once(ctx, a.crew, "store "+id, func(ctx context.Context) (int64, error) { return a.store(ctx, id) })
	if err != nil {
		return nil, toWireError(fmt.Errorf("store checkpoint %s: %w", id, err))
	}
	a.log.InfoContext(ctx, "checkpoint stored", slog.String("op", "store"), slog.String("checkpoint_id", id), slog.Int64("bytes", moved),
		slog.Duration("after", time.Since(began)))
	return &agentv1.StoreResponse{MovedBytes: moved}, nil
}

func (a *Agent) store(ctx context.Context, id string) (moved int64, err error) {
	held, err := a.saves.Hold(id)
	if err != nil {
		return 0, err
	}
	defer held.Release()
	b := &bucketed{store: a.bucket}
	old, err := b.head(ctx, id)
	switch {
	case err == nil && old.Manifest.CreatedAt.Equal(held.Manifest.CreatedAt):
		return 0, nil
	case err != nil && !isNotFound(err):
		return 0, err
	}
	parcel, err := a.parcelWith(id)
	if err != nil {
		return 0, err
	}
	digest := held.Manifest.ImageDigest
	if err := a.bucket.Put(ctx, bucketImage(digest, "uses/"+id), strings.NewReader(""), 0); err != nil {
		return 0, err
	}
	moved, err = a.storeImage(ctx, b, digest)
	if err != nil {
		return moved, err
	}
	for _, name := range held.Manifest.Names() {
		n, err := a.storeFile(ctx, held, name)
		moved += n
		if err != nil {
			return moved, err
		}
	}
	// Whoever removed the last checkpoint that needed the image may not have seen this one.
	n, err := a.storeImage(ctx, b, digest)
	moved += n
	if err != nil {
		return moved, err
	}
	return moved, a.putDocument(ctx, bucketSave(id, bucketHead), &snapshot.Head{Manifest: held.Manifest, Parcel: parcel})
}

func (a *Agent) putDocument(ctx context.Context, name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return a.bucket.Put(ctx, name, bytes.NewReader(raw), int64(len(raw)))
}

// storeImage writes an image to the bucket, unless it is there.
func (a *Agent) storeImage(ctx context.Context, b *bucketed, digest string) (moved int64, err error) {
	_, err = b.document(ctx, bucketImage(digest, bucketRecord), image.MaxRecord)
	if err == nil || !isNotFound(err) {
		return 0, err
	}
	im, f, err := a.images.Open(ctx, digest)
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // only read
	if err := a.bucket.Put(ctx, bucketImage(digest, bucketRootfs), f, im.Bytes); err != nil {
		return 0, err
	}
	return im.Bytes, a.putDocument(ctx, bucketImage(digest, bucketRecord), im)
}

// storeFile writes the frames of a checkpoint's file to the bucket.
func (a *Agent) storeFile(ctx context.Context, held *snapshot.Held, name string) (moved int64, err error) {
	to := bucketSave(held.Manifest.ID, "files/"+name)
	if held.Manifest.Files[name] <= smallFile {
		var buf bytes.Buffer
		if err := held.Send(ctx, &buf, name, 0); err != nil {
			return 0, err
		}
		n := int64(buf.Len())
		return n, a.bucket.Put(ctx, to, &buf, n)
	}
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		err := held.Send(ctx, w, name, 0)
		_ = w.CloseWithError(err) // never fails
		sent <- err
	}()
	count := &counter{r: r}
	err = a.bucket.Put(ctx, to, count, -1)
	_ = r.CloseWithError(io.ErrClosedPipe) // never fails; ends the sender
	if serr := <-sent; err == nil {
		err = serr
	}
	return count.n, err
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// unstore removes a checkpoint from the bucket, and its image if no other checkpoint there needs it. What is not there is no
// error, so that a call that failed can be repeated.
func (a *Agent) unstore(ctx context.Context, id string) error {
	if a.bucket == nil {
		return sandbox.Unsupportedf("node %s has no bucket: set s3-bucket", a.node)
	}
	if err := a.bucket.Remove(ctx, bucketSave(id, bucketHead)); err != nil {
		return err
	}
	if err := a.removeAll(ctx, bucketSave(id, "files/")); err != nil {
		return err
	}
	names, err := a.bucket.List(ctx, "images/")
	if err != nil {
		return err
	}
	for _, name := range names {
		if dir, ok := strings.CutSuffix(name, "/uses/"+id); ok {
			if err := a.unuse(ctx, dir, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// unuse takes a checkpoint out of those that need an image in the bucket; with the last, the image goes.
func (a *Agent) unuse(ctx context.Context, dir, use string) error {
	if err := a.bucket.Remove(ctx, use); err != nil {
		return err
	}
	users, err := a.bucket.List(ctx, dir+"/uses/")
	if err != nil || len(users) > 0 {
		return err
	}
	if err := a.bucket.Remove(ctx, dir+"/"+bucketRecord); err != nil {
		return err
	}
	return a.bucket.Remove(ctx, dir+"/"+bucketRootfs)
}

func (a *Agent) removeAll(ctx context.Context, prefix string) error {
	names, err := a.bucket.List(ctx, prefix)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := a.bucket.Remove(ctx, name); err != nil {
			return err
		}
	}
	return nil
}
