package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

// tier is one thing that is measured.
type tier struct {
	name, what string
	run        func(b *bench, ctx context.Context) (benchResult, error)
}

// tiers in the order in which they run; each cleans up what it made.
func tiers() []tier {
	return []tier{
		{"warm", "create from the warm pool, and the first command after it", (*bench).warm},
		{"cold", "create while the pool cannot help, and the first command after it", (*bench).cold},
		{"command", "run /bin/true in a sandbox that is up", (*bench).command},
		{"parallel", "create many at once", (*bench).parallel},
		{"sustained", "create and kill without pause", (*bench).sustained},
		{"transfer", "upload and download a file through the proxy", (*bench).transfer},
		{"idle", "memory and processor time of idle sandboxes and of the daemon (on its machine only)", (*bench).idle},
	}
}

// series is the samples of one figure, in its unit.
type series struct {
	Name    string    `json:"name"`
	Unit    string    `json:"unit"`
	Samples []float64 `json:"samples"`
}

// percentile returns the p-th percentile (0 to 100) by the nearest-rank method, or 0 of nothing.
func (s series) percentile(p float64) float64 {
	if len(s.Samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s.Samples))
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// benchResult is what a tier measured.
type benchResult struct {
	Series []series `json:"series"`
	Errors []string `json:"errors,omitempty"`
}

// bench is one run of the benchmark.
type bench struct {
	cn       *conn
	count    int
	width    int
	many     int
	bytes    int64
	template string
	dataDir  string
	progress io.Writer
}

// benchReport is the JSON form of a run.
type benchReport struct {
	Environment environment            `json:"environment"`
	Tiers       map[string]benchResult `json:"tiers"`
}

func (a *app) benchCommand() *cobra.Command {
	b := &bench{}
	var only []string
	var mib int64
	c := &cobra.Command{
		Use: "bench", Short: "Measure this installation through its public API and proxy", Args: exactly(0, "no arguments"),
		Long:    "Measure this installation through its public API and proxy: percentiles per tier, with the environment they were measured in.\nWith -o json every sample is printed.\n\nTiers:\n" + tierHelp(),
		Example: "  cloister bench --tier warm,cold --count 100\n  cloister bench -o json > bench.json",
		RunE: func(c *cobra.Command, _ []string) error {
			chosen, err := chooseTiers(only)
			if err != nil {
				return err
			}
			if b.count < 1 || b.width < 1 || b.many < 1 || mib < 1 {
				return &usageError{errors.New("--count, --parallel, --sandboxes and --mib: want at least 1")}
			}
			if b.cn, err = a.target.connect(); err != nil {
				return err
			}
			b.bytes, b.progress, b.dataDir = mib<<20, a.err, a.target.dataDir
			return a.bench(c.Context(), b, chosen)
		},
	}
	f := c.Flags()
	f.StringSliceVar(&only, "tier", nil, "only these `tiers`")
	f.IntVar(&b.count, "count", 30, "samples `per` sequential tier")
	f.IntVar(&b.width, "parallel", 50, "sandboxes made `at once` by the parallel tier")
	f.IntVar(&b.many, "sandboxes", 100, "sandboxes of the `idle` tier")
	f.Int64Var(&mib, "mib", 100, "`MiB` per file of the transfer tier")
	f.StringVarP(&b.template, "template", "t", "base", "`name` of the template to measure")
	return c
}

func tierHelp() string {
	var b strings.Builder
	for _, t := range tiers() {
		fmt.Fprintf(&b, "  %-10s %s\n", t.name, t.what)
	}
	return b.String()
}

func chooseTiers(names []string) ([]tier, error) {
	if len(names) == 0 {
		return tiers(), nil
	}
	var out []tier
	for _, n := range names {
		i := slices.IndexFunc(tiers(), func(t tier) bool { return t.name == n })
		if i < 0 {
			return nil, &usageError{fmt.Errorf("tier %q: want some of:\n%s", n, tierHelp())}
		}
		out = append(out, tiers()[i])
	}
	return out, nil
}

func (a *app) bench(ctx context.Context, b *bench, chosen []tier) error {
	if err := b.cn.ping(ctx, 5*time.Second); err != nil {
		return err
	}
	report := benchReport{Environment: readEnvironment(), Tiers: map[string]benchResult{}}
	for _, t := range chosen {
		_, _ = fmt.Fprintf(b.progress, "measuring %s: %s\n", t.name, t.what)
		r, err := t.run(b, ctx)
		if err != nil {
			return fmt.Errorf("tier %s: %w", t.name, err)
		}
		report.Tiers[t.name] = r
	}
	return a.print(report, func(w io.Writer) { benchTable(w, report, chosen) })
}

func benchTable(w io.Writer, report benchReport, chosen []tier) {
	row(w, "ENVIRONMENT", report.Environment.String())
	row(w)
	row(w, "TIER", "FIGURE", "N", "P50", "P95", "P99", "UNIT")
	for _, t := range chosen {
		r := report.Tiers[t.name]
		for _, s := range r.Series {
			row(w, t.name, s.Name, strconv.Itoa(len(s.Samples)), figure(s.percentile(50)), figure(s.percentile(95)), figure(s.percentile(99)), s.Unit)
		}
		for _, e := range r.Errors {
			row(w, t.name, "ERROR", e)
		}
	}
}

