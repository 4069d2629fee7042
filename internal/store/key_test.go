package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func errCompacted() error { return rpctypes.ErrCompacted }

func TestKeys(t *testing.T) {
	s := fresh(t)
	ctx := t.Context()
	if _, err := s.CreateKey(ctx, Key{Name: "no hash"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("without a hash: %v, want ErrInvalid", err)
	}
	if _, err := s.CreateKey(ctx, Key{Name: strings.Repeat("x", 129), Hash: "h"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("long name: %v, want ErrInvalid", err)
	}
	admin, first, err := s.CreateFirstKey(ctx, Key{Name: "admin", Hash: "ha", Admin: true})
	if err != nil || !first || admin.ID == "" || admin.CreatedAt.IsZero() {
		t.Fatalf("CreateFirstKey = %+v, %v, %v", admin, first, err)
	}
	if _, again, err := s.CreateFirstKey(ctx, Key{Name: "admin", Hash: "hb", Admin: true}); err != nil || again {
		t.Errorf("second CreateFirstKey made a key: %v", err)
	}
	plain, err := s.CreateKey(ctx, Key{Name: "ci", Hash: "hc"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.CreateKey(ctx, Key{ID: plain.ID, Hash: "hd"}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("taken id: %v, want ErrConflict", err)
	}
	all, err := s.Keys(ctx)
	if err != nil || len(all) != 2 || all[0].ID != admin.ID {
		t.Errorf("Keys = %+v, %v", all, err)
	}
	if err := s.RevokeKey(ctx, admin.ID); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("revoke the last admin key: %v, want ErrConflict", err)
	}
	if err := s.RevokeKey(ctx, "nobody"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("revoke an unknown key: %v, want ErrNotFound", err)
	}
	if err := s.RevokeKey(ctx, plain.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.KeyByHash("hc"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a revoked key works: %v", err)
	}
}

// TestConcurrentRevokesLeaveAnAdmin revokes all admin keys at once, many times: one must always be left.
func TestConcurrentRevokesLeaveAnAdmin(t *testing.T) {
	s := fresh(t)
	ctx := t.Context()
	for round := range 10 {
		var ids []string
		for i := range 3 {
			k, err := s.CreateKey(ctx, Key{Hash: fmt.Sprintf("%d-%d", round, i), Admin: true})
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, k.ID)
		}
		var wg sync.WaitGroup
		for _, id := range ids {
			wg.Go(func() {
				if err := s.RevokeKey(ctx, id); err != nil && !errors.Is(err, sandbox.ErrConflict) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if all, err := s.Keys(ctx); err != nil || len(all) == 0 {
			t.Fatalf("round %d: no key is left (%v)", round, err)
		}
	}
}

// TestRunFollowsOtherMembers writes keys past this process's cache, as another member would.
func TestRunFollowsOtherMembers(t *testing.T) {
	s := fresh(t)
	run(t, s)
	k := Key{ID: "elsewhere", Hash: "he", CreatedAt: time.Unix(1, 0).UTC()}
	if _, err := s.keys.create(t.Context(), k.ID, k); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the key appears", func() bool { _, err := s.KeyByHash("he"); return err == nil })
	if _, err := s.keys.remove(t.Context(), k.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the key is gone", func() bool { _, err := s.KeyByHash("he"); return err != nil })
}

func record(id string, rev int64) Record[Key] {
	return Record[Key]{Name: id, Value: Key{ID: id, Hash: "hash-" + id}, Revision: rev}
}

func TestKeyCacheIgnoresOldNews(t *testing.T) {
	has := func(c *keyCache, id string) bool { _, ok := c.lookup("hash-" + id); return ok }
	c := newKeyCache()
	c.put(record("a", 10))
	c.remove("a", 12)
	c.put(record("a", 10)) // the watch repeats the creation after the local deletion
	if has(c, "a") {
		t.Error("an old put brought a revoked key back")
	}
	c.reset([]Record[Key]{record("a", 10)}, 11) // a list from before the deletion
	if has(c, "a") {
		t.Error("an old list brought a revoked key back")
	}
	c.repeatRemove("a", 12)
	if len(c.gone) != 0 {
		t.Errorf("deletions are still remembered: %v", c.gone)
	}
	c.put(record("b", 20))
	c.reset(nil, 15) // a list from before the creation
	if !has(c, "b") {
		t.Error("an old list dropped a new key")
	}
	c.reset(nil, 25)
	if has(c, "b") || len(c.byHash)+len(c.hashes) != 0 {
		t.Error("a new list kept a key that is gone")
	}
}

// TestSwapProperty lets random writers increase counters through compare-and-swap: no increase may be lost and a
// record's revision must grow with every write.
func TestSwapProperty(t *testing.T) {
	s := fresh(t)
	counters := newCollection[int](s.client, "test-counters", "counter")
	const writers, keys, rounds = 8, 3, 40
	for k := range keys {
		if _, err := counters.create(t.Context(), strconv.Itoa(k), 0); err != nil {
			t.Fatal(err)
		}
	}
	var won, lost [keys]atomic.Int64
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			for range rounds {
				k := rng.IntN(keys)
				switch err := increase(t.Context(), counters, strconv.Itoa(k)); {
				case err == nil:
					won[k].Add(1)
				case isConflict(err):
					lost[k].Add(1)
				default:
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for k := range keys {
		r, err := counters.get(t.Context(), strconv.Itoa(k))
		if err != nil || int64(r.Value) != won[k].Load() {
			t.Errorf("counter %d is %d after %d swaps that succeeded and %d that lost (%v)",
				k, r.Value, won[k].Load(), lost[k].Load(), err)
		}
	}
}

func increase(ctx context.Context, c collection[int], name string) error {
	r, err := c.get(ctx, name)
	if err != nil {
		return err
	}
	rev, err := c.swap(ctx, r, r.Value+1)
	if err == nil && rev <= r.Revision {
		return fmt.Errorf("revision went from %d to %d", r.Revision, rev)
	}
	return err
}

func TestSwapAfterDelete(t *testing.T) {
	s := fresh(t)
	c := newCollection[string](s.client, "test", "thing")
	if _, err := c.create(t.Context(), "x", "1"); err != nil {
		t.Fatal(err)
	}
	r, err := c.get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.remove(t.Context(), "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.swap(t.Context(), r, "2"); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("swap of a deleted record: %v, want ErrConflict", err)
	}
}

func BenchmarkKeyLookup(b *testing.B) {
	s := fresh(b)
	for i := range 1000 {
		s.cache.put(record(strconv.Itoa(i), int64(i+1)))
	}
	for b.Loop() {
		if _, err := s.KeyByHash("hash-500"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPut(b *testing.B) {
	s := fresh(b)
	n := sandbox.Node{ID: "bench0", Name: "bench"}
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			if err := s.PutNode(context.Background(), n); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := s.PutNode(context.Background(), n); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}

func BenchmarkTemplateByName(b *testing.B) {
	s := fresh(b)
	if err := s.CreateTemplate(context.Background(), sandbox.Template{ID: "t1", Names: []string{"base"}}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Template(context.Background(), "base"); err != nil {
			b.Fatal(err)
		}
	}
}
