package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	// root is before every key of ours; the number changes only if the layout of keys does.
	root = "/cloister/1/"
	// schemaVersion is that of every record written by this build. A build reads its own version and older ones.
	schemaVersion = 1
	// pageSize is how many records one read returns: smaller pages make etcd count the rest of a long range each time.
	pageSize = 10_000
	// opTimeout bounds one transaction or page.
	opTimeout = 5 * time.Second
	// maxRetries bounds the attempts of a write that reads first and loses races.
	maxRetries = 32
)

// Record is a stored value with the revision that wrote it.
type Record[T any] struct {
	// Name is the record's key within its kind.
	Name  string
	Value T
	// Revision is etcd's mod revision: give it back to replace exactly what was read.
	Revision int64
}

// envelope is the stored form of every record.
type envelope struct {
	Version int             `json:"v"`
	Data    json.RawMessage `json:"d"`
}

// collection is a kind of record under one prefix.
type collection[T any] struct {
	client *clientv3.Client
	prefix string
	// kind names one record in errors, as in "template".
	kind string
}

func newCollection[T any](client *clientv3.Client, name, kind string) collection[T] {
	return collection[T]{client: client, prefix: root + name + "/", kind: kind}
}

func (c collection[T]) key(name string) string { return c.prefix + name }

func (c collection[T]) encode(value T) (string, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", c.kind, err)
	}
	out, err := json.Marshal(envelope{Version: schemaVersion, Data: data})
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", c.kind, err)
	}
	return string(out), nil
}

func (c collection[T]) decode(kv *mvccpb.KeyValue) (Record[T], error) {
	r := Record[T]{Name: strings.TrimPrefix(string(kv.GetKey()), c.prefix), Revision: kv.GetModRevision()}
	var e envelope
	if err := json.Unmarshal(kv.GetValue(), &e); err != nil {
		return r, fmt.Errorf("decode %s %q: %w", c.kind, r.Name, err)
	}
	if e.Version < 1 || e.Version > schemaVersion {
		return r, sandbox.Unsupportedf("%s %q has schema version %d and this build reads up to %d: run a newer cloister",
			c.kind, r.Name, e.Version, schemaVersion)
	}
	if err := json.Unmarshal(e.Data, &r.Value); err != nil {
		return r, fmt.Errorf("decode %s %q: %w", c.kind, r.Name, err)
	}
	return r, nil
}

// get returns one record, or ErrNotFound.
func (c collection[T]) get(ctx context.Context, name string) (Record[T], error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := c.client.Get(ctx, c.key(name))
	if err != nil {
		return Record[T]{}, fmt.Errorf("get %s %q: %w", c.kind, name, explain(err))
	}
	if len(resp.Kvs) == 0 {
		return Record[T]{}, sandbox.NotFoundf("%s %q does not exist", c.kind, name)
	}
	return c.decode(resp.Kvs[0])
}

// list returns every record as of one revision, in order of name, and that revision.
func (c collection[T]) list(ctx context.Context) ([]Record[T], int64, error) {
	out := []Record[T]{}
	from, end, rev := c.prefix, clientv3.GetPrefixRangeEnd(c.prefix), int64(0)
	for {
		kvs, more, at, err := c.page(ctx, from, end, rev)
		if err != nil {
			return nil, 0, err
		}
		rev = at
		for _, kv := range kvs {
			r, err := c.decode(kv)
			if err != nil {
				return nil, 0, err
			}
			out = append(out, r)
		}
		if !more || len(kvs) == 0 {
			return out, rev, nil
		}
		from = string(kvs[len(kvs)-1].GetKey()) + "\x00"
	}
}

// page reads one page of [from, end) at the revision, or at the newest where rev is 0.
//
//nolint:revive // four results: a struct for one caller would say less
func (c collection[T]) page(ctx context.Context, from, end string, rev int64) ([]*mvccpb.KeyValue, bool, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := c.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(rev))
	if err != nil {
		return nil, false, 0, fmt.Errorf("list %ss: %w", c.kind, explain(err))
	}
	if rev == 0 {
		rev = resp.Header.GetRevision()
	}
	return resp.Kvs, resp.More, rev, nil
}

