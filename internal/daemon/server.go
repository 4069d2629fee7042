package daemon

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/history"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// serverRole is the part that answers the API and decides.
type serverRole struct {
	store   *store.Store
	history *history.History
	control *control.Control
	fleet   *fleet
	leader  *leader
}

func (d *daemon) buildServer(ctx context.Context) error {
	if err := refuseMember(d.cfg.DataDir); err != nil {
		return err
	}
	st, err := store.Open(ctx, store.Config{Dir: d.path("server", "store"), Logger: d.log})
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	d.closers = append(d.closers, st.Close)
	hist, err := history.Open(ctx, history.Config{
		Path: d.path("server", "history.db"), Logger: d.log, MaxAge: d.cfg.EventsKept, MaxEvents: int64(d.cfg.EventsKeptCount),
	})
	if err != nil {
		return fmt.Errorf("open history: %w", err)
	}
	d.closers = append(d.closers, hist.Close)
	if d.cluster, err = d.newCluster(ctx, st); err != nil {
		return err
	}
	policy, err := schedulerPolicy(d.cfg)
	if err != nil {
		return err
	}
	fleet := &fleet{}
	ctl, err := control.New(ctx, control.Config{
		Agents: fleet, Templates: st, Nodes: st, Settings: st, Policies: st,
		Placements: st, Replicas: st, Intents: st, Pins: st, Stored: st, Secrets: st, Keys: keyring{st}, History: events{hist}, Log: d.log,
		Limits: control.Limits{
			MaxTimeout:        d.cfg.MaxTimeout,
			DefaultResources:  d.defaultResources(),
			SuspectAfter:      d.cfg.SuspectAfter(),
			DownAfter:         d.cfg.NodeDownAfter,
			SnapshotReplicas:  d.cfg.SnapshotReplicas,
			Bucket:            d.cfg.S3Bucket != "",
			TemplatePlacement: d.cfg.PlacementCount(),
		},
		Authority: d.cluster.authority, Members: st, Tokens: st, Gate: d.cluster, CertificateLife: d.cfg.CertificateLife, CertificateGrace: orNone(d.cfg.CertificateGrace), Presences: st, Listed: d.cluster.proxies,
		Policy:    policy,
		UploadDir: d.path("server", "uploads"),
		About:     control.About{Version: d.version, APIURL: d.cfg.PublicAPIURL, ProxyURL: d.cfg.PublicProxyURL, Ready: d.ready.Load},
	})
	if err != nil {
		return fmt.Errorf("build server: %w", err)
	}
	d.server = &serverRole{
		store: st, history: hist, control: ctl, fleet: fleet, leader: newLeader(d.cfg, st, ctl, d.log, d.metrics),
	}
	return nil
}

func (d *daemon) defaultResources() sandbox.Resources {
	return sandbox.Resources{
		MilliCPU:    int64(d.cfg.SandboxCPU * 1000),
		MemoryBytes: int64(d.cfg.SandboxMemory),
		DiskBytes:   int64(d.cfg.SandboxDisk),
	}
}

func (s *serverRole) start(ctx context.Context, loops *errgroup.Group) {
	loops.Go(func() error { return s.store.Run(ctx) })
	loops.Go(func() error { return s.history.Run(ctx) })
	loops.Go(func() error { return s.control.Run(ctx) })
	s.leader.start(ctx, loops)
}

// keyring makes and finds API keys in the store.
type keyring struct{ store *store.Store }

// CreateKey makes a key and keeps its hash.
func (k keyring) CreateKey(ctx context.Context, name string) (control.Key, string, error) {
	made, err := auth.NewKey()
	if err != nil {
		return control.Key{}, "", fmt.Errorf("make key: %w", err)
	}
	kept, err := k.store.CreateKey(ctx, store.Key{Name: name, Hash: made.Hash, Hint: made.Hint, Admin: true})
	if err != nil {
		return control.Key{}, "", err
	}
	return keyInfo(kept), made.Secret, nil
}

// Keys lists the keys.
func (k keyring) Keys(ctx context.Context) ([]control.Key, error) {
	kept, err := k.store.Keys(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]control.Key, 0, len(kept))
	for _, one := range kept {
		out = append(out, keyInfo(one))
	}
	return out, nil
}

// RevokeKey makes a key worthless.
func (k keyring) RevokeKey(ctx context.Context, id string) error { return k.store.RevokeKey(ctx, id) }

// Authenticate returns the id of the key that the secret is, or ErrNotFound. It reads memory only.
func (k keyring) Authenticate(_ context.Context, secret string) (string, error) {
	found, err := k.store.KeyByHash(auth.Hash(secret))
	if err != nil {
		return "", err
	}
	k.store.NoteKeyUse(found.ID)
	return found.ID, nil
}

func keyInfo(k store.Key) control.Key {
	return control.Key{ID: k.ID, Name: k.Name, Hint: k.Hint, CreatedAt: k.CreatedAt, LastUsedAt: k.LastUsedAt}
}

// events keeps the control's events in the history.
type events struct{ history *history.History }

// Append stores events.
func (e events) Append(ctx context.Context, all []control.Event) error {
	out := make([]history.Event, 0, len(all))
	for _, one := range all {
		out = append(out, history.Event{
			Time: one.Time, Type: one.Type, NodeID: one.NodeID, Sequence: one.Sequence, SandboxID: one.SandboxID,
			Message: one.Message, Fields: one.Fields,
		})
	}
	return e.history.Append(ctx, out)
}

// Query finds events.
func (e events) Query(ctx context.Context, q control.EventQuery) ([]control.Event, error) {
	found, err := e.history.Query(ctx, history.Query{Sandbox: q.SandboxID, Type: q.Type, Since: q.Since, After: q.After, Limit: q.Limit})
	if err != nil {
		return nil, err
	}
	out := make([]control.Event, 0, len(found))
	for _, one := range found {
		out = append(out, control.Event{
			ID: one.ID, Time: one.Time, Type: one.Type, NodeID: one.NodeID, SandboxID: one.SandboxID, Sequence: one.Sequence,
			Message: one.Message, Fields: one.Fields,
		})
	}
	return out, nil
}

// orNone is a certificate's grace as control takes it, where 0 means its default.
func orNone(grace time.Duration) time.Duration {
	if grace == 0 {
		return -1
	}
	return grace
}
