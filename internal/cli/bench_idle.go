package cli

import (
	"context"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

const (
	// idleFor is how long the idle tier watches.
	idleFor = 20 * time.Second
	// idleAtOnce is how many of its sandboxes are made at the same time.
	idleAtOnce = 16
)

func (b *bench) idle(ctx context.Context) (benchResult, error) {
	if !b.cn.local {
		return benchResult{Errors: []string{"skipped: only on the daemon's machine, as root"}}, nil
	}
	made, _, failures := b.crowd(ctx, b.many, idleAtOnce)
	defer b.killAll(ctx, made)
	if len(failures) > 0 {
		return benchResult{Errors: failures[:1]}, ctx.Err()
	}
	if err := b.settle(ctx, false); err != nil {
		return benchResult{}, err
	}
	wait := time.NewTimer(10 * time.Second) // the last starts calm down
	defer wait.Stop()
	select {
	case <-ctx.Done():
		return benchResult{}, ctx.Err()
	case <-wait.C:
	}
	return watchIdle(ctx, b.dataDir, made)
}

// watchIdle reads what the sandboxes' processes use over idleFor.
func watchIdle(ctx context.Context, dataDir string, made []client.Sandbox) (benchResult, error) {
	procs, err := sandboxProcesses(dataDir)
	if err != nil {
		return benchResult{}, err
	}
	pss, cpu := series{Name: "memory per sandbox (PSS)", Unit: "MiB"}, series{Name: "processor per sandbox", Unit: "% of a core"}
	before := map[string]time.Duration{}
	for _, s := range made {
		before[s.ID] = procs[s.ID].cpuTime()
		pss.Samples = append(pss.Samples, float64(procs[s.ID].pss())/(1<<20))
	}
	begin := time.Now()
	wait := time.NewTimer(idleFor)
	defer wait.Stop()
	select {
	case <-ctx.Done():
		return benchResult{}, ctx.Err()
	case <-wait.C:
	}
	for _, s := range made {
		cpu.Samples = append(cpu.Samples, 100*float64(procs[s.ID].cpuTime()-before[s.ID])/float64(time.Since(begin)))
	}
	out := []series{pss, cpu}
	if rss := daemonMemory(dataDir); rss > 0 {
		out = append(out, series{Name: "daemon (resident)", Unit: "MiB", Samples: []float64{float64(rss) / (1 << 20)}})
	}
	return benchResult{Series: out}, nil
}
