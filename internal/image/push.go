package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The labels that Push writes and that Image.Config.Labels has after a Build of what was pushed. Numbers are decimal.
const (
	LabelStart  = "dev.cloister.start-command"
	LabelReady  = "dev.cloister.ready-command"
	LabelCPU    = "dev.cloister.milli-cpu"
	LabelMemory = "dev.cloister.memory-bytes"
	LabelDisk   = "dev.cloister.disk-bytes"
	// LabelRootFS says by which rules the root file system was fitted out. What has it is not fitted out again, so that it
	// is the same on each cluster; the guest agent and the network's files are the node's own all the same.
	LabelRootFS = "dev.cloister.rootfs"
)

// rootFSRules is the value of LabelRootFS.
const rootFSRules = "1"

// PushRequest says which image to push, where to, and how it is run.
type PushRequest struct {
	// Digest of an image in the store.
	Digest string
	// Destination is a registry reference ("docker://" before it is optional), "oci:PATH" (a layout directory, or a tar of
	// one where PATH ends in ".tar") or "docker-archive:PATH". Paths are absolute, and the directory that they are in exists.
	// A file that is there is replaced; of a layout that is there the index is, and blobs that it has are not written again.
	Destination string
	// Username and Password are for a registry; empty means the machine's own docker credentials.
	Username, Password string
	// RegistryOnly refuses destinations on the node's disk with ErrDenied.
	RegistryOnly bool
	// The rest goes into the image's configuration and labels; what is empty or zero is left out.
	Env          map[string]string
	User         string
	WorkDir      string
	StartCommand string
	ReadyCommand string
	Resources    sandbox.Resources
}

// pushing is one push.
type pushing struct {
	build
	ask   PushRequest
	to    Source
	image Image
	// layers are lowest first.
	layers []*pushLayer

	mu sync.Mutex
	// done and total are bytes of layers; guarded by mu, which is held while report is called.
	done, total int64
	tell        func(Progress)
}

// Push writes an image and how to run it to a registry or a file. A composed image goes as its base in one layer and its
// own layers; one whose base or layers are not in the store any more goes as one layer. The same image and request give
// the same manifest. What the destination has already is not sent again. report may be nil; it is called from one goroutine
// at a time. Requests that fail for the moment are tried three times. Errors: ErrNotFound for the image, ErrInvalid for the
// request, ErrDenied, ErrUnavailable, ErrExhausted for a full disk.
func (s *Store) Push(ctx context.Context, r PushRequest, report func(Progress)) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("push image to %.256q: %w", r.Destination, full(err))
		}
	}()
	p := &pushing{ask: r, tell: report}
	if p.tell == nil {
		p.tell = func(Progress) {}
	}
	if p.to, err = parseDestination(r); err != nil {
		return err
	}
	if p.image, err = s.Get(ctx, r.Digest); err != nil {
		return err
	}
	p.store = s
	if p.work, err = os.MkdirTemp(s.tempDir(), "push-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	p.say("reading the image")
	if err := p.open(ctx); err != nil {
		return err
	}
	if err := p.send(ctx); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	s.log.InfoContext(ctx, "image pushed", slog.String("digest", r.Digest), slog.String("destination", p.to.String()),
		slog.Int("layers", len(p.layers)))
	p.finish()
	return nil
}

func parseDestination(r PushRequest) (Source, error) {
	to, err := ParseSource(r.Destination)
	if err != nil {
		return Source{}, err
	}
	switch {
	case r.RegistryOnly && to.Kind != KindRegistry:
		return Source{}, sandbox.Deniedf("%q is on the node's disk, which is not allowed here; give a registry's reference", r.Destination)
	case to.Kind == KindDir || to.Kind == KindDebian:
		return Source{}, sandbox.Invalidf("images cannot be written to %q; use a registry's reference, oci:PATH or docker-archive:PATH",
			r.Destination)
	}
	for key, value := range r.Env {
		if key == "" || strings.ContainsAny(key, "=\x00") || strings.ContainsRune(value, 0) {
			return Source{}, sandbox.Invalidf("environment variable %.128q has no name, or a name with \"=\" or zero bytes", key)
		}
	}
	return to, nil
}