// put writes a record whatever was there, and returns its revision.
func (c collection[T]) put(ctx context.Context, name string, value T) (int64, error) {
	text, err := c.encode(value)
	if err != nil {
		return 0, err
	}
	ok, rev, err := commit(ctx, c.client, nil, []clientv3.Op{clientv3.OpPut(c.key(name), text)})
	if err != nil || !ok {
		return 0, fmt.Errorf("put %s %q: %w", c.kind, name, err)
	}
	return rev, nil
}

// create writes a record that must not exist yet, else ErrConflict.
func (c collection[T]) create(ctx context.Context, name string, value T) (int64, error) {
	text, err := c.encode(value)
	if err != nil {
		return 0, err
	}
	ok, rev, err := commit(ctx, c.client, []clientv3.Cmp{absent(c.key(name))},
		[]clientv3.Op{clientv3.OpPut(c.key(name), text)})
	switch {
	case err != nil:
		return 0, fmt.Errorf("create %s %q: %w", c.kind, name, err)
	case !ok:
		return 0, sandbox.Conflictf("%s %q exists already", c.kind, name)
	}
	return rev, nil
}

// swap replaces exactly the revision that was read, else ErrConflict.
func (c collection[T]) swap(ctx context.Context, old Record[T], value T) (int64, error) {
	text, err := c.encode(value)
	if err != nil {
		return 0, err
	}
	ok, rev, err := commit(ctx, c.client, []clientv3.Cmp{unchanged(c.key(old.Name), old.Revision)},
		[]clientv3.Op{clientv3.OpPut(c.key(old.Name), text)})
	switch {
	case err != nil:
		return 0, fmt.Errorf("replace %s %q: %w", c.kind, old.Name, err)
	case !ok:
		return 0, c.changed(old.Name)
	}
	return rev, nil
}

// remove deletes a record, or answers ErrNotFound.
func (c collection[T]) remove(ctx context.Context, name string) (int64, error) {
	ok, rev, err := commit(ctx, c.client, []clientv3.Cmp{present(c.key(name))},
		[]clientv3.Op{clientv3.OpDelete(c.key(name))})
	switch {
	case err != nil:
		return 0, fmt.Errorf("delete %s %q: %w", c.kind, name, err)
	case !ok:
		return 0, sandbox.NotFoundf("%s %q does not exist", c.kind, name)
	}
	return rev, nil
}

func (c collection[T]) changed(name string) error {
	return sandbox.Conflictf("%s %q was changed or deleted by someone else meanwhile: read it again and retry", c.kind, name)
}

func absent(key string) clientv3.Cmp { return clientv3.Compare(clientv3.CreateRevision(key), "=", 0) }

func present(key string) clientv3.Cmp { return clientv3.Compare(clientv3.CreateRevision(key), ">", 0) }

func unchanged(key string, rev int64) clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(key), "=", rev)
}

// commit runs one transaction and reports whether its conditions held, with the revision that it made. Under the context of a
// Term it is ErrUnavailable once that is over.
func commit(ctx context.Context, client *clientv3.Client, when []clientv3.Cmp, then []clientv3.Op) (bool, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	term, when, otherwise := guarded(ctx, when)
	resp, err := client.Txn(ctx).If(when...).Then(then...).Else(otherwise...).Commit()
	if err != nil {
		return false, 0, explain(err)
	}
	if err := term.over(resp); err != nil {
		return false, 0, err
	}
	return resp.Succeeded, resp.Header.GetRevision(), nil
}

// explain gives etcd's errors a kind of ours.
func explain(err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%w: the cluster store has reached its size limit", sandbox.ErrExhausted)
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return fmt.Errorf("%w: the record is larger than %d bytes", sandbox.ErrInvalid, maxRequestBytes)
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.Unavailable,
		errors.Is(err, rpctypes.ErrCorrupt), unavailable(err):
		return fmt.Errorf("%w: the cluster store does not answer: %w", sandbox.ErrUnavailable, err)
	}
	return err
}

// unavailable reports whether err is one of the client's own errors with the code Unavailable or DataLoss.
func unavailable(err error) bool {
	var e rpctypes.EtcdError
	return errors.As(err, &e) && (e.Code() == codes.Unavailable || e.Code() == codes.DataLoss)
}