func figure(v float64) string {
	switch {
	case v == 0 || v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 1:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// createWithin bounds one create.
const createWithin = time.Minute

// create makes a sandbox the way that the SDK does. A memory of 0 leaves the template's size. It goes on when ctx ends, so
// that a sandbox which was made is known and can be ended.
func (b *bench) create(ctx context.Context, memory int64) (client.Sandbox, time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return client.Sandbox{}, 0, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createWithin)
	defer cancel()
	begin := time.Now()
	if memory != 0 {
		s, err := b.cn.api.CreateSandbox(ctx, client.CreateSandbox{
			Template: b.template, TimeoutSeconds: 900, Resources: client.Resources{MemoryBytes: memory},
		})
		return s, time.Since(begin), b.cn.check(err)
	}
	s, err := b.createAsSDK(ctx)
	return s, time.Since(begin), b.cn.check(err)
}

// createAsSDK makes a sandbox by the call of the E2B SDK.
func (b *bench) createAsSDK(ctx context.Context) (client.Sandbox, error) {
	body := fmt.Sprintf(`{"templateID":%q,"timeout":900}`, b.template)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.cn.base+"/v2/sandboxes", strings.NewReader(body))
	if err != nil {
		return client.Sandbox{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	if b.cn.key != "" {
		req.Header.Set("X-Api-Key", b.cn.key)
	}
	resp, err := b.cn.http.Do(req)
	if err != nil {
		return client.Sandbox{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode/100 != 2 {
		return client.Sandbox{}, guestError(resp)
	}
	var out struct {
		SandboxID   string `json:"sandboxID"`
		AccessToken string `json:"envdAccessToken"`
	}
	err = json.NewDecoder(resp.Body).Decode(&out)
	return client.Sandbox{ID: out.SandboxID, AccessToken: out.AccessToken}, err
}

// first runs a command in the sandbox and returns how long that took.
func (b *bench) first(ctx context.Context, s client.Sandbox, args ...string) (time.Duration, error) {
	g, err := b.cn.open(ctx, s, "")
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	err = g.command(ctx, args[0], args[1:]...)
	return time.Since(begin), err
}

func (b *bench) kill(ctx context.Context, s client.Sandbox) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if err := b.cn.api.KillSandbox(ctx, s.ID); err != nil {
		_, _ = fmt.Fprintf(b.progress, "kill %s: %v\n", s.ID, err)
	}
}

// settle waits until the number of warm sandboxes has not changed for a while; with need it must not be 0 either.
func (b *bench) settle(ctx context.Context, need bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last, same := -1, 0
	for {
		nodes, err := b.cn.api.Nodes(ctx)
		if err != nil {
			return b.cn.check(err)
		}
		warm := 0
		for _, n := range nodes {
			warm += n.Warm
		}
		if same++; warm != last {
			last, same = warm, 0
		}
		if same >= 5 && (warm > 0 || (!need && same >= 20)) {
			return nil
		}
		select {
		case <-ctx.Done():
			if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return ctx.Err()
			}
			return errors.New("no warm sandbox after a minute: is the pool switched off (pool-max 0), or is the machine full?")
		case <-tick.C:
		}
	}
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

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

// zeros is an endless body that costs nothing to make.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func (b *bench) transfer(ctx context.Context) (benchResult, error) {
	s, _, err := b.create(ctx, 0)
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, s)
	g, err := b.cn.open(ctx, s, "")
	if err != nil {
		return benchResult{}, err
	}
	up, down := series{Name: "upload", Unit: "MB/s"}, series{Name: "download", Unit: "MB/s"}
	for range max(b.count/6, 3) {
		for _, dir := range []struct {
			s    *series
			move func(context.Context, *guestConn) error
		}{{&up, b.upload}, {&down, b.download}} {
			begin := time.Now()
			if err := dir.move(ctx, g); err != nil {
				return benchResult{}, err
			}
			dir.s.Samples = append(dir.s.Samples, float64(b.bytes)/1e6/time.Since(begin).Seconds())
		}
	}
	return benchResult{Series: []series{up, down}}, nil
}

func (b *bench) upload(ctx context.Context, g *guestConn) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.filesURL("/home/user/bench.bin"), io.LimitReader(zeros{}, b.bytes))
	if err != nil {
		return err
	}
	req.ContentLength = b.bytes
	req.Header.Set("Content-Type", "application/octet-stream")
	return g.discard(req)
}

func (b *bench) download(ctx context.Context, g *guestConn) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.filesURL("/home/user/bench.bin"), http.NoBody)
	if err != nil {
		return err
	}
	req.Header.Set("Accept-Encoding", "identity")
	return g.discard(req)
}

func (g *guestConn) discard(req *http.Request) error {
	resp, err := g.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode/100 != 2 {
		return guestError(resp)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

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
