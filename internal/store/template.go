package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxTemplateNames bounds a template's names, and with them the size of a transaction.
const maxTemplateNames = 32

// maxTemplateBuilds and maxTemplateTags bound a record, which etcd takes up to a mebibyte of.
const (
	maxTemplateBuilds = 256
	maxTemplateTags   = 256
)

// templateName says which template a name finds.
type templateName struct {
	ID sandbox.TemplateID `json:"id"`
}

// CreateTemplate stores a new template and takes its names, all or nothing.
// Errors: ErrInvalid for a bad id or name, ErrConflict when the id or one of the names is taken.
func (s *Store) CreateTemplate(ctx context.Context, t sandbox.Template) error {
	if err := checkTemplate(t); err != nil {
		return err
	}
	when := []clientv3.Cmp{absent(s.templates.key(string(t.ID)))}
	then, err := s.templatePut(t)
	if err != nil {
		return err
	}
	more, ops, err := s.takeNames(t.ID, t.Names)
	if err != nil {
		return err
	}
	ok, _, err := commit(ctx, s.client, append(when, more...), append(then, ops...))
	if err != nil {
		return fmt.Errorf("create template %s: %w", t.ID, err)
	}
	if !ok {
		return s.templateTaken(ctx, t)
	}
	return nil
}

func checkTemplate(t sandbox.Template) error {
	if err := checkName("template id", string(t.ID)); err != nil {
		return err
	}
	if len(t.Names) > maxTemplateNames {
		return sandbox.Invalidf("template %s has %d names: want at most %d", t.ID, len(t.Names), maxTemplateNames)
	}
	if len(t.Builds) > maxTemplateBuilds || len(t.Tags) > maxTemplateTags {
		return sandbox.Exhaustedf("template %s has %d builds and %d tags: want at most %d and %d", t.ID, len(t.Builds), len(t.Tags),
			maxTemplateBuilds, maxTemplateTags)
	}
	for i, n := range t.Names {
		if err := checkName("template name", n); err != nil {
			return err
		}
		if slices.Contains(t.Names[:i], n) {
			return sandbox.Invalidf("template %s has the name %q twice", t.ID, n)
		}
	}
	return nil
}

func (s *Store) templatePut(t sandbox.Template) ([]clientv3.Op, error) {
	text, err := s.templates.encode(t)
	if err != nil {
		return nil, err
	}
	return []clientv3.Op{clientv3.OpPut(s.templates.key(string(t.ID)), text)}, nil
}

// takeNames returns the conditions and writes that give free names to a template.
func (s *Store) takeNames(id sandbox.TemplateID, names []string) ([]clientv3.Cmp, []clientv3.Op, error) {
	text, err := s.names.encode(templateName{ID: id})
	if err != nil {
		return nil, nil, err
	}
	var when []clientv3.Cmp
	var then []clientv3.Op
	for _, n := range names {
		when = append(when, absent(s.names.key(n)))
		then = append(then, clientv3.OpPut(s.names.key(n), text))
	}
	return when, then, nil
}

// templateTaken says which part of t is in use by another template.
func (s *Store) templateTaken(ctx context.Context, t sandbox.Template) error {
	for _, n := range t.Names {
		if r, err := s.names.get(ctx, n); err == nil && r.Value.ID != t.ID {
			return sandbox.Conflictf("template name %q belongs to template %s: choose another name, or delete that template",
				n, r.Value.ID)
		}
	}
	return sandbox.Conflictf("template %s exists already", t.ID)
}

// Template returns the template with the id or, failing that, the name; else ErrNotFound.
func (s *Store) Template(ctx context.Context, idOrName string) (sandbox.Template, error) {
	r, err := s.template(ctx, idOrName)
	return r.Value, err
}

func (s *Store) template(ctx context.Context, ref string) (Record[sandbox.Template], error) {
	none := Record[sandbox.Template]{}
	if err := checkName("template", ref); err != nil {
		return none, err
	}
	both, err := s.templateAndName(ctx, ref)
	if err != nil {
		return none, err
	}
	if kvs := both[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
		return s.templates.decode(kvs[0])
	}
	kvs := both[1].GetResponseRange().GetKvs()
	if len(kvs) == 0 {
		return none, sandbox.NotFoundf("template %q does not exist", ref)
	}
	name, err := s.names.decode(kvs[0])
	if err != nil {
		return none, err
	}
	r, err := s.templates.get(ctx, string(name.Value.ID))
	if errors.Is(err, sandbox.ErrNotFound) {
		return none, sandbox.NotFoundf("template %q does not exist", ref) // deleted between the two reads
	}
	return r, err
}

