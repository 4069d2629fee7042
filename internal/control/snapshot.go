package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// SnapshotRequest says what a snapshot is to be.
type SnapshotRequest struct {
	// Name is [namespace/]alias[:tag]; empty makes a snapshot that only its id finds.
	Name string
	// Kind is what is kept; empty means memory.
	Kind sandbox.CheckpointKind
}

// Snapshot is what one tag of a snapshot template means.
type Snapshot struct {
	Template sandbox.Template
	Tag      string
	Build    sandbox.Build
}

// ID names the snapshot where a template is asked for: its name, or the id of its template where it has none, with the tag.
func (s Snapshot) ID() string {
	if len(s.Template.Names) > 0 {
		return s.Template.Names[0] + ":" + s.Tag
	}
	return string(s.Template.ID) + ":" + s.Tag
}

// Names are the names of the snapshot with its tag.
func (s Snapshot) Names() []string {
	out := make([]string, 0, len(s.Template.Names))
	for _, n := range s.Template.Names {
		out = append(out, n+":"+s.Tag)
	}
	return out
}

// saving is the set of checkpoints that are being made for this server and are in no record yet.
type saving struct {
	mu  sync.Mutex
	ids map[string]struct{}
}

func (s *saving) begin(id string) (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ids == nil {
		s.ids = make(map[string]struct{})
	}
	s.ids[id] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.ids, id)
	}
}

func (s *saving) has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.ids[id]
	return ok
}

// CreateSnapshot saves a sandbox, running or paused, which goes on. With the name of an older snapshot it becomes what that
// name's tag means. The node saves first and the record follows, so that no record is without what it stands for.
// Errors: ErrInvalid, ErrNotFound, ErrConflict for the name of a template that is no snapshot, ErrExhausted, ErrUnavailable.
func (c *Control) CreateSnapshot(ctx context.Context, id sandbox.ID, req SnapshotRequest) (Snapshot, error) {
	name := Name{Tag: sandbox.DefaultTag}
	if req.Name != "" {
		var err error
		if name, err = ParseName(req.Name); err != nil {
			return Snapshot{}, err
		}
		if err := c.checkSnapshotName(ctx, name); err != nil {
			return Snapshot{}, err
		}
	}
	kind, err := kindToWire(req.Kind)
	if err != nil {
		return Snapshot{}, err
	}
	h, err := c.hold(ctx, id)
	if err != nil {
		return Snapshot{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CreateDeadline)
	defer cancel()
	msg := &agentv1.SnapshotRequest{Id: string(id), CheckpointId: newBuildID(), Kind: kind}
	defer c.saving.begin(msg.GetCheckpointId())()
	point, err := c.save(ctx, h, msg)
	if err != nil {
		return Snapshot{}, fmt.Errorf("snapshot sandbox %s: %w", id, err)
	}
	made := snapshotBuild(h.box, name.Tag, point)
	made.MadeOn = c.fleet.machine(h.box.NodeID)
	out, err := c.recordSnapshot(ctx, name, made)
	if err != nil {
		c.unsave(ctx, h, msg.GetCheckpointId())
		return Snapshot{}, fmt.Errorf("snapshot sandbox %s: %w", id, err)
	}
	c.note(ctx, Event{
		Type: "snapshot_created", NodeID: h.box.NodeID, SandboxID: id, Message: "snapshot " + out.ID() + " saved",
		Fields: map[string]string{"template_id": string(out.Template.ID), "build_id": out.Build.ID, "kind": string(out.Build.Checkpoint)},
	})
	return out, nil
}

// save has the node make a checkpoint, and gives up what may be there of one that did not succeed.
func (c *Control) save(ctx context.Context, h held, msg *agentv1.SnapshotRequest) (*agentv1.Checkpoint, error) {
	var resp *agentv1.SnapshotResponse
	err := c.settled(ctx, &h, func(ctx context.Context) (err error) {
		resp, err = h.agent.Snapshot(ctx, msg)
		return err
	})
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		return nil, unknown(h.box.ID)
	case err != nil:
		if errors.Is(err, sandbox.ErrUnavailable) { // it may have been made all the same
			c.unsave(ctx, h, msg.GetCheckpointId())
		}
		return nil, err
	}
	c.fleet.setImage(h.box.NodeID, msg.GetCheckpointId(), true)
	return resp.GetCheckpoint(), nil
}

// unsave has the node remove a checkpoint that nobody is to start from.
func (c *Control) unsave(ctx context.Context, h held, checkpoint string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.limits.CallDeadline)
	defer cancel()
	_, err := h.agent.RemoveCheckpoint(ctx, &agentv1.RemoveCheckpointRequest{CheckpointId: checkpoint})
	if err != nil { // the node's next registration finds it
		c.log.LogAttrs(ctx, slog.LevelWarn, "checkpoint not removed", nodeAttr(h.box.NodeID), slog.String("checkpoint_id", checkpoint), errAttr(err))
		return
	}
	c.fleet.setImage(h.box.NodeID, checkpoint, false)
}

