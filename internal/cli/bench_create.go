package cli

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

// one creates, runs a command, and kills; it appends to the two series.
func (b *bench) one(ctx context.Context, memory int64, create, both *series) error {
	s, took, err := b.create(ctx, memory)
	if err != nil {
		return err
	}
	defer b.kill(ctx, s)
	if memory != 0 { // the answer to a create holds no token
		if s, err = b.cn.api.GetSandbox(ctx, s.ID); err != nil {
			return b.cn.check(err)
		}
	}
	ran, err := b.first(ctx, s, "/bin/true")
	if err != nil {
		return err
	}
	create.Samples = append(create.Samples, ms(took))
	both.Samples = append(both.Samples, ms(took+ran))
	return nil
}

func (b *bench) warm(ctx context.Context) (benchResult, error) {
	create, both := series{Name: "create", Unit: "ms"}, series{Name: "create+command", Unit: "ms"}
	for range b.count {
		if err := b.settle(ctx, true); err != nil {
			return benchResult{}, err
		}
		if err := b.one(ctx, 0, &create, &both); err != nil {
			return benchResult{}, err
		}
	}
	return benchResult{Series: []series{create, both}}, nil
}

// oddMemory is the first of the sizes that no template has; each is used once, so that no warm sandbox fits.
const oddMemory = 420 << 20

func (b *bench) cold(ctx context.Context) (benchResult, error) {
	create, both := series{Name: "create", Unit: "ms"}, series{Name: "create+command", Unit: "ms"}
	if err := b.settle(ctx, false); err != nil {
		return benchResult{}, err
	}
	for i := range b.count {
		if err := b.one(ctx, oddMemory+int64(i)<<16, &create, &both); err != nil {
			return benchResult{}, err
		}
	}
	return benchResult{Series: []series{create, both}}, nil
}

func (b *bench) command(ctx context.Context) (benchResult, error) {
	s, _, err := b.create(ctx, 0)
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, s)
	out := series{Name: "command", Unit: "ms"}
	for range b.count + 1 {
		took, err := b.first(ctx, s, "/bin/true")
		if err != nil {
			return benchResult{}, err
		}
		out.Samples = append(out.Samples, ms(took))
	}
	out.Samples = out.Samples[1:] // the first one warms the connection
	return benchResult{Series: []series{out}}, nil
}

// crowd makes n sandboxes, so many at once; those that were made are returned also beside an error.
func (b *bench) crowd(ctx context.Context, n, atOnce int) (made []client.Sandbox, took series, failures []string) {
	took = series{Name: "create", Unit: "ms"}
	var mu sync.Mutex
	var wg sync.WaitGroup
	turn := make(chan struct{}, atOnce)
	for range n {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			s, d, err := b.create(ctx, 0)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failures = append(failures, err.Error())
				return
			}
			made = append(made, s)
			took.Samples = append(took.Samples, ms(d))
		})
	}
	wg.Wait()
	return made, took, failures
}

func (b *bench) killAll(ctx context.Context, all []client.Sandbox) {
	var wg sync.WaitGroup
	for _, s := range all {
		wg.Go(func() { b.kill(ctx, s) })
	}
	wg.Wait()
}

func (b *bench) parallel(ctx context.Context) (benchResult, error) {
	if err := b.settle(ctx, false); err != nil {
		return benchResult{}, err
	}
	begin := time.Now()
	made, took, failures := b.crowd(ctx, b.width, b.width)
	all := time.Since(begin)
	b.killAll(ctx, made)
	slices.SortFunc(failures, cmp.Compare)
	return benchResult{
		Series: []series{took, {Name: "all of them", Unit: "ms", Samples: []float64{ms(all)}}},
		Errors: slices.Compact(failures),
	}, ctx.Err()
}

// sustainFor is how long the sustained tier creates and kills.
const sustainFor = 20 * time.Second

func (b *bench) sustained(ctx context.Context) (benchResult, error) {
	took := series{Name: "create", Unit: "ms"}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var failures []string
	begin := time.Now()
	for range 8 {
		wg.Go(func() {
			for time.Since(begin) < sustainFor && ctx.Err() == nil {
				s, d, err := b.create(ctx, 0)
				mu.Lock()
				if err != nil {
					failures = append(failures, err.Error())
					mu.Unlock()
					return
				}
				took.Samples = append(took.Samples, ms(d))
				mu.Unlock()
				b.kill(ctx, s)
			}
		})
	}
	wg.Wait()
	rate := float64(len(took.Samples)) / time.Since(begin).Seconds()
	slices.SortFunc(failures, cmp.Compare)
	return benchResult{
		Series: []series{
			took,
			{Name: "sandboxes", Unit: "/s", Samples: []float64{rate}},
			{Name: "sandboxes per core", Unit: "/s", Samples: []float64{rate / float64(readEnvironment().Cores)}},
		},
		Errors: slices.Compact(failures),
	}, ctx.Err()
}
