package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// roomTimeout is how long a build waits for room for its sandbox.
	roomTimeout = 5 * time.Minute
	roomRetry   = 2 * time.Second
	// stepTimeout bounds one step.
	stepTimeout = time.Hour
	// Where the stages of a build begin, of the whole.
	stepsFrom, composeFrom, startFrom = 0.3, 0.85, 0.92
)

// runBuild carries a build out and notes what it came to.
func (a *Agent) runBuild(ctx context.Context, bd *build, o *buildOrder) (built, error) {
	began := time.Now()
	log := a.log.With(slog.String("build_id", bd.id), slog.String("template_id", string(bd.template)))
	log.InfoContext(ctx, "build started", slog.Int("steps", len(o.steps)))
	defer func() {
		if !o.plain() {
			a.letGo(context.WithoutCancel(ctx), o)
		}
	}()
	out, err := a.carryBuild(ctx, bd, o)
	if err == nil {
		im := &out.image
		err = a.journal.PutImage(ctx, journal.Image{
			Digest: im.Digest, TemplateID: bd.template, Bytes: im.Bytes, Source: im.Source, BuiltAt: now(),
		})
	}
	a.metrics.built(err, began)
	if err != nil {
		log.WarnContext(ctx, "build not successful", slog.Duration("after", time.Since(began)), slog.Any("err", err))
		return built{}, err
	}
	a.templateBuilt(bd.template, out.image.Digest)
	log.InfoContext(ctx, "build done", slog.String("image", out.image.Digest), slog.Int64("bytes", out.image.Bytes),
		slog.Duration("after", time.Since(began)))
	out.done = templateReady(&out.image)
	return out, nil
}

func (a *Agent) carryBuild(ctx context.Context, bd *build, o *buildOrder) (built, error) {
	if o.plain() {
		bd.stage(stepBase, 0, 1)
	} else {
		bd.stage(stepBase, 0, stepsFrom)
	}
	base, err := a.baseImage(ctx, bd, o)
	if err != nil {
		return built{}, failedAt(stepBase, err)
	}
	if o.base == "" {
		if err := o.adopt(base.Config.Labels); err != nil {
			return built{}, failedAt(stepBase, err)
		}
	}
	r := &buildRun{Agent: a, bd: bd, order: o, base: base, guest: baseSettings(o, &base)}
	if o.plain() {
		return r.built(base), nil
	}
	if err := a.keep(ctx, o, &base); err != nil {
		return built{}, failedAt(stepBase, err)
	}
	defer r.close()
	if r.keys, err = recipe.Keys(base.Digest, r.guest, o.steps); err != nil {
		return built{}, failedAt(stepBase, err)
	}
	if err := r.steps(ctx); err != nil {
		return built{}, err
	}
	out, err := r.finalize(ctx)
	return out, failedAt(stepFinalize, err)
}

// adopt takes over what an image that was pushed from a template says of it, as far as the order says nothing.
func (o *buildOrder) adopt(labels map[string]string) error {
	if start := labels[image.LabelStart]; o.start == "" && start != "" {
		o.start, o.ready = start, cmp.Or(o.ready, labels[image.LabelReady])
	}
	if o.unsized {
		size := o.size
		for label, at := range map[string]*int64{
			image.LabelCPU: &size.MilliCPU, image.LabelMemory: &size.MemoryBytes, image.LabelDisk: &size.DiskBytes,
		} {
			n, err := strconv.ParseInt(labels[label], 10, 64)
			if err != nil || n <= 0 {
				continue
			}
			*at = n
		}
		o.size = size
	}
	return o.check("")
}

// built is what the build comes to with the image.
func (r *buildRun) built(im image.Image) built {
	return built{image: im, guest: r.guest, start: r.order.start, ready: r.order.ready, size: r.order.size}
}

// baseImage returns the image that the steps begin with.
func (a *Agent) baseImage(ctx context.Context, bd *build, o *buildOrder) (image.Image, error) {
	if o.base == "" && o.plain() {
		return a.images.Build(ctx, o.image, bd.report)
	}
	if o.base == "" {
		return a.fetchBase(ctx, bd, o)
	}
	im, err := a.images.Get(ctx, o.base)
	if isNotFound(err) {
		return im, sandbox.NotFoundf("the image to start from is not on node %s: build its template again", a.node)
	}
	return im, err
}

// baseSettings returns what is in force before the first step. An image's own user and working directory are not: sandboxes
// begin as user, in its home, unless steps say otherwise.
func baseSettings(o *buildOrder, base *image.Image) sandbox.GuestSettings {
	if o.base != "" {
		return o.guest
	}
	var g sandbox.GuestSettings
	for _, entry := range base.Config.Env {
		name, value, ok := strings.Cut(entry, "=")
		if !ok || name == "" {
			continue
		}
		if g.Env == nil {
			g.Env = map[string]string{}
		}
		g.Env[name] = value
	}
	return g
}

// buildRun is one build's steps being carried out, by one goroutine.
type buildRun struct {
	*Agent
	bd    *build
	order *buildOrder
	base  image.Image
	guest sandbox.GuestSettings // in force
	keys  []string              // of each step's result

	layers   []string // of the steps so far, lowest first
	in       *instance
	client   *buildGuest
	recorder *image.Recorder
}

