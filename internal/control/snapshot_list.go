package control

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// SnapshotQuery says which snapshots to list. The zero value is all of them.
type SnapshotQuery struct {
	// SandboxID is what they were saved from.
	SandboxID sandbox.ID
	// Name is a name or the id of a template, with or without a tag.
	Name string
	// Limit is the length of the page, 1 to MaxPage; 0 means 100.
	Limit int
	// Next continues where the page with this token ended.
	Next string
}

// ListSnapshots returns a page of snapshots, the newest first, and the token of the next page, which is empty on the last.
func (c *Control) ListSnapshots(ctx context.Context, q SnapshotQuery) ([]Snapshot, string, error) {
	setDefault(&q.Limit, 100)
	if q.Limit < 1 || q.Limit > MaxPage {
		return nil, "", sandbox.Invalidf("limit %d: want 1 to %d", q.Limit, MaxPage)
	}
	match, err := snapshotMatcher(q)
	if err != nil {
		return nil, "", err
	}
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return nil, "", fmt.Errorf("list snapshots: %w", err)
	}
	var found []Snapshot
	for _, t := range all {
		for tag := range t.Tags {
			s := Snapshot{Template: t, Tag: tag}
			s.Build, _ = t.Tagged(tag)
			if t.Kind == sandbox.TemplateSnapshot && match(s) {
				found = append(found, s)
			}
		}
	}
	slices.SortFunc(found, func(a, b Snapshot) int { return newestFirst(a.mark(), b.mark()) })
	return snapshotPage(found, q)
}

// mark is where a snapshot stands in the list.
type mark struct {
	at  int64 // nanoseconds of Unix time
	key string
}

func (s Snapshot) mark() mark {
	return mark{at: s.Template.Tags[s.Tag].At.UnixNano(), key: string(s.Template.ID) + ":" + s.Tag}
}

func newestFirst(a, b mark) int { return cmp.Or(cmp.Compare(b.at, a.at), cmp.Compare(b.key, a.key)) }

func snapshotPage(found []Snapshot, q SnapshotQuery) ([]Snapshot, string, error) {
	if q.Next != "" {
		at, key, err := decodeNext(q.Next)
		if err != nil {
			return nil, "", err
		}
		after := mark{at: at, key: key}
		found = slices.DeleteFunc(found, func(s Snapshot) bool { return newestFirst(s.mark(), after) <= 0 })
	}
	if len(found) <= q.Limit {
		return found, "", nil
	}
	last := found[q.Limit-1].mark()
	return found[:q.Limit], encodeNext(last.at, last.key), nil
}

func snapshotMatcher(q SnapshotQuery) (func(Snapshot) bool, error) {
	if q.Name == "" {
		return func(s Snapshot) bool { return q.SandboxID == "" || s.Build.Source == string(q.SandboxID) }, nil
	}
	name, err := ParseName(q.Name)
	if err != nil {
		return nil, err
	}
	return func(s Snapshot) bool {
		if q.SandboxID != "" && s.Build.Source != string(q.SandboxID) || strings.Contains(q.Name, ":") && s.Tag != name.Tag {
			return false
		}
		return string(s.Template.ID) == name.Key() || slices.Contains(s.Template.Names, name.Key())
	}, nil
}

// SavedAt is when the snapshot became what its tag means.
func (s Snapshot) SavedAt() time.Time { return s.Template.Tags[s.Tag].At }
