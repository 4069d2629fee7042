package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloister-dev/cloister/internal/engine"
	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// statsTimeout bounds one question to the engine.
const statsTimeout = 2 * time.Second

// point is a sandbox's use at one moment; small, since there are many.
type point struct {
	unixMilli           int64
	memory, cache, disk int64
	cpuPercent          float32
}

// samples is the last points of one sandbox, in a ring that grows to its full size.
type samples struct {
	points  []point
	oldest  int
	lastAt  time.Time
	lastCPU time.Duration
}

// add turns an engine's reading into a point. The first one averages over the time since the start.
func (s *samples) add(st *engine.Stats, started time.Time, limit sandbox.Resources, most int) {
	since, used := st.Time.Sub(started), st.CPUTime
	if !s.lastAt.IsZero() {
		since, used = st.Time.Sub(s.lastAt), st.CPUTime-s.lastCPU
	}
	percent := 0.0
	if since > 0 && used > 0 {
		percent = min(100*float64(used)/float64(since), float64(limit.MilliCPU)/10)
	}
	s.lastAt, s.lastCPU = st.Time, st.CPUTime
	p := point{st.Time.UnixMilli(), st.MemoryBytes, st.CacheBytes, st.DiskBytes, float32(percent)}
	if len(s.points) < most {
		s.points = append(s.points, p)
		return
	}
	s.points[s.oldest] = p
	s.oldest = (s.oldest + 1) % len(s.points)
}

// between returns the points of a span, oldest first; zero times are open ends.
func (s *samples) between(start, end time.Time) []point {
	var out []point
	for i := range s.points {
		p := s.points[(s.oldest+i)%len(s.points)]
		if t := time.UnixMilli(p.unixMilli); (start.IsZero() || !t.Before(start)) && (end.IsZero() || !t.After(end)) {
			out = append(out, p)
		}
	}
	return out
}

func (in *instance) dropSamples() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.samples = samples{}
}

// sample reads the use of every sandbox, again and again.
func (a *Agent) sample(ctx context.Context) error {
	t := time.NewTicker(a.cfg.SampleInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		for _, in := range a.instances() {
			if r := in.record(); r.State != sandbox.StateRunning || ctx.Err() != nil {
				continue
			}
			if err := a.sampleOne(ctx, in); err != nil && ctx.Err() == nil {
				a.log.DebugContext(ctx, "sandbox not sampled", slog.String("sandbox_id", string(in.id)), slog.Any("err", err))
			}
		}
		a.metrics.sampled.SetToCurrentTime()
	}
}

func (a *Agent) sampleOne(ctx context.Context, in *instance) error {
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	st, err := a.engine.Stats(ctx, in.id)
	if err != nil {
		return fmt.Errorf("read use of sandbox %s: %w", in.id, err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.rec.State == sandbox.StateRunning {
		in.samples.add(&st, in.rec.StartedAt, in.rec.Resources, a.cfg.Samples)
	}
	return nil
}

// Metrics returns what a sandbox has used. When nothing is known yet, it looks now.
func (a *Agent) Metrics(ctx context.Context, req *agentv1.MetricsRequest) (*agentv1.MetricsResponse, error) {
	in, err := a.visible(req.GetId())
	if err != nil {
		return nil, toWireError(err)
	}
	r := in.record()
	if r.State.Ended() {
		return nil, toWireError(sandbox.NotFoundf("sandbox %s is %s: %s", in.id, r.State, ending(&r)))
	}
	in.mu.Lock()
	none := len(in.samples.points) == 0
	in.mu.Unlock()
	if none && r.State == sandbox.StateRunning {
		if err := a.sampleOne(ctx, in); err != nil {
			return nil, toWireError(err)
		}
	}
	in.mu.Lock()
	points := in.samples.between(fromWireTime(req.GetStart()), fromWireTime(req.GetEnd()))
	in.mu.Unlock()
	out := &agentv1.MetricsResponse{Samples: make([]*agentv1.MetricSample, 0, len(points))}
	for _, p := range points {
		out.Samples = append(out.Samples, &agentv1.MetricSample{
			Time:     timestamppb.New(time.UnixMilli(p.unixMilli)),
			CpuCount: (r.Resources.MilliCPU + 999) / 1000, CpuUsedPercent: float64(p.cpuPercent),
			MemoryUsedBytes: p.memory, MemoryTotalBytes: r.Resources.MemoryBytes, MemoryCacheBytes: p.cache,
			DiskUsedBytes: p.disk, DiskTotalBytes: r.Resources.DiskBytes,
		})
	}
	return out, nil
}
