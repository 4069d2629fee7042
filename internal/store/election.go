package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Term is the time for which one candidate leads. Being elected is no mutual exclusion: a leader that was cut off learns late
// that another one leads. So what it does as leader it does under Context, whose writes the store refuses
// once the term is over.
type Term struct {
	office   string
	session  *concurrency.Session
	election *concurrency.Election
}

// termKey is the context's key of the term that writes are made in.
type termKey struct{}

// Campaign waits until the candidate leads in the office, or ctx ends. A leader that dies is followed after ttl, of 1 s or more;
// one that resigns at once. The candidate's name is for people.
func (s *Store) Campaign(ctx context.Context, office, candidate string, ttl time.Duration) (*Term, error) {
	if err := checkName("office", office); err != nil {
		return nil, err
	}
	if ttl < LeastTTL {
		return nil, sandbox.Invalidf("office %s: a lease of %s: want %s or more", office, ttl, LeastTTL)
	}
	session, err := concurrency.NewSession(s.client, concurrency.WithTTL(int(seconds(ttl))))
	if err != nil {
		return nil, fmt.Errorf("campaign for %s: %w", office, explain(err))
	}
	t := &Term{office: office, session: session, election: concurrency.NewElection(session, root+"elections/"+office)}
	if err := t.election.Campaign(ctx, candidate); err != nil {
		return nil, errors.Join(fmt.Errorf("campaign for %s: %w", office, explain(err)), t.close(ctx))
	}
	return t, nil
}

// Leader returns the name of the candidate that leads in the office. Errors: ErrNotFound where nobody does.
func (s *Store) Leader(ctx context.Context, office string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	resp, err := s.client.Get(ctx, root+"elections/"+office+"/", clientv3.WithFirstCreate()...)
	if err != nil {
		return "", fmt.Errorf("leader of %s: %w", office, explain(err))
	}
	if len(resp.Kvs) == 0 {
		return "", sandbox.NotFoundf("nobody leads in the office %s", office)
	}
	return string(resp.Kvs[0].GetValue()), nil
}

// Done is closed when the term ends: its lease ran out, or Resign was called.
func (t *Term) Done() <-chan struct{} { return t.session.Done() }

// Leading reports whether the term lasts, as far as this process knows.
func (t *Term) Leading() bool {
	select {
	case <-t.Done():
		return false
	default:
		return true
	}
}

// Context returns a context that ends with the term, and whose writes are refused with ErrUnavailable after it.
func (t *Term) Context(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithValue(ctx, termKey{}, t))
	stop := context.AfterFunc(t.session.Ctx(), cancel)
	return ctx, func() { stop(); cancel() }
}

// Resign ends the term; the next candidate leads at once.
func (t *Term) Resign(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), opTimeout)
	defer cancel()
	err := t.election.Resign(ctx)
	if err != nil {
		err = fmt.Errorf("resign from %s: %w", t.office, explain(err))
	}
	return errors.Join(err, t.close(ctx))
}

// close ends the session's lease and goroutine.
func (t *Term) close(ctx context.Context) error {
	t.session.Orphan() // no more renewing, so that a lost store does not hold it up
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), opTimeout)
	defer cancel()
	if _, err := t.session.Client().Revoke(ctx, t.session.Lease()); err != nil && t.session.Client().Ctx().Err() == nil {
		return fmt.Errorf("end the lease of %s: %w", t.office, explain(err))
	}
	return nil
}

// guard holds while the term lasts.
func (t *Term) guard() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(t.election.Key()), "=", t.election.Rev())
}

// guarded adds the guard of the context's term, where it has one.
func guarded(ctx context.Context, when []clientv3.Cmp) (*Term, []clientv3.Cmp, []clientv3.Op) {
	t, ok := ctx.Value(termKey{}).(*Term)
	if !ok {
		return nil, when, nil
	}
	return t, append([]clientv3.Cmp{t.guard()}, when...), []clientv3.Op{clientv3.OpGet(t.election.Key())}
}

// over returns ErrUnavailable where a transaction's answer to what guarded returned shows that the term is over.
func (t *Term) over(resp *clientv3.TxnResponse) error {
	if t == nil || resp.Succeeded {
		return nil
	}
	if kvs := resp.Responses[0].GetResponseRange().GetKvs(); len(kvs) == 1 && kvs[0].GetCreateRevision() == t.election.Rev() {
		return nil
	}
	return sandbox.Unavailablef("this server does not lead in the office %s any more", t.office)
}
