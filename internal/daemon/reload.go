package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/sandbox"
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
	if err := numbers("scheduler-weights", cfg.SchedulerWeights, map[string]*float64{
		"load": &w.Load, "warm": &w.Warm, "creating": &w.Creating, "sandboxes": &w.Sandboxes, "used_cpu": &w.UsedCPU,
		"used_memory": &w.UsedMemory, "image": &w.Image, "affinity": &w.Affinity,
	}); err != nil {
		return p, err
	}
	if err := numbers("scheduler-overcommit", cfg.SchedulerOvercommit, map[string]*float64{"cpu": &o.CPU, "memory": &o.Memory, "disk": &o.Disk}); err != nil {
		return p, err
	}
	var err error
	if p.Reserved, err = reserved(cfg.SchedulerReserved); err != nil {
		return p, err
	}
	if err := p.Check(); err != nil {
		return p, fmt.Errorf("settings of the scheduler: %w", err)
	}
	return p, nil
}

// numbers reads NAME=NUMBER settings into the places of their names.
func numbers(setting string, pairs []string, at map[string]*float64) error {
	for _, pair := range pairs {
		name, text, _ := strings.Cut(pair, "=")
		place, known := at[strings.TrimSpace(name)]
		value, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
		if !known || err != nil {
			return sandbox.Invalidf("%s: %.80q: want NAME=NUMBER, as docs/reference/config.md lists the names", setting, pair)
		}
		*place = value
	}
	return nil
}

func reserved(pairs []string) (sandbox.Resources, error) {
	var out sandbox.Resources
	for _, pair := range pairs {
		name, text, _ := strings.Cut(pair, "=")
		size, err := config.ParseSize(text)
		switch strings.TrimSpace(name) {
		case "memory":
			out.MemoryBytes = int64(size)
		case "disk":
			out.DiskBytes = int64(size)
		case "cpu":
			var cores float64
			cores, err = strconv.ParseFloat(strings.TrimSpace(text), 64)
			out.MilliCPU = int64(cores * 1000)
		default:
			err = strconv.ErrSyntax
		}
		if err != nil {
			return out, sandbox.Invalidf("scheduler-reserved: %.80q: want cpu=NUMBER, memory=SIZE or disk=SIZE, as in memory=4GiB", pair)
		}
	}
	return out, nil
}