func snapshotBuild(box sandbox.Sandbox, tag string, p *agentv1.Checkpoint) sandbox.Build {
	now := time.Now().UTC()
	return sandbox.Build{
		ID: p.GetId(), State: sandbox.BuildReady, Tags: []string{tag}, ImageDigest: p.GetImageDigest(),
		Checkpoint: checkpointKind(p.GetKind()), CheckpointBytes: p.GetBytes(), Resources: resourcesFromWire(p.GetResources()),
		Guest: guestFromWire(p.GetGuest()), Source: string(box.ID), Secure: box.Secure, CreatedAt: now, FinishedAt: now,
	}
}

// checkSnapshotName refuses, before anything is saved, a name that a snapshot cannot have.
func (c *Control) checkSnapshotName(ctx context.Context, name Name) error {
	if name.Key() == DefaultTemplate {
		return notSnapshotName(name)
	}
	t, _, err := c.resolve(ctx, name.Key())
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	if err == nil && t.Kind != sandbox.TemplateSnapshot {
		return notSnapshotName(name)
	}
	return err
}

func notSnapshotName(name Name) error {
	return sandbox.Conflictf("name %q belongs to a template that is no snapshot: choose another name", name)
}

// recordSnapshot puts a snapshot on record, under its name where it has one.
func (c *Control) recordSnapshot(ctx context.Context, name Name, b sandbox.Build) (Snapshot, error) {
	for {
		t, err := c.putSnapshot(ctx, name, b)
		if !errors.Is(err, errFaster) {
			return Snapshot{Template: t, Tag: name.Tag, Build: b}, err
		}
	}
}

func (c *Control) putSnapshot(ctx context.Context, name Name, b sandbox.Build) (sandbox.Template, error) {
	t := sandbox.Template{
		ID: sandbox.NewTemplateID(), Kind: sandbox.TemplateSnapshot, Names: []string{}, Builds: []sandbox.Build{b},
		SourceSandbox: sandbox.ID(b.Source), CreatedAt: b.CreatedAt, UpdatedAt: b.CreatedAt,
	}
	setTag(&t, name.Tag, b.ID, b.CreatedAt)
	if name.Alias != "" {
		old, err := c.templates.Template(ctx, name.Key())
		if err == nil {
			return c.addSnapshot(ctx, old.ID, name, b)
		}
		if !errors.Is(err, sandbox.ErrNotFound) {
			return sandbox.Template{}, fmt.Errorf("find template %q: %w", name, err)
		}
		t.Names = []string{name.Key()}
	}
	defer c.catalog.forget()
	err := c.templates.CreateTemplate(ctx, t)
	if errors.Is(err, sandbox.ErrConflict) {
		return sandbox.Template{}, errFaster
	}
	return t, err
}

// addSnapshot makes a build what a tag of a snapshot template means. The builds that no tag means any more are freed.
func (c *Control) addSnapshot(ctx context.Context, id sandbox.TemplateID, name Name, b sandbox.Build) (sandbox.Template, error) {
	t, err := c.changeTemplate(ctx, id, func(t *sandbox.Template) error {
		if t.Kind != sandbox.TemplateSnapshot {
			return notSnapshotName(name)
		}
		t.Builds = slices.Insert(t.Builds, 0, b)
		setTag(t, name.Tag, b.ID, b.CreatedAt)
		t.SourceSandbox, t.UpdatedAt = sandbox.ID(b.Source), b.CreatedAt
		dropUntagged(t)
		return nil
	})
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Template{}, errFaster
	}
	return t, err
}

// dropUntagged drops the builds that no tag means.
func dropUntagged(t *sandbox.Template) {
	t.Builds = slices.DeleteFunc(t.Builds, func(b sandbox.Build) bool {
		for _, tag := range t.Tags {
			if tag.BuildID == b.ID {
				return false
			}
		}
		return true
	})
}

// DeleteSnapshot deletes a snapshot: what a tag means where the name has one, or all of its template.
// Errors: ErrInvalid, ErrNotFound.
func (c *Control) DeleteSnapshot(ctx context.Context, ref string) error {
	t, name, err := c.resolve(ctx, ref)
	if errors.Is(err, sandbox.ErrNotFound) || err == nil && t.Kind != sandbox.TemplateSnapshot {
		return sandbox.NotFoundf("snapshot %q does not exist", name)
	}
	if err != nil {
		return err
	}
	return c.DeleteTemplate(ctx, ref)
}
