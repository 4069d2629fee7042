package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// The names of what a build does before and after its steps, which have numbers.
const (
	stepBase     = "base"
	stepFinalize = "finalize"
)

// built is what a build comes to.
type built struct {
	image      image.Image
	guest      sandbox.GuestSettings
	checkpoint *agentv1.Checkpoint // nil without a start command
	start      string
	ready      string
	size       sandbox.Resources
	done       string // a sentence for people
}

// stepError says where a build failed. People see its text alone.
type stepError struct {
	step string
	err  error
}

func (e *stepError) Error() string { return e.err.Error() }
func (e *stepError) Unwrap() error { return e.err }

// failedAt says where err happened, unless it says so itself; nil stays nil.
func failedAt(step string, err error) error {
	if err == nil || step == "" || stepOf(err) != "" {
		return err
	}
	return &stepError{step: step, err: err}
}

func stepOf(err error) string {
	if at, ok := errors.AsType[*stepError](err); ok {
		return at.step
	}
	return ""
}

// build is one build. Its own mutex guards all below it.
type build struct {
	id       string
	template sandbox.TemplateID
	done     chan struct{} // closed when it has ended

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced with each change
	cancel   context.CancelCauseFunc
	state    agentv1.BuildState
	at       string // the stage: "base", a step's number or "finalize"
	step     string // for people
	progress float64
	from, to float64 // the part of the whole that a report's fraction means
	entries  []logEntry
	bytes    int
	full     bool
	err      string
	failed   string
	out      built
}

func newBuild(id string, template sandbox.TemplateID) *build {
	return &build{
		id: id, template: template, done: make(chan struct{}), changed: make(chan struct{}), to: 1,
		state: agentv1.BuildState_BUILD_STATE_BUILDING,
	}
}

// cancelWith notes how the build is cancelled; one that was stopped before is at once.
func (b *build) cancelWith(f context.CancelCauseFunc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cancel != nil {
		f(errCancelled)
		return
	}
	b.cancel = f
}

// stop ends the build, and reports false when it has ended.
func (b *build) stop(cause error) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.state != agentv1.BuildState_BUILD_STATE_BUILDING {
		return false
	}
	if b.cancel == nil {
		b.cancel = func(error) {} // it has not begun: cancelWith sees to it
		return true
	}
	b.cancel(cause)
	return true
}

// stage says which part of the whole build comes now, from one fraction of it to another.
func (b *build) stage(step string, from, to float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at, b.step, b.from, b.to, b.progress = step, step, from, to, from
	b.wakeAll()
}

// report takes a stage forward. Those who wait are woken by a line, another step, or a hundredth of the whole.
func (b *build) report(p image.Progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fraction := b.from + (b.to-b.from)*min(1, max(0, p.Fraction))
	news := p.Message != "" || p.Step != b.step || fraction-b.progress >= 0.01 || fraction < b.progress
	if !news {
		return
	}
	b.step, b.progress = p.Step, fraction
	if p.Message != "" {
		b.line("info", b.at, p.Message)
	}
	b.wakeAll()
}

// note adds a line of our own to the log.
func (b *build) note(step, message string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.line("info", step, message)
	b.wakeAll()
}

// notes adds several lines.
func (b *build) notes(step string, messages []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range messages {
		b.line("info", step, m)
	}
	b.wakeAll()
}

// output adds a line that a process in a sandbox wrote.
func (b *build) output(level, step, message string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.line(level, step, message)
	b.wakeAll()
}

// line adds a line to the log, if there is room.
//
// Preconditions: b.mu is held.
func (b *build) line(level, step, message string) {
	if b.full {
		return
	}
	if len(b.entries) >= maxBuildEntries-1 || b.bytes > maxBuildBytes {
		b.full = true
		level, message = "warn", "the log is full: further lines are not kept"
	}
	b.last(level, step, message)
}

// last adds a line whether there is room or not.
//
// Preconditions: b.mu is held.
func (b *build) last(level, step, message string) {
	message = clip(message, maxLogText)
	e := logEntry{Time: now(), Level: level, Logger: "build", Message: message}
	if step != "" {
		e.Fields = map[string]string{"step": step}
	}
	b.bytes += len(message)
	b.entries = append(b.entries, e)
}

// wakeAll wakes everybody who waits for a change.
//
// Preconditions: b.mu is held.
func (b *build) wakeAll() {
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *build) finish(out built, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		b.state, b.err, b.failed = agentv1.BuildState_BUILD_STATE_FAILED, err.Error(), stepOf(err)
		b.last("error", b.failed, "build failed: "+err.Error())
	} else {
		b.state, b.out, b.progress = agentv1.BuildState_BUILD_STATE_READY, out, 1
		b.last("info", stepFinalize, out.done)
	}
	b.wakeAll()
	close(b.done)
}

// since returns the build with its log from an offset on, at most limit lines of it unless that is 0, whether that is worth
// an answer, and what is closed at the next change.
func (b *build) since(from, limit int) (answer *agentv1.GetBuildResponse, news bool, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	from = min(from, len(b.entries))
	to := len(b.entries)
	if limit > 0 {
		to = min(to, from+limit)
	}
	answer = &agentv1.GetBuildResponse{
		State: b.state, Step: b.step, Progress: b.progress, Entries: toWireLogs(b.entries[from:to]), Error: b.err,
		FailedStep: b.failed, ImageDigest: b.out.image.Digest, ImageBytes: b.out.image.Bytes, Source: b.out.image.Source,
		Checkpoint: b.out.checkpoint, EntriesTotal: int32(len(b.entries)), //nolint:gosec // bounded far below 2^31
	}
	if b.state == agentv1.BuildState_BUILD_STATE_READY {
		answer.Guest = toWireGuest(&b.out.guest)
		answer.StartCommand, answer.ReadyCommand = b.out.start, b.out.ready
		answer.Resources = toWireResources(b.out.size)
	}
	return answer, from < len(b.entries) || b.state != agentv1.BuildState_BUILD_STATE_BUILDING, b.changed
}

func toWireGuest(g *sandbox.GuestSettings) *agentv1.GuestSettings {
	return &agentv1.GuestSettings{Env: g.Env, User: g.User, Workdir: g.WorkDir}
}

// templateReady words the end of a build.
func templateReady(im *image.Image) string {
	return fmt.Sprintf("the template is ready: %d MiB", im.Bytes>>20)
}
