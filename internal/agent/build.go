package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/recipe"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// What is kept of builds, and what one may ask for.
const (
	maxBuilds       = 64
	maxBuildEntries = 5000
	maxBuildBytes   = 4 << 20 // of log text
	maxBuildWait    = time.Minute
	maxSources      = 16
	maxSourceBytes  = 4096
	maxSteps        = 512
	maxCommandBytes = 128 << 10
)

// builds is the builds of this process. They end with it, and can be asked for again.
type builds struct {
	slots chan struct{} // holds an element for each build that is being carried out

	mu       sync.Mutex
	byID     map[string]*build
	underWay map[*build]struct{}
	order    []string           // oldest first
	held     map[string]int     // images and layers that builds need
	bases    map[string]fetched // by baseKey
}

func newBuilds(slots int) *builds {
	return &builds{
		slots: make(chan struct{}, slots), byID: map[string]*build{}, underWay: map[*build]struct{}{}, held: map[string]int{},
		bases: map[string]fetched{},
	}
}

// begin returns the build with the id, or a new one, which is then the caller's to carry out. Without an id it is the build
// of the template that is under way.
func (b *builds) begin(template sandbox.TemplateID, id string) (bd *build, mine bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if bd := b.byID[id]; bd != nil {
		return bd, false
	}
	if id == "" {
		for bd := range b.underWay {
			if bd.template == template {
				return bd, false
			}
		}
		id = newBuildID()
	}
	bd = newBuild(id, template)
	b.byID[id], b.underWay[bd] = bd, struct{}{}
	b.order = append(b.order, id)
	for i := 0; len(b.order) > maxBuilds && i < len(b.order); {
		old := b.byID[b.order[i]]
		if _, busy := b.underWay[old]; busy {
			i++
			continue
		}
		delete(b.byID, old.id)
		b.order = slices.Delete(b.order, i, i+1)
	}
	return bd, true
}

func (b *builds) finished(bd *build) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.underWay, bd)
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

// buildOrder is a build as it was asked for.
type buildOrder struct {
	template sandbox.TemplateID
	image    image.Request // the base, unless base is set
	base     string        // digest
	guest    sandbox.GuestSettings
	steps    []recipe.Step
	start    string
	ready    string
	size     sandbox.Resources
	unsized  bool // nobody asked for the size
	force    bool
	held     []string // digests that it keeps from being freed
}

// plain says that nothing runs in a sandbox: the base is all there is to it.
func (o *buildOrder) plain() bool { return len(o.steps) == 0 && o.start == "" && o.ready == "" }

func fromWireBuild(req *agentv1.BuildRequest) (*buildOrder, error) {
	o := &buildOrder{
		template: sandbox.TemplateID(req.GetTemplateId()),
		image:    image.Request{Sources: req.GetSources(), Username: req.GetRegistryUsername(), Password: req.GetRegistryPassword()},
		base:     req.GetBaseImageDigest(), guest: fromWireGuest(req.GetBaseGuest()), start: req.GetStartCommand(), ready: req.GetReadyCommand(),
		size: fromWireResources(req.GetResources()), unsized: req.GetDefaultResources(), force: req.GetForce(),
	}
	for _, s := range req.GetSteps() {
		o.steps = append(o.steps, recipe.Step{Type: s.GetType(), Args: s.GetArgs(), FilesHash: s.GetFilesHash(), Force: s.GetForce()})
	}
	return o, o.check(req.GetBuildId())
}

