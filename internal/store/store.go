package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// sizeCheckEvery is how often Run compares the store's size with its limit.
const sizeCheckEvery = time.Minute

// Config is what Open needs.
type Config struct {
	// Dir holds the store; it is made with mode 0700 where it is missing. One process at a time may have it open.
	Dir string
	// Logger receives etcd's warnings and the store's own lines.
	Logger *slog.Logger
	// QuotaBytes limits the size of the database; 0 means 4 GiB. A full store refuses writes with ErrExhausted.
	QuotaBytes int64
}

// Store is the cluster's durable records.
type Store struct {
	dir    string
	log    *slog.Logger
	lock   *os.File
	etcd   *embed.Etcd
	client *clientv3.Client
	quota  int64
	seal   sealer

	keys      collection[Key]
	guards    collection[guard]
	nodes     collection[sandbox.Node]
	templates collection[sandbox.Template]
	names     collection[templateName]
	secrets   collection[sealed]
	keyUse    collection[keyUse]

	cache    *keyCache
	uses     keyUses
	refusals *refusals
}

// Open starts the store in cfg.Dir and returns once it answers. It holds etcd's goroutines until Close.
// Errors: ErrConflict when another process has the directory open.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Dir == "" || cfg.Logger == nil {
		return nil, sandbox.Invalidf("store: a directory and a logger are needed")
	}
	if cfg.QuotaBytes == 0 {
		cfg.QuotaBytes = defaultQuota
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make store directory: %w", err)
	}
	if err := os.Chmod(cfg.Dir, 0o700); err != nil { //nolint:gosec // a directory: 0700 lets its owner alone in
		return nil, fmt.Errorf("close store directory to others: %w", err)
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	if err := beginAnew(cfg.Dir, cfg.Logger); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	seal, err := openSealer(filepath.Join(cfg.Dir, masterKeyName), isNew(cfg.Dir))
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if err := giveSpare(cfg.Dir); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	e, err := startMember(ctx, cfg)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if err := noteBooted(cfg.Dir); err != nil {
		e.Close()
		return nil, errors.Join(err, lock.Close())
	}
	if err := reserve(cfg.Dir); err != nil {
		cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "the cluster store has no room of its own on the disk", slog.Any("err", err))
	}
	s := newStore(cfg, e)
	s.lock, s.seal = lock, seal
	if err := errors.Join(s.loadKeys(ctx), s.loadMembers(ctx)); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// isNew reports whether no etcd member has ever lived in dir.
func isNew(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "member"))
	return errors.Is(err, os.ErrNotExist)
}

func newStore(cfg Config, e *embed.Etcd) *Store {
	client := v3client.New(e.Server)
	return &Store{
		dir: cfg.Dir, log: cfg.Logger, etcd: e, client: client, quota: cfg.QuotaBytes,
		keys:      newCollection[Key](client, "keys", "key"),
		guards:    newCollection[guard](client, "guards", "guard"),
		nodes:     newCollection[sandbox.Node](client, "nodes", "node"),
		templates: newCollection[sandbox.Template](client, "templates", "template"),
		names:     newCollection[templateName](client, "template-names", "template name"),
		secrets:   newCollection[sealed](client, "secrets", "secret"),
		keyUse:    newCollection[keyUse](client, "key-uses", "use of key"),
		cache:     newKeyCache(),
		uses:      keyUses{at: make(map[string]time.Time)},
		refusals:  newRefusals(),
	}
}

// Run keeps keys and refusals in step with other members' changes, writes the uses of keys and watches the store's size, until ctx ends (nil) or
// the store stops by itself (an error).
func (s *Store) Run(ctx context.Context) error {
	g, inner := errgroup.WithContext(ctx)
	g.Go(func() error { return s.keys.watch(inner, s.cache.watcher()) })
	g.Go(func() error { return s.followMembers(inner) })
	g.Go(func() error { return s.watchSize(inner) })
	g.Go(func() error { return s.writeUses(inner) })
	g.Go(func() error {
		select {
		case <-inner.Done():
			return inner.Err()
		case <-s.etcd.Server.StopNotify():
			return sandbox.Unavailablef("etcd stopped by itself; its log lines say why")
		}
	})
	err := g.Wait()
	if ctx.Err() != nil {
		return nil //nolint:nilerr // the end of ctx is how Run is meant to end
	}
	return fmt.Errorf("run store: %w", err)
}

// watchSize warns when the database passes half and four fifths of its limit, and keeps room for the next start.
func (s *Store) watchSize(ctx context.Context) error {
	tick := time.NewTicker(sizeCheckEvery)
	defer tick.Stop()
	warned := int64(0)
	for {
		level := fillLevel(s.etcd.Server.Backend().SizeInUse(), s.quota)
		if level > warned {
			s.log.LogAttrs(ctx, slog.LevelWarn, "cluster store is filling up", slog.Int64("above_percent", level),
				slog.Int64("quota_bytes", s.quota), slog.Int64("size_bytes", s.etcd.Server.Backend().SizeInUse()))
		}
		warned = level
		if err := takeSpare(s.dir); err != nil {
			s.log.LogAttrs(ctx, slog.LevelWarn, "no room on the disk for the next start of the cluster store", slog.Any("err", err))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fillLevel returns the highest warning level, in percent, that size has reached; 0 for none.
func fillLevel(size, quota int64) int64 {
	for _, percent := range []int64{80, 50} {
		if size >= quota/100*percent {
			return percent
		}
	}
	return 0
}

// Close stops the store, waits for etcd's goroutines and gives the directory back. It may be called once.
func (s *Store) Close() error {
	err := s.client.Close()
	if errors.Is(err, context.Canceled) {
		err = nil // how the in-process client reports that it was closed
	}
	s.etcd.Close()
	if err := errors.Join(err, s.lock.Close()); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// Status is the store's own condition.
type Status struct {
	// Revision grows by one with each write.
	Revision int64
	// SizeBytes is what the database file takes, InUseBytes what records take of it.
	SizeBytes  int64
	InUseBytes int64
	QuotaBytes int64
	Members    int
	// Leader is false while the members have not agreed on one: no write succeeds then.
	Leader bool
}

// Status returns the store's condition. It asks nobody and is cheap.
func (s *Store) Status() Status {
	srv := s.etcd.Server
	return Status{
		Revision: srv.KV().Rev(), SizeBytes: srv.Backend().Size(), InUseBytes: srv.Backend().SizeInUse(),
		QuotaBytes: s.quota, Members: len(srv.Cluster().Members()), Leader: srv.Leader() != 0,
	}
}

// Ping reports whether the store answers a consistent read.
func (s *Store) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	if _, err := s.client.Get(ctx, root, clientv3.WithCountOnly()); err != nil {
		return fmt.Errorf("ping store: %w", explain(err))
	}
	return nil
}
