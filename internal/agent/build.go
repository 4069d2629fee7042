package agent

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// What is kept of builds.
const (
	maxBuilds       = 64
	maxBuildEntries = 5000
	maxBuildWait    = time.Minute
	maxSources      = 16
	maxSourceBytes  = 4096
)

// builds is the builds of this process. They end with it, and can be asked for again.
type builds struct {
	mu         sync.Mutex
	byID       map[string]*build
	byTemplate map[sandbox.TemplateID]*build // those under way
	order      []string                      // oldest first
}

func newBuilds() *builds {
	return &builds{byID: map[string]*build{}, byTemplate: map[sandbox.TemplateID]*build{}}
}

// build is one build. Its own mutex guards all below it.
type build struct {
	id       string
	template sandbox.TemplateID

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced with each change
	state    agentv1.BuildState
	step     string
	progress float64
	entries  []logEntry
	err      string
	image    image.Image
}

// begin returns the build of a template that is under way, or a new one, which is then the caller's to carry out.
func (b *builds) begin(template sandbox.TemplateID, id string) (bd *build, mine bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if bd := b.byTemplate[template]; bd != nil {
		return bd, false
	}
	bd = &build{
		id: cmp.Or(id, newBuildID()), template: template, changed: make(chan struct{}), state: agentv1.BuildState_BUILD_STATE_BUILDING,
	}
	b.byID[bd.id], b.byTemplate[template] = bd, bd
	b.order = append(b.order, bd.id)
	for i := 0; len(b.order) > maxBuilds && i < len(b.order); {
		if old := b.byID[b.order[i]]; b.byTemplate[old.template] == old {
			i++ // under way
			continue
		}
		delete(b.byID, b.order[i])
		b.order = slices.Delete(b.order, i, i+1)
	}
	return bd, true
}

func (b *builds) finished(bd *build) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.byTemplate, bd.template)
}

func (b *builds) get(id string) (*build, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	bd := b.byID[id]
	if bd == nil {
		return nil, sandbox.NotFoundf("build %.80q: this node has none of that id since it was started; build the template again", id)
	}
	return bd, nil
}

// newBuildID returns a random UUID, as the E2B SDKs expect of a build's id.
func newBuildID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program first
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Build starts building a template's image, or joins the build of the same template that is under way.
func (a *Agent) Build(_ context.Context, req *agentv1.BuildRequest) (*agentv1.BuildResponse, error) {
	r := image.Request{Sources: req.GetSources(), Username: req.GetRegistryUsername(), Password: req.GetRegistryPassword()}
	if err := checkBuild(req.GetTemplateId(), r.Sources); err != nil {
		return nil, toWireError(err)
	}
	bd, mine := a.builds.begin(sandbox.TemplateID(req.GetTemplateId()), req.GetBuildId())
	if !mine {
		return &agentv1.BuildResponse{BuildId: bd.id}, nil
	}
	if !a.crew.run(func(ctx context.Context) { a.runBuild(ctx, bd, r) }) {
		err := sandbox.Unavailablef("node %s is shutting down", a.node)
		bd.finish(image.Image{}, err)
		a.builds.finished(bd)
		return nil, toWireError(err)
	}
	return &agentv1.BuildResponse{BuildId: bd.id}, nil
}

func checkBuild(template string, sources []string) error {
	if _, err := sandbox.ParseID(template); err != nil {
		return sandbox.Invalidf("template id %.80q: want 1 to 64 characters of a-z and 0-9", template)
	}
	if len(sources) == 0 || len(sources) > maxSources {
		return sandbox.Invalidf("%d sources: want 1 to %d", len(sources), maxSources)
	}
	for _, s := range sources {
		if s == "" || len(s) > maxSourceBytes {
			return sandbox.Invalidf("source of %d bytes: want 1 to %d", len(s), maxSourceBytes)
		}
	}
	return nil
}

