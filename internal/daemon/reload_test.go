package daemon

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/api/apitest"
	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/scheduler"
)

func TestSchedulerPolicy(t *testing.T) {
	cfg := config.Default()
	got, err := schedulerPolicy(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff((scheduler.Policy{MaxCreating: 1000}).WithDefaults(), got); diff != "" {
		t.Errorf("the settings' defaults are not the scheduler's: %s", diff)
	}
	cfg.SchedulerStrategy, cfg.SchedulerFailureHalfLife = "sticky", time.Minute
	cfg.SchedulerWeights = []string{"load=2", "warm = 0"}
	cfg.SchedulerOvercommit = []string{"memory=0.5"}
	cfg.SchedulerReserved = []string{"cpu=0.5", "memory=1GiB"}
	got, err = schedulerPolicy(cfg)
	if err != nil || got.Strategy != scheduler.Sticky || got.Weights.Load != 2 || got.Weights.Warm != 0 || got.Weights.Affinity != 1 ||
		got.Overcommit.Memory != 0.5 || got.Reserved != (sandbox.Resources{MilliCPU: 500, MemoryBytes: 1 << 30}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestSchedulerPolicyRefusals(t *testing.T) {
	tests := []struct {
		change func(*config.Config)
		want   string
	}{
		{func(c *config.Config) { c.SchedulerStrategy = "fast" }, `strategy "fast": want spread`},
		{func(c *config.Config) { c.SchedulerSample = 1000 }, "sample 1000"},
		{func(c *config.Config) { c.SchedulerWeights = []string{"speed=1"} }, "scheduler-weights"},
		{func(c *config.Config) { c.SchedulerWeights = []string{"load=NaN"} }, "weight load NaN"},
		{func(c *config.Config) { c.SchedulerOvercommit = []string{"cpu=x"} }, "scheduler-overcommit"},
		{func(c *config.Config) { c.SchedulerReserved = []string{"memory=lots"} }, "scheduler-reserved"},
		{func(c *config.Config) { c.SchedulerReserved = []string{"gpu=1"} }, "scheduler-reserved"},
	}
	for _, tt := range tests {
		cfg := config.Default()
		tt.change(cfg)
		if _, err := schedulerPolicy(cfg); !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("error %v, want %q", err, tt.want)
		}
	}
}

// Settings that cannot be, or cannot be read, leave the policy as it was.
func TestReloadSettings(t *testing.T) {
	c := apitest.NewCluster(t, nil)
	var next *config.Config
	var broken error
	d := &daemon{
		log: slog.New(slog.DiscardHandler), server: &serverRole{control: c.Control},
		reload: func() (*config.Config, error) { return next, broken },
	}
	strategy := func() scheduler.Strategy {
		d.reloadSettings(t.Context())
		p, _ := c.Control.SchedulerPolicy()
		return p.Strategy
	}
	next = config.Default()
	next.SchedulerStrategy = "binpack"
	if got := strategy(); got != scheduler.Binpack {
		t.Errorf("reloaded to %s", got)
	}
	next.SchedulerStrategy = "fast"
	if got := strategy(); got != scheduler.Binpack {
		t.Errorf("a policy that cannot be gave %s", got)
	}
	next, broken = nil, errors.New("line 1: unknown setting")
	if got := strategy(); got != scheduler.Binpack {
		t.Errorf("a file that cannot be read gave %s", got)
	}
}