// templateAndName reads ref as an id and as a name, in one transaction.
func (s *Store) templateAndName(ctx context.Context, ref string) ([]*etcdserverpb.ResponseOp, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Txn(ctx).Then(clientv3.OpGet(s.templates.key(ref)), clientv3.OpGet(s.names.key(ref))).Commit()
	if err != nil {
		return nil, fmt.Errorf("get template %q: %w", ref, explain(err))
	}
	return resp.Responses, nil
}

// UpdateTemplate changes a template by compare-and-swap: change sees the newest record and may be called again when
// another writer was faster. Names that it adds are taken and names that it removes are freed in the same transaction.
// Errors: ErrNotFound, ErrInvalid, ErrConflict for a name that is taken, and change's own, as it is.
func (s *Store) UpdateTemplate(
	ctx context.Context, id sandbox.TemplateID, change func(*sandbox.Template) error,
) (sandbox.Template, error) {
	for range maxRetries {
		old, err := s.templates.get(ctx, string(id))
		if err != nil {
			return sandbox.Template{}, err
		}
		next := cloneTemplate(old.Value)
		if err := change(&next); err != nil {
			return sandbox.Template{}, err
		}
		next.ID = id
		done, err := s.swapTemplate(ctx, old, next)
		if err != nil || done {
			return next, err
		}
	}
	return sandbox.Template{}, s.templates.changed(string(id))
}

// cloneTemplate copies what change may write to; the inside of a build is replaced, never written.
func cloneTemplate(t sandbox.Template) sandbox.Template {
	t.Names, t.Builds, t.Tags = slices.Clone(t.Names), slices.Clone(t.Builds), maps.Clone(t.Tags)
	return t
}

// swapTemplate replaces old by next once; done is false where old was no longer the newest.
func (s *Store) swapTemplate(ctx context.Context, old Record[sandbox.Template], next sandbox.Template) (bool, error) {
	if err := checkTemplate(next); err != nil {
		return false, err
	}
	added := without(next.Names, old.Value.Names)
	when := []clientv3.Cmp{unchanged(s.templates.key(old.Name), old.Revision)}
	then, err := s.templatePut(next)
	if err != nil {
		return false, err
	}
	more, ops, err := s.takeNames(next.ID, added)
	if err != nil {
		return false, err
	}
	for _, n := range without(old.Value.Names, next.Names) {
		ops = append(ops, clientv3.OpDelete(s.names.key(n)))
	}
	ok, _, err := commit(ctx, s.client, append(when, more...), append(then, ops...))
	if err != nil {
		return false, fmt.Errorf("update template %s: %w", next.ID, err)
	}
	if ok {
		return true, nil
	}
	return false, s.nameTaken(ctx, next.ID, added)
}

// nameTaken returns ErrConflict when one of the names belongs to another template, else nil.
func (s *Store) nameTaken(ctx context.Context, id sandbox.TemplateID, names []string) error {
	for _, n := range names {
		r, err := s.names.get(ctx, n)
		if err == nil && r.Value.ID != id {
			return sandbox.Conflictf("template name %q belongs to template %s: choose another name", n, r.Value.ID)
		}
		if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			return err
		}
	}
	return nil
}

// without returns the members of a that are not in b.
func without(a, b []string) []string {
	var out []string
	for _, v := range a {
		if !slices.Contains(b, v) {
			out = append(out, v)
		}
	}
	return out
}

// DeleteTemplate deletes a template, frees its names and returns what it was, or answers ErrNotFound.
func (s *Store) DeleteTemplate(ctx context.Context, id sandbox.TemplateID) (sandbox.Template, error) {
	for range maxRetries {
		old, err := s.templates.get(ctx, string(id))
		if err != nil {
			return sandbox.Template{}, err
		}
		then := []clientv3.Op{clientv3.OpDelete(s.templates.key(string(id)))}
		for _, n := range old.Value.Names {
			then = append(then, clientv3.OpDelete(s.names.key(n)))
		}
		ok, _, err := commit(ctx, s.client, []clientv3.Cmp{unchanged(s.templates.key(string(id)), old.Revision)}, then)
		if err != nil {
			return sandbox.Template{}, fmt.Errorf("delete template %s: %w", id, err)
		}
		if ok {
			return old.Value, nil
		}
	}
	return sandbox.Template{}, s.templates.changed(string(id))
}

// Templates returns all templates, the oldest first.
func (s *Store) Templates(ctx context.Context) ([]sandbox.Template, error) {
	records, _, err := s.templates.list(ctx)
	if err != nil {
		return nil, err
	}
	return sortedByTime(records, func(t sandbox.Template) time.Time { return t.CreatedAt }), nil
}

// WatchTemplates feeds w until ctx ends.
func (s *Store) WatchTemplates(ctx context.Context, w Watcher[sandbox.Template]) error {
	return s.templates.watch(ctx, w)
}

func isConflict(err error) bool { return errors.Is(err, sandbox.ErrConflict) }
