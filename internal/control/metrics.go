package control

import (
	"context"
	"errors"
	"fmt"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Sample is what a sandbox used at one moment.
type Sample struct {
	Time     time.Time
	CPUCount int64
	// CPUUsedPercent is of one core: 200 is two cores busy.
	CPUUsedPercent   float64
	MemoryUsedBytes  int64
	MemoryTotalBytes int64
	MemoryCacheBytes int64
	DiskUsedBytes    int64
	DiskTotalBytes   int64
}

// Metrics returns a sandbox's samples, the oldest first, from start to end; zero times do not bound. Errors: ErrNotFound.
func (c *Control) Metrics(ctx context.Context, id sandbox.ID, start, end time.Time) ([]Sample, error) {
	if !start.IsZero() && !end.IsZero() && end.Before(start) {
		return nil, sandbox.Invalidf("end %s is before start %s", end.UTC().Format(time.RFC3339), start.UTC().Format(time.RFC3339))
	}
	box, err := c.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	agent, err := c.agent(box.NodeID)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.limits.CallDeadline)
	defer cancel()
	resp, err := agent.Metrics(ctx, &agentv1.MetricsRequest{Id: string(id), Start: timeToWire(start), End: timeToWire(end)})
	err = fromNode(box.NodeID, err)
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		return nil, unknown(id)
	case errors.Is(err, sandbox.ErrConflict): // a paused sandbox uses nothing
		return []Sample{}, nil
	case err != nil:
		return nil, fmt.Errorf("get the metrics of sandbox %s: %w", id, err)
	}
	out := make([]Sample, 0, len(resp.GetSamples()))
	for _, s := range resp.GetSamples() {
		out = append(out, Sample{
			Time: timeFromWire(s.GetTime()), CPUCount: s.GetCpuCount(), CPUUsedPercent: s.GetCpuUsedPercent(),
			MemoryUsedBytes: s.GetMemoryUsedBytes(), MemoryTotalBytes: s.GetMemoryTotalBytes(),
			MemoryCacheBytes: s.GetMemoryCacheBytes(), DiskUsedBytes: s.GetDiskUsedBytes(), DiskTotalBytes: s.GetDiskTotalBytes(),
		})
	}
	return out, nil
}
