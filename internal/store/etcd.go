package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"go.etcd.io/etcd/pkg/v3/featuregate"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// How the one member is tuned. Ticks are short because no network lies between members, and a start waits for an
// election: 20 ms starts in 70 ms and takes 1.2 % of a core when idle, 10 ms in 30 ms and 1.8 %, 100 ms in 250 ms and
// 0.6 %. The log is kept short because its unsnapshotted tail is held in memory and read again at each start.
const (
	tickMillis       = 20
	electionMillis   = 100
	segmentBytes     = 8 << 20
	snapshotEntries  = 5000
	catchUpEntries   = 500
	compactEvery     = time.Minute
	defragAboveMiB   = 100
	maxRequestBytes  = 1 << 20
	slowApply        = time.Second
	defaultQuota     = 4 << 30
	memberName       = "cloister"
	unusedPeerURL    = "http://localhost:2380" // recorded in the member list; nothing listens there
	featureGatesWant = "InitialCorruptCheck=true,CompactHashCheck=true"
)

// startTimeout bounds a start: a member whose log was cut waits for itself for ever.
const startTimeout = 30 * time.Second

// remedy is what helps where etcd's files are damaged.
const remedy = "where its files are damaged, put a copy of the directory back, or begin anew with `cloister down --purge`"

// setSegmentBytes lowers the size of etcd's log segments, a variable of etcd's, once for the process.
//
//nolint:gochecknoglobals // guards a global of etcd's
var setSegmentBytes = sync.OnceFunc(func() { wal.SegmentSizeBytes = segmentBytes })

// memberConfig returns the configuration of a single member that listens nowhere.
func memberConfig(cfg Config) (*embed.Config, error) {
	peer, err := url.Parse(unusedPeerURL)
	if err != nil {
		return nil, fmt.Errorf("parse peer address: %w", err)
	}
	c := embed.NewConfig()
	c.Name = memberName
	c.Dir = cfg.Dir
	c.ListenPeerUrls, c.ListenClientUrls = nil, nil
	c.AdvertisePeerUrls, c.AdvertiseClientUrls = []url.URL{*peer}, nil
	c.InitialCluster = memberName + "=" + unusedPeerURL
	c.EnableGRPCGateway = false
	c.AuthToken = "" // etcd's own users are not in use: the only client is this process
	c.TickMs, c.ElectionMs = tickMillis, electionMillis
	c.SnapshotCount, c.SnapshotCatchUpEntries = snapshotEntries, catchUpEntries
	c.QuotaBackendBytes = cfg.QuotaBytes
	c.MaxRequestBytes = maxRequestBytes
	c.AutoCompactionMode = embed.CompactorModePeriodic
	c.AutoCompactionRetention = compactEvery.String()
	c.BootstrapDefragThresholdMegabytes = defragAboveMiB
	c.WarningApplyDuration, c.WarningUnaryRequestDuration = slowApply, slowApply
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapLogger(cfg.Logger))
	gate, ok := c.ServerFeatureGate.(featuregate.MutableFeatureGate)
	if !ok {
		return nil, fmt.Errorf("etcd feature gate: %w", errors.ErrUnsupported)
	}
	if err := gate.Set(featureGatesWant); err != nil {
		return nil, fmt.Errorf("etcd feature gate: %w", err)
	}
	return c, nil
}

// startMember starts etcd and waits until it serves. On an error nothing of it is left running.
func startMember(ctx context.Context, cfg Config) (*embed.Etcd, error) {
	setSegmentBytes()
	c, err := memberConfig(cfg)
	if err != nil {
		return nil, err
	}
	e, err := startEtcd(c)
	if err != nil {
		return nil, fmt.Errorf("start etcd in %s: %w; %s", cfg.Dir, err, remedy)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case <-e.Server.StopNotify():
		err = sandbox.Unavailablef("etcd in %s stopped while starting; its log lines say why", cfg.Dir)
	case <-ctx.Done():
		err = fmt.Errorf("wait for etcd in %s: %w; %s", cfg.Dir, ctx.Err(), remedy)
	}
	e.Close()
	return nil, err
}

// startEtcd makes an error of the panic with which etcd answers some kinds of damage.
func startEtcd(c *embed.Config) (e *embed.Etcd, err error) {
	defer func() {
		if p := recover(); p != nil {
			e, err = nil, fmt.Errorf("etcd cannot read its files: %v", p)
		}
	}()
	return embed.StartEtcd(c)
}