func (a *Agent) runBuild(ctx context.Context, bd *build, r image.Request) {
	defer a.builds.finished(bd)
	began := time.Now()
	a.log.InfoContext(ctx, "build started", slog.String("build_id", bd.id), slog.String("template_id", string(bd.template)))
	im, err := a.images.Build(ctx, r, bd.report)
	if err == nil {
		err = a.journal.PutImage(ctx, journal.Image{
			Digest: im.Digest, TemplateID: bd.template, Bytes: im.Bytes, Source: im.Source, BuiltAt: now(),
		})
	}
	if err == nil {
		a.templateBuilt(bd.template, im.Digest)
	}
	bd.finish(im, err)
	a.metrics.built(err, began)
	if err != nil {
		a.log.WarnContext(ctx, "build not successful", slog.String("build_id", bd.id), slog.String("template_id", string(bd.template)),
			slog.Duration("after", time.Since(began)), slog.Any("err", err))
		return
	}
	a.log.InfoContext(ctx, "build done", slog.String("build_id", bd.id), slog.String("template_id", string(bd.template)),
		slog.String("image", im.Digest), slog.Int64("bytes", im.Bytes), slog.Duration("after", time.Since(began)))
}

// report takes a step forward. Those who wait are woken by a line, another step, or a hundredth of the whole.
func (b *build) report(p image.Progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fraction := min(1, max(0, p.Fraction))
	news := p.Message != "" || p.Step != b.step || fraction-b.progress >= 0.01 || fraction < b.progress
	if !news {
		return
	}
	b.step, b.progress = p.Step, fraction
	if p.Message != "" {
		b.line("info", p.Message)
	}
	b.wakeAll()
}

// line adds a line to the log.
//
// Preconditions: b.mu is held.
func (b *build) line(level, message string) {
	switch n := len(b.entries); {
	case n == maxBuildEntries-1 && level == "info":
		message = "the log is full: further lines are not kept"
	case n >= maxBuildEntries && level == "info":
		return
	}
	b.entries = append(b.entries, logEntry{Time: now(), Level: level, Logger: "build", Message: clip(message, maxLogText)})
}

// wakeAll wakes everybody who waits for a change.
//
// Preconditions: b.mu is held.
func (b *build) wakeAll() {
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *build) finish(im image.Image, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		b.state, b.err = agentv1.BuildState_BUILD_STATE_FAILED, err.Error()
		b.line("error", "build failed: "+err.Error())
	} else {
		b.state, b.image, b.progress = agentv1.BuildState_BUILD_STATE_READY, im, 1
		b.line("info", fmt.Sprintf("the template is ready: %d MiB", im.Bytes>>20))
	}
	b.wakeAll()
}

// GetBuild returns the state of a build. It waits up to the request's time, but a minute at most, when there is nothing
// new from the offset on and the build is under way.
func (a *Agent) GetBuild(ctx context.Context, req *agentv1.GetBuildRequest) (*agentv1.GetBuildResponse, error) {
	b, err := a.builds.get(req.GetBuildId())
	if err != nil {
		return nil, toWireError(err)
	}
	from := int(req.GetOffset())
	if from < 0 {
		return nil, toWireError(sandbox.Invalidf("offset of %d: want 0 or more", from))
	}
	wait, err := fromWireTimeout(req.GetWait())
	if req.GetWait() != nil && err != nil {
		return nil, toWireError(err)
	}
	timer := time.NewTimer(min(wait, maxBuildWait))
	defer timer.Stop()
	answer, news, changed := b.since(from)
	if news || req.GetWait() == nil {
		return answer, nil
	}
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
		return nil, toWireError(ctx.Err())
	}
	answer, _, _ = b.since(from)
	return answer, nil
}

// since returns the build with its log from an offset on, whether that is worth an answer, and what is closed at the next
// change.
func (b *build) since(from int) (answer *agentv1.GetBuildResponse, news bool, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	from = min(from, len(b.entries))
	return &agentv1.GetBuildResponse{
		State: b.state, Step: b.step, Progress: b.progress, Entries: toWireLogs(b.entries[from:]), Error: b.err,
		ImageDigest: b.image.Digest, ImageBytes: b.image.Bytes, Source: b.image.Source,
	}, from < len(b.entries) || b.state != agentv1.BuildState_BUILD_STATE_BUILDING, b.changed
}
