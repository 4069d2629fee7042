package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// retryDelay is the pause before a broken watch starts again.
const retryDelay = 200 * time.Millisecond

// Watcher receives a kind of record and its changes, in order of revision and from one goroutine.
type Watcher[T any] struct {
	// Reset receives every record, first and whenever changes may have been missed: what it lacks is gone.
	Reset func(records []Record[T], revision int64)
	// Put receives a record that is new or changed.
	Put func(record Record[T])
	// Delete receives the name of a record that is gone.
	Delete func(name string, revision int64)
}

// watch feeds w until ctx ends, and returns ctx's error, or ErrUnavailable once the store is closed.
func (c collection[T]) watch(ctx context.Context, w Watcher[T]) error {
	for {
		records, rev, err := c.list(ctx)
		if err == nil {
			w.Reset(records, rev)
			err = c.follow(ctx, rev, w)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case c.client.Ctx().Err() != nil:
			return sandbox.Unavailablef("watch %ss: the store is closed", c.kind)
		case errors.Is(err, rpctypes.ErrCompacted):
			continue // the changes since rev are no longer kept: list again
		}
		select {
		case <-time.After(retryDelay):
		case <-ctx.Done():
		case <-c.client.Ctx().Done():
		}
	}
}

// follow feeds the changes after rev to w until the watch ends, and says why it did.
func (c collection[T]) follow(ctx context.Context, rev int64, w Watcher[T]) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for resp := range c.client.Watch(ctx, c.prefix, clientv3.WithPrefix(), clientv3.WithRev(rev+1)) {
		if err := resp.Err(); err != nil {
			return fmt.Errorf("watch %ss: %w", c.kind, err)
		}
		for _, ev := range resp.Events {
			if err := c.deliver(ev, w); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

func (c collection[T]) deliver(ev *clientv3.Event, w Watcher[T]) error {
	if ev.Type == mvccpb.Event_DELETE {
		w.Delete(string(ev.Kv.GetKey()[len(c.prefix):]), ev.Kv.GetModRevision())
		return nil
	}
	r, err := c.decode(ev.Kv)
	if err != nil {
		return err
	}
	w.Put(r)
	return nil
}