// steps takes the build through all its steps: what is cached is only looked up, the rest runs in one sandbox.
func (r *buildRun) steps(ctx context.Context) error {
	n := len(r.order.steps)
	cached := !r.order.force
	for i, s := range r.order.steps {
		name := strconv.Itoa(i + 1)
		part := (composeFrom - stepsFrom) / float64(n)
		r.bd.stage(name, stepsFrom+float64(i)*part, stepsFrom+float64(i+1)*part)
		after, err := recipe.After(r.guest, s)
		if err != nil {
			return failedAt(name, err)
		}
		layer := ""
		cached = cached && !s.Force
		if cached && changesFiles(s) {
			layer, cached = r.images.StepLayer(r.keys[i])
		}
		mark := ""
		if cached && changesFiles(s) {
			mark = "CACHED "
		}
		r.bd.note(name, fmt.Sprintf("%sbuilding step %d/%d: %s", mark, i+1, n, stepText(s)))
		if !cached && changesFiles(s) {
			if layer, err = r.step(ctx, s, after, i); err != nil {
				return failedAt(name, err)
			}
		}
		if layer != "" {
			r.layers = append(r.layers, layer)
			r.builds.hold(layer)
			r.order.held = append(r.order.held, layer)
		}
		r.guest = after
	}
	return nil
}

// changesFiles says whether a step may leave anything in the root file system.
func changesFiles(s recipe.Step) bool { return s.Type != recipe.Env }

// stepText is a step for people.
func stepText(s recipe.Step) string {
	args := s.Args
	if s.Type == recipe.Copy {
		args = args[:2]
	}
	return clip(s.Type+" "+strings.Join(args, " "), 500)
}

// step runs one step in the sandbox and keeps what it changed.
func (r *buildRun) step(ctx context.Context, s recipe.Step, after sandbox.GuestSettings, i int) (layer string, err error) {
	if r.in == nil {
		if err := r.openSandbox(ctx, r.layers); err != nil {
			return "", err
		}
	}
	sctx, done := r.in.interruptible(ctx)
	defer done()
	sctx, cancel := context.WithTimeoutCause(sctx, stepTimeout, sandbox.Unavailablef("the step took longer than %v", stepTimeout))
	defer cancel()
	changed, err := r.perform(sctx, s, after, strconv.Itoa(i+1))
	if err != nil {
		if ctx.Err() == nil && !r.in.alive() {
			err = context.Cause(sctx)
		}
		return "", err
	}
	if changed {
		if layer, err = r.record(sctx); err != nil {
			return "", fmt.Errorf("keep what the step changed: %w", err)
		}
	}
	return layer, r.images.PutStep(r.keys[i], layer)
}

// openSandbox starts the sandbox that steps run in. Nobody is ever told of it; its record, of a sandbox that is being
// created, sees to it that it is cleared away whatever happens.
func (r *buildRun) openSandbox(ctx context.Context, layers []string) error {
	im, err := r.compose(ctx, layers)
	if err != nil {
		return err
	}
	if r.in, err = r.room(ctx, im.Digest); err != nil {
		return err
	}
	rec := r.in.record()
	rec.TemplateID, rec.Guest = r.bd.template, r.guest
	r.in.set(&rec) // the journal needs neither
	bctx, done := r.in.interruptible(ctx)
	defer done()
	if err := r.gate.enter(bctx, false); err != nil {
		return err
	}
	defer r.gate.leave()
	g, err := r.boot(bctx, r.in)
	if err != nil {
		return err
	}
	if err := r.initGuest(bctx, r.in, g); err != nil {
		return err
	}
	r.client = r.newBuildGuest(r.in)
	r.recorder = r.images.NewRecorder()
	return nil
}

// room admits the sandbox, and waits a while where the machine is full.
func (r *buildRun) room(ctx context.Context, digest string) (*instance, error) {
	deadline := time.Now().Add(roomTimeout)
	for told := false; ; told = true {
		in, err := r.admitBuild(ctx, r.bd.id, digest, r.order.size)
		if !errors.Is(err, sandbox.ErrExhausted) || time.Now().After(deadline) || !within(r.order.size, r.journal.Ledger().Capacity) {
			return in, err
		}
		if !told {
			r.bd.note("", fmt.Sprintf("waiting for room: %v", err))
		}
		if !pause(ctx, roomRetry) {
			return nil, context.Cause(ctx)
		}
	}
}

// within reports whether there could be room for what is asked for.
func within(ask, capacity sandbox.Resources) bool {
	return ask.MilliCPU <= capacity.MilliCPU && ask.MemoryBytes <= capacity.MemoryBytes && ask.DiskBytes <= capacity.DiskBytes
}

// compose returns the image of the base with layers on top.
func (r *buildRun) compose(ctx context.Context, layers []string) (image.Image, error) {
	if len(layers) == 0 {
		return r.base, nil
	}
	im, err := r.images.Compose(ctx, r.base.Digest, layers, r.bd.report)
	if err != nil {
		return im, err
	}
	return im, r.keep(ctx, r.order, &im)
}

// record returns the layer of what has changed since the last one, "" where nothing has.
func (r *buildRun) record(ctx context.Context) (layer string, err error) {
	dir, err := r.files.layerDir()
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if _, err := r.engine.Save(ctx, r.in.id, engine.SaveSpec{Dir: dir, Kind: engine.SaveLayer}); err != nil {
		return "", err
	}
	archive, err := os.Open(filepath.Join(dir, engine.LayerFile)) //nolint:gosec // below a directory of our own
	if err != nil {
		return "", err
	}
	defer func() { _ = archive.Close() }() // it was only read
	l, err := r.recorder.Add(ctx, archive)
	return l.Digest, err
}

// closeSandbox ends the sandbox, if there is one.
func (r *buildRun) closeSandbox() {
	if r.client != nil {
		r.client.close()
		r.client = nil
	}
	if r.recorder != nil {
		if err := r.recorder.Close(); err != nil {
			r.log.Warn("recorder of a build not closed", slog.String("build_id", r.bd.id), slog.Any("err", err))
		}
		r.recorder = nil
	}
	if r.in != nil {
		r.abandon(context.Background(), r.in)
		r.in = nil
	}
}

func (r *buildRun) close() { r.closeSandbox() }
