package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
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
		{"pause", "pause an idle sandbox", (*bench).pause},
		{"resume", "resume a paused sandbox, until its agent answers", (*bench).resume},
		{"wake", "first request to a paused sandbox that requests resume, on a machine at rest", (*bench).wake},
		{"snapshot", "snapshot an idle sandbox, which keeps running", (*bench).snapshot},
		{"fork", "make 10 copies of an idle sandbox at once", (*bench).fork},
		{"build", "build a template whose steps are all cached", (*bench).buildCached},
		{"heap", "pause and resume with 200 MiB of memory written since", (*bench).heap},
		{"disk", "pause, resume and fork with 1 GiB written to the disk", (*bench).disk},
		{"idle", "memory and processor time of idle sandboxes and of the daemon (on its machine only)", (*bench).idle},
	}
}

// series is the samples of one figure, in its unit.
type series struct {
	Name string `json:"name"`
	Unit string `json:"unit"`
	// Target is what the median should be at most on two idle cores; 0 where nothing is promised.
	Target  float64   `json:"target,omitempty"`
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
	row(w, "TIER", "FIGURE", "N", "P50", "P95", "P99", "UNIT", "TARGET")
	for _, t := range chosen {
		r := report.Tiers[t.name]
		for _, s := range r.Series {
			row(w, t.name, s.Name, strconv.Itoa(len(s.Samples)), figure(s.percentile(50)), figure(s.percentile(95)), figure(s.percentile(99)), s.Unit, s.target())
		}
		for _, e := range r.Errors {
			row(w, t.name, "ERROR", e)
		}
	}
}

// target is what the median should be at most, and whether it is.
func (s series) target() string {
	switch {
	case s.Target == 0 || len(s.Samples) == 0:
		return "-"
	case s.percentile(50) > s.Target:
		return fmt.Sprintf("missed: %g", s.Target)
	}
	return fmt.Sprintf("met: %g", s.Target)
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
