package cli

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

// cachedTarget is what a build of cached steps should take at most, in ms.
const cachedTarget = 300

// buildCached builds the same small template again and again; each of its steps has run once, in the first build.
func (b *bench) buildCached(ctx context.Context) (benchResult, error) {
	mark := rand.Text()
	req := client.CreateTemplate{Name: "bench-" + strings.ToLower(mark), FromTemplate: b.template, Steps: []client.BuildStep{
		{Type: "ENV", Args: []string{"BENCH", mark}},
		{Type: "RUN", Args: []string{"echo $BENCH > /tmp/bench", ""}},
		{Type: "WORKDIR", Args: []string{"/srv"}},
		{Type: "RUN", Args: []string{"head -c 1000000 /dev/zero > /tmp/bench.bin", ""}},
		{Type: "RUN", Args: []string{"true", ""}},
	}}
	first, cached := series{Name: "first build", Unit: "ms"}, series{Name: "cached build", Unit: "ms", Target: cachedTarget}
	defer b.remove(ctx, "template "+req.Name, func(ctx context.Context) error { return b.cn.api.DeleteTemplate(ctx, req.Name) })
	for i := range b.rounds() + 1 {
		took, err := b.build(ctx, req)
		if err != nil {
			return benchResult{}, err
		}
		if i == 0 {
			first.Samples = append(first.Samples, ms(took))
		} else {
			cached.Samples = append(cached.Samples, ms(took))
		}
	}
	return benchResult{Series: []series{first, cached}}, nil
}

// build makes a template and returns how long that took, until a client sees that it is ready.
func (b *bench) build(ctx context.Context, req client.CreateTemplate) (time.Duration, error) {
	begin := time.Now()
	started, _, err := whole(ctx, func(ctx context.Context) (client.StartedBuild, error) { return b.cn.api.CreateTemplate(ctx, req) })
	if err != nil {
		return 0, b.cn.check(err)
	}
	for bd, err := range b.cn.api.FollowBuild(ctx, started.BuildID) {
		switch {
		case err != nil:
			b.remove(ctx, "build "+started.BuildID, func(ctx context.Context) error { return b.cn.api.CancelBuild(ctx, started.BuildID) })
			return 0, b.cn.check(err)
		case bd.State == client.BuildReady:
			return time.Since(begin), nil
		case bd.State == client.BuildFailed:
			return 0, fmt.Errorf("build %s: %s", bd.ID, bd.Error)
		}
	}
	return 0, fmt.Errorf("build %s: its log ended before it did", started.BuildID)
}