// open finds the layers of the image.
func (p *pushing) open(ctx context.Context) error {
	root, layers := p.store.parts(ctx, p.image)
	path, err := p.store.Path(root)
	if err != nil {
		return err
	}
	f, err := os.Open(path) //nolint:gosec // a file of the store's own
	if err != nil {
		return err
	}
	p.release = append(p.release, f)
	p.layers = append(p.layers, &pushLayer{push: p, ctx: ctx, from: root, file: f, image: true})
	for _, digest := range layers {
		f, err := p.store.openLayer(digest)
		if err != nil {
			return err
		}
		p.release = append(p.release, f)
		p.layers = append(p.layers, &pushLayer{push: p, ctx: ctx, from: digest, file: f})
	}
	return nil
}

// parts returns the image that is at the bottom, and all layers on top of it.
func (s *Store) parts(ctx context.Context, img Image) (root string, layers []string) {
	for img.Base != "" {
		base, err := s.Get(ctx, img.Base)
		if err != nil || slices.ContainsFunc(img.Layers, func(l string) bool { return !s.hasLayer(l) }) {
			break
		}
		layers = append(slices.Clone(img.Layers), layers...)
		img = base
	}
	return img.Digest, layers
}

func (p *pushing) send(ctx context.Context) error {
	if p.to.Kind == KindDockerArchive {
		return p.dockerArchive()
	}
	for _, l := range p.layers {
		if err := l.pack(); err != nil {
			return err
		}
		p.total += l.packed.Size
	}
	img, err := p.manifest()
	if err != nil {
		return err
	}
	switch {
	case p.to.Kind == KindRegistry:
		return p.registry(ctx, img)
	case filepath.Ext(p.to.Ref) == ".tar":
		return p.layoutTar(img)
	default:
		return p.layout(img)
	}
}

// manifest puts the image's documents together.
func (p *pushing) manifest() (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	adds := make([]mutate.Addendum, 0, len(p.layers))
	for _, l := range p.layers {
		adds = append(adds, mutate.Addendum{Layer: l, MediaType: types.OCILayer})
	}
	img, err := mutate.Append(img, adds...)
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.History = nil
	p.describe(config)
	return mutate.ConfigFile(img, config)
}

// describe says in the configuration how to run the image.
func (p *pushing) describe(config *v1.ConfigFile) {
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Created = v1.Time{Time: p.image.CreatedAt}
	env := make([]string, 0, len(p.ask.Env))
	for _, key := range slices.Sorted(maps.Keys(p.ask.Env)) {
		env = append(env, key+"="+p.ask.Env[key])
	}
	labels := maps.Clone(p.image.Config.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.DeleteFunc(labels, func(key, _ string) bool { return strings.HasPrefix(key, "dev.cloister.") })
	labels[LabelRootFS] = rootFSRules
	for key, value := range map[string]string{LabelStart: p.ask.StartCommand, LabelReady: p.ask.ReadyCommand} {
		if value != "" {
			labels[key] = value
		}
	}
	for key, value := range map[string]int64{
		LabelCPU: p.ask.Resources.MilliCPU, LabelMemory: p.ask.Resources.MemoryBytes, LabelDisk: p.ask.Resources.DiskBytes,
	} {
		if value != 0 {
			labels[key] = strconv.FormatInt(value, 10)
		}
	}
	config.Config = v1.Config{
		Env: env, User: p.ask.User, WorkingDir: p.ask.WorkDir, Labels: labels,
		Entrypoint: p.image.Config.Entrypoint, Cmd: p.image.Config.Cmd,
	}
}

func (p *pushing) registry(ctx context.Context, img v1.Image) error {
	ref, err := name.ParseReference(p.to.Ref)
	if err != nil {
		return sandbox.Invalidf("image reference %q: %v", p.to.Ref, err)
	}
	ctx, watch := newWatch(ctx, ref.Context().RegistryStr(), p.store.cfg.AnswerTimeout)
	defer watch.stop()
	p.say("asking " + ref.Context().RegistryStr())
	options := remoteOptions(ctx, watch, p.ask.Username, p.ask.Password)
	return registryError(ctx, "push", remote.Write(ref, img, options...))
}

func (p *pushing) say(message string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tell(Progress{Step: "push", Fraction: p.fraction(), Message: message})
}

// sent counts bytes of a layer that are on their way; a layer that is sent again counts again.
func (p *pushing) sent(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.fraction()
	p.done += n
	const visible = 0.002
	if now := p.fraction(); now-before >= visible || int(now*100) != int(before*100) {
		p.tell(Progress{Step: "push", Fraction: now})
	}
}

// fraction is at most 0.99, until everything is there.
func (p *pushing) fraction() float64 {
	const last = 0.99
	return last * float64(min(p.done, p.total)) / float64(max(p.total, 1))
}

func (p *pushing) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tell(Progress{Step: "push", Fraction: 1})
}