func (o *buildOrder) check(id string) error {
	if _, err := sandbox.ParseID(string(o.template)); err != nil {
		return sandbox.Invalidf("template id %.80q: want 1 to 64 characters of a-z and 0-9", string(o.template))
	}
	if id != "" && snapshot.CheckID(id) != nil {
		return sandbox.Invalidf("build id %.80q: want 1 to 64 characters of a-z, 0-9 and '-'", id)
	}
	if err := o.checkBase(); err != nil {
		return err
	}
	if len(o.steps) > maxSteps {
		return sandbox.Invalidf("%d steps: want at most %d", len(o.steps), maxSteps)
	}
	for i, s := range o.steps {
		if err := recipe.Check(s); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	if n := max(len(o.start), len(o.ready)); n > maxCommandBytes {
		return sandbox.Invalidf("start or ready command of %d bytes: want at most %d", n, maxCommandBytes)
	}
	if r := o.size; !o.plain() && (r.MilliCPU <= 0 || r.MemoryBytes <= 0 || r.DiskBytes <= 0) {
		return sandbox.Invalidf("resources %+v: a build with steps or commands needs all of them", r)
	}
	return nil
}

func (o *buildOrder) checkBase() error {
	sources := o.image.Sources
	if o.base != "" {
		if !digestForm.MatchString(o.base) {
			return sandbox.Invalidf("image digest %.80q: want sha256: and 64 hex digits", o.base)
		}
		if len(sources) > 0 {
			return sandbox.Invalidf("both sources and an image to start from: want one of them")
		}
		return nil
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

// Build starts a build, or joins the one of the same id. Without an id it joins the build of the template that is under
// way.
func (a *Agent) Build(_ context.Context, req *agentv1.BuildRequest) (*agentv1.BuildResponse, error) {
	o, err := fromWireBuild(req)
	if err != nil {
		return nil, toWireError(err)
	}
	bd, mine := a.builds.begin(o.template, req.GetBuildId())
	if !mine {
		return &agentv1.BuildResponse{BuildId: bd.id}, nil
	}
	if err := a.follow(bd, func(ctx context.Context) (built, error) { return a.runBuild(ctx, bd, o) }); err != nil {
		return nil, toWireError(err)
	}
	return &agentv1.BuildResponse{BuildId: bd.id}, nil
}

// errCancelled is why a build ends that somebody cancels; people see its text.
var errCancelled = errors.New("cancelled")

// follow carries a build out in the background.
func (a *Agent) follow(bd *build, work func(context.Context) (built, error)) error {
	started := a.crew.run(func(ctx context.Context) {
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		bd.cancelWith(cancel)
		out, err := a.inLine(ctx, bd, work)
		if cause := context.Cause(ctx); cause != nil && err != nil {
			err = failedAt(stepOf(err), cause)
			if !errors.Is(cause, errCancelled) {
				err = sandbox.Unavailablef("node %s is shutting down", a.node)
			}
		}
		a.builds.finished(bd)
		bd.finish(out, err)
	})
	if started {
		return nil
	}
	err := sandbox.Unavailablef("node %s is shutting down", a.node)
	a.builds.finished(bd)
	bd.finish(built{}, err)
	return err
}

// inLine waits for the build's turn and then does the work.
func (a *Agent) inLine(ctx context.Context, bd *build, work func(context.Context) (built, error)) (built, error) {
	select {
	case a.builds.slots <- struct{}{}:
	default:
		bd.note("", fmt.Sprintf("waiting: %d builds are under way on this node, which is the most that may", cap(a.builds.slots)))
		select {
		case a.builds.slots <- struct{}{}:
		case <-ctx.Done():
			return built{}, context.Cause(ctx)
		}
	}
	defer func() { <-a.builds.slots }()
	return work(ctx)
}

// CancelBuild ends a build that is under way, and waits until nothing is left of it.
func (a *Agent) CancelBuild(ctx context.Context, req *agentv1.CancelBuildRequest) (*agentv1.CancelBuildResponse, error) {
	bd, err := a.builds.get(req.GetBuildId())
	if err != nil {
		return nil, toWireError(err)
	}
	if !bd.stop(errCancelled) {
		return nil, toWireError(sandbox.Conflictf("build %s has ended already", bd.id))
	}
	select {
	case <-bd.done:
		return &agentv1.CancelBuildResponse{}, nil
	case <-ctx.Done():
		return nil, toWireError(ctx.Err())
	}
}

// GetBuild returns the state of a build. It waits up to the request's time, but a minute at most, when there is nothing
// new from the offset on and the build is under way.
func (a *Agent) GetBuild(ctx context.Context, req *agentv1.GetBuildRequest) (*agentv1.GetBuildResponse, error) {
	b, err := a.builds.get(req.GetBuildId())
	if err != nil {
		return nil, toWireError(err)
	}
	from, limit := int(req.GetOffset()), int(req.GetLimit())
	if from < 0 || limit < 0 {
		return nil, toWireError(sandbox.Invalidf("offset of %d and limit of %d: want 0 or more", from, limit))
	}
	wait, err := fromWireTimeout(req.GetWait())
	if req.GetWait() != nil && err != nil {
		return nil, toWireError(err)
	}
	timer := time.NewTimer(min(wait, maxBuildWait))
	defer timer.Stop()
	answer, news, changed := b.since(from, limit)
	if news || req.GetWait() == nil {
		return answer, nil
	}
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
		return nil, toWireError(ctx.Err())
	}
	answer, _, _ = b.since(from, limit)
	return answer, nil
}
