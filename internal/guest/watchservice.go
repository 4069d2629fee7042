package guest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/gen/envd/filesystem"
)

const (
	// maxPolled bounds how many events wait for a poll.
	maxPolled = 16_384
	// maxPollWatchers bounds how many polled watches exist; beyond, those that nobody polled for pollIdle are removed.
	maxPollWatchers = 64
	pollIdle        = 10 * time.Minute
)

func (s *filesystemService) WatchDir(ctx context.Context, req *filesystem.WatchDirRequest, stream *connect.ServerStream[filesystem.WatchDirResponse]) error {
	w, err := s.newWatcher(ctx, req)
	if err != nil {
		return err
	}
	defer w.stop()
	start := &filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Start{Start: &filesystem.WatchDirResponse_StartEvent{}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	return w.run(ctx, keepalive(rpcHeader(ctx, keepaliveHeader)), func(e *filesystem.FilesystemEvent) error {
		return stream.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Filesystem{Filesystem: e}})
	}, func() error {
		return stream.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Keepalive{Keepalive: &filesystem.WatchDirResponse_KeepAlive{}}})
	})
}

// watchers holds the watches that clients poll.
type watchers struct {
	mu     sync.Mutex
	byID   map[string]*pollWatcher
	closed bool
	wg     sync.WaitGroup
}

// pollWatcher collects events until somebody asks for them. When too many wait, the oldest are kept, the watch ends,
// and polls say so after handing out what there was.
type pollWatcher struct {
	watcher *watcher

	mu     sync.Mutex
	events []*filesystem.FilesystemEvent
	failed error
	polled time.Time
}

func (s *filesystemService) CreateWatcher(ctx context.Context, req *filesystem.CreateWatcherRequest) (*filesystem.CreateWatcherResponse, error) {
	w, err := s.newWatcher(ctx, req)
	if err != nil {
		return nil, err
	}
	id, err := s.watchers.add(w)
	if err != nil {
		w.stop()
		return nil, err
	}
	return &filesystem.CreateWatcherResponse{WatcherId: id}, nil
}

func (s *filesystemService) GetWatcherEvents(_ context.Context, req *filesystem.GetWatcherEventsRequest) (*filesystem.GetWatcherEventsResponse, error) {
	p, err := s.watchers.get(req.GetWatcherId())
	if err != nil {
		return nil, err
	}
	events, err := p.poll()
	if err != nil {
		return nil, err
	}
	return &filesystem.GetWatcherEventsResponse{Events: events}, nil
}

func (s *filesystemService) RemoveWatcher(_ context.Context, req *filesystem.RemoveWatcherRequest) (*filesystem.RemoveWatcherResponse, error) {
	if err := s.watchers.remove(req.GetWatcherId()); err != nil {
		return nil, err
	}
	return &filesystem.RemoveWatcherResponse{}, nil
}

func (t *watchers) add(w *watcher) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return "", connect.NewError(connect.CodeUnavailable, errors.New("the agent is stopping"))
	}
	if len(t.byID) >= maxPollWatchers {
		t.expire(time.Now())
	}
	if len(t.byID) >= maxPollWatchers {
		return "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("there are %d watchers already: remove those no longer needed", len(t.byID)))
	}
	id := "w" + rand.Text()
	p := &pollWatcher{watcher: w, polled: time.Now()}
	t.byID[id] = p
	t.wg.Go(p.collect)
	return id, nil
}

// expire removes what nobody polls. The caller holds mu.
func (t *watchers) expire(now time.Time) {
	for id, p := range t.byID {
		if p.idleSince(now) > pollIdle {
			p.watcher.stop()
			delete(t.byID, id)
		}
	}
}

func (t *watchers) get(id string) (*pollWatcher, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.byID[id]; p != nil {
		return p, nil
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id '%s' not found", id))
}

func (t *watchers) remove(id string) error {
	p, err := t.get(id)
	if err != nil {
		return err
	}
	p.watcher.stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byID, id)
	return nil
}

func (t *watchers) closeAll() {
	t.mu.Lock()
	t.closed = true
	for id, p := range t.byID {
		p.watcher.stop()
		delete(t.byID, id)
	}
	t.mu.Unlock()
	t.wg.Wait()
}

// collect runs until the watch is stopped or fails.
func (p *pollWatcher) collect() {
	err := p.watcher.run(context.Background(), 0, func(e *filesystem.FilesystemEvent) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.events) >= maxPolled {
			return connect.NewError(connect.CodeDataLoss, fmt.Errorf("more than %d events were waiting, and later ones are lost: create a new watcher and poll it more often", maxPolled))
		}
		p.events = append(p.events, e)
		return nil
	}, nil)
	p.watcher.stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failed = err
}

func (p *pollWatcher) poll() ([]*filesystem.FilesystemEvent, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.polled = time.Now()
	events := p.events
	p.events = nil
	if len(events) == 0 && p.failed != nil {
		return nil, p.failed
	}
	return events, nil
}

func (p *pollWatcher) idleSince(now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return now.Sub(p.polled)
}
