package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

// followReloads reads the settings again at each SIGHUP, until ctx ends. What can change without a restart, which is how
// nodes are chosen, changes; settings that cannot be leave everything as it was.
func (d *daemon) followReloads(ctx context.Context) {
	if d.reload == nil {
		return
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, unix.SIGHUP)
	defer signal.Stop(asked)
	for {
		select {
		case <-ctx.Done():
			return
		case <-asked:
			d.reloadSettings(ctx)
		}
	}
}

func (d *daemon) reloadSettings(ctx context.Context) {
	cfg, err := d.reload()
	var policy scheduler.Policy
	if err == nil {
		policy, err = schedulerPolicy(cfg)
	}
	inForce := false
	if err == nil {
		inForce, err = d.server.control.ReloadSchedulerPolicy(ctx, policy)
	}
	if err != nil {
		d.log.LogAttrs(ctx, slog.LevelError, "settings not reloaded; those from before stay in force", slog.Any("err", err))
		return
	}
	d.log.LogAttrs(ctx, slog.LevelInfo, "settings of the scheduler reloaded", slog.Bool("in_force", inForce),
		slog.String("strategy", string(policy.Strategy)))
}

// schedulerPolicy returns how nodes are chosen. Errors: ErrInvalid, which names the setting.
func schedulerPolicy(cfg *config.Config) (scheduler.Policy, error) {
	p := scheduler.Policy{
		Strategy: scheduler.Strategy(cfg.SchedulerStrategy), Sample: cfg.SchedulerSample,
		PrioritySelectNum: cfg.SchedulerPrioritySelect, LeastSelectName: scheduler.Selection(cfg.SchedulerLeastSelect),
		MaxCreating: cfg.SchedulerMaxCreating, MaxFailures: cfg.SchedulerMaxFailures, FailureHalfLife: cfg.SchedulerFailureHalfLife,
		Overcommit: scheduler.Overcommit{CPU: 1, Memory: 1, Disk: 1}, Weights: scheduler.DefaultWeights(),
	}
	w, o := &p.Weights, &p.Overcommit
	if err := config.ParseNumbers("scheduler-weights", cfg.SchedulerWeights, map[string]*float64{
		"load": &w.Load, "warm": &w.Warm, "creating": &w.Creating, "sandboxes": &w.Sandboxes, "used_cpu": &w.UsedCPU,
		"used_memory": &w.UsedMemory, "image": &w.Image, "affinity": &w.Affinity,
	}); err != nil {
		return p, err
	}
	if err := config.ParseNumbers("scheduler-overcommit", cfg.SchedulerOvercommit, map[string]*float64{"cpu": &o.CPU, "memory": &o.Memory, "disk": &o.Disk}); err != nil {
		return p, err
	}
	var err error
	if p.Reserved, err = config.ParseAmounts("scheduler-reserved", cfg.SchedulerReserved); err != nil {
		return p, err
	}
	if err := p.Check(); err != nil {
		return p, fmt.Errorf("settings of the scheduler: %w", err)
	}
	return p, nil
}
