package control

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// MaxPage is the most sandboxes that one page holds.
const MaxPage = 1000

// ListQuery says which sandboxes to list. The zero value is all of them, the newest first.
type ListQuery struct {
	// States are the wanted states; empty means all but the deleted, which are never listed.
	States []sandbox.State
	// Metadata must all be on the sandbox.
	Metadata map[string]string
	// Template is the id or a name of the sandboxes' template.
	Template string
	// StartedAfter leaves out what started earlier.
	StartedAfter time.Time
	OldestFirst  bool
	// Limit is the length of the page, 1 to MaxPage; 0 means 100.
	Limit int
	// Next continues where the page with this token ended.
	Next string
}

// Page is a part of the list.
type Page struct {
	Sandboxes []sandbox.Sandbox
	// Next asks for the next page; empty on the last.
	Next string
	// Running counts the running sandboxes that match, on all pages.
	Running int
}

// List returns a page of sandboxes in the order of their start.
func (c *Control) List(ctx context.Context, q ListQuery) (Page, error) {
	match, err := c.matcher(ctx, q)
	if err != nil {
		return Page{}, err
	}
	setDefault(&q.Limit, 100)
	if q.Limit < 1 || q.Limit > MaxPage {
		return Page{}, sandbox.Invalidf("limit %d: want 1 to %d", q.Limit, MaxPage)
	}
	first, last := ends()
	from := last
	if q.OldestFirst {
		from = first
		if !q.StartedAfter.IsZero() {
			from.at = q.StartedAfter.UnixNano()
		}
	}
	if q.Next != "" {
		if from, err = parseNext(q.Next); err != nil {
			return Page{}, err
		}
	}
	var page Page
	c.index.scan(!q.OldestFirst, from, func(e *entry) bool {
		if !match.all(&e.box) {
			return !match.tooOld(&e.box, !q.OldestFirst)
		}
		if len(page.Sandboxes) == q.Limit {
			page.Next = formatNext(placeOf(&page.Sandboxes[q.Limit-1]))
			return false
		}
		page.Sandboxes = append(page.Sandboxes, e.box)
		return true
	})
	now := time.Now()
	for i := range page.Sandboxes {
		c.slide(&page.Sandboxes[i], now)
	}
	page.Running = c.countRunning(match)
	return page, nil
}

// countRunning looks at every sandbox only where the filter leaves no other way.
func (c *Control) countRunning(match matcher) int {
	if len(match.states) > 0 && !slices.Contains(match.states, sandbox.StateRunning) {
		return 0
	}
	if match.plain() {
		return c.index.states()[sandbox.StateRunning]
	}
	n := 0
	_, last := ends()
	c.index.scan(true, last, func(e *entry) bool {
		if e.box.State == sandbox.StateRunning && match.rest(&e.box) {
			n++
		}
		return !match.tooOld(&e.box, true)
	})
	return n
}

// matcher is a ListQuery made ready for many sandboxes.
type matcher struct {
	states   []sandbox.State
	metadata map[string]string
	// template is the name as given, templateID what it stands for.
	template   string
	templateID sandbox.TemplateID
	after      time.Time
}

func (c *Control) matcher(ctx context.Context, q ListQuery) (matcher, error) {
	for _, s := range q.States {
		if !s.Valid() {
			return matcher{}, sandbox.Invalidf("state %.40q: want one of creating, running, pausing, paused, resuming, "+
				"stopping, stopped, migrating, lost, failed", s)
		}
	}
	m := matcher{states: q.States, metadata: q.Metadata, after: q.StartedAfter}
	if q.Template == "" {
		return m, nil
	}
	name, err := ParseName(q.Template)
	if err != nil {
		return matcher{}, err
	}
	m.template = name.String()
	t, _, err := c.resolve(ctx, q.Template)
	switch {
	case err == nil:
		m.templateID = t.ID
	case !errors.Is(err, sandbox.ErrNotFound): // sandboxes may outlive their template
		return matcher{}, err
	}
	return m, nil
}

func (m *matcher) all(b *sandbox.Sandbox) bool {
	return (len(m.states) == 0 || slices.Contains(m.states, b.State)) && m.rest(b)
}

// rest is everything but the state.
func (m *matcher) rest(b *sandbox.Sandbox) bool {
	if b.StartedAt.Before(m.after) {
		return false
	}
	if m.template != "" && b.TemplateID != m.templateID && b.TemplateName != m.template && string(b.TemplateID) != m.template {
		return false
	}
	for k, v := range m.metadata {
		if have, ok := b.Metadata[k]; !ok || have != v {
			return false
		}
	}
	return true
}

func (m *matcher) plain() bool {
	return len(m.metadata) == 0 && m.template == "" && m.after.IsZero()
}

// tooOld reports whether everything that follows b starts too early.
func (m *matcher) tooOld(b *sandbox.Sandbox, newestFirst bool) bool {
	return newestFirst && b.StartedAt.Before(m.after)
}

// nextVersion is the first byte of a token, so that its form can change.
const nextVersion = 1

func formatNext(p place) string { return encodeNext(p.at, string(p.id)) }

func encodeNext(at int64, key string) string {
	raw := append([]byte{nextVersion}, make([]byte, 8)...)
	binary.BigEndian.PutUint64(raw[1:], uint64(at)) //nolint:gosec // the bits, not the number
	return base64.RawURLEncoding.EncodeToString(append(raw, key...))
}

func parseNext(s string) (place, error) {
	at, key, err := decodeNext(s)
	if err != nil {
		return place{}, err
	}
	id, err := sandbox.ParseID(key)
	if err != nil {
		return place{}, badNext(s)
	}
	return place{at: at, id: id}, nil
}

func decodeNext(s string) (at int64, key string, err error) {
	const longest = 512
	if len(s) > longest {
		return 0, "", badNext(s)
	}
	raw, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil || len(raw) < 10 || raw[0] != nextVersion {
		return 0, "", badNext(s)
	}
	return int64(binary.BigEndian.Uint64(raw[1:9])), string(raw[9:]), nil //nolint:gosec // the bits, not the number
}

func badNext(s string) error {
	return sandbox.Invalidf("next token %.40q: want one that an earlier page returned", s)
}
