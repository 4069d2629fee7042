package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) scheduleCommand() *cobra.Command {
	return group(&cobra.Command{Use: "schedule", Short: "See where sandboxes go, and say how that is decided"},
		a.scheduleExplain(), a.scheduleShow(), a.scheduleSet(), a.scheduleReset())
}

// explainFlags are a sandbox that is asked about.
type explainFlags struct {
	template, memory, disk                    string
	cpu                                       float64
	selector, affinity, tolerations, stickyTo string
}

func (f *explainFlags) request() (client.ExplainSchedule, error) {
	e := client.ExplainSchedule{Template: f.template, Metadata: map[string]string{}}
	for key, value := range map[string]string{
		"cloister.dev/node-selector": f.selector, "cloister.dev/node-affinity": f.affinity,
		"cloister.dev/tolerations": f.tolerations, "cloister.dev/sticky-key": f.stickyTo,
	} {
		if value != "" {
			e.Metadata[key] = value
		}
	}
	e.Resources.MilliCPU = int64(f.cpu * 1000)
	var err, diskErr error
	e.Resources.MemoryBytes, err = parseSize("memory", f.memory)
	e.Resources.DiskBytes, diskErr = parseSize("disk", f.disk)
	return e, errors.Join(err, diskErr)
}

func (a *app) scheduleExplain() *cobra.Command {
	var f explainFlags
	c := &cobra.Command{
		Use: "explain", Short: "Say for each node why a sandbox would go there or not, and how many would fit",
		Long: "Judge every node for a sandbox without creating it: the nodes that would be asked first, then the others with the reason.\n" +
			"A create compares a random sample of the nodes that are accepted here.",
		Example: "  cloister schedule explain --template base\n" +
			"  cloister schedule explain -t base --cpu 4 --memory 8GiB --selector 'zone in (eu,us),!spot'",
		Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			req, err := f.request()
			if err != nil {
				return err
			}
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			s, err := cn.api.ExplainSchedule(c.Context(), req)
			if err != nil {
				return cn.check(err)
			}
			return a.printSchedule(s)
		},
	}
	fl := c.Flags()
	fl.StringVarP(&f.template, "template", "t", "", "template `name`; default: base")
	fl.Float64Var(&f.cpu, "cpu", 0, "processors; default: the template's")
	fl.StringVar(&f.memory, "memory", "", "memory, such as 1GiB; default: the template's")
	fl.StringVar(&f.disk, "disk", "", "disk, such as 20GiB; default: the template's")
	fl.StringVar(&f.selector, "selector", "", "`labels` that the node must have, such as 'zone=eu,!spot'")
	fl.StringVar(&f.affinity, "affinity", "", "`labels` to prefer or avoid, such as 'zone=eu*50;spot*-20'")
	fl.StringVar(&f.tolerations, "tolerations", "", "`taints` that the sandbox tolerates, such as 'gpu=only'")
	fl.StringVar(&f.stickyTo, "sticky-key", "", "`key` that the strategy sticky keeps together")
	_ = c.RegisterFlagCompletionFunc("template", a.complete(0, templateNames)) // the flag exists: it was made above
	return c
}

func (a *app) printSchedule(s client.Schedule) error {
	return a.print(s, func(w io.Writer) {
		row(w, "NODE", "WOULD", "SCORE", "FITS", "FREE CPU", "FREE MEMORY", "FREE DISK", "BECAUSE IT")
		for _, n := range s.Nodes {
			would, score := "refuse", "-"
			if n.Accepted {
				would, score = "accept", strconv.FormatFloat(n.Score, 'f', 3, 64)
			}
			row(w, n.Name, would, score, strconv.FormatInt(n.Fits, 10), cpus(n.Free.MilliCPU), size(max(0, n.Free.MemoryBytes)),
				size(max(0, n.Free.DiskBytes)), n.Reason)
		}
		_, _ = fmt.Fprintf(a.err, "%s of %s CPU, %s memory, %s disk, by %s: room for %d.\n", s.Template, cpus(s.Resources.MilliCPU),
			size(s.Resources.MemoryBytes), size(s.Resources.DiskBytes), s.Strategy, s.Fits)
	})
}

func (a *app) scheduleShow() *cobra.Command {
	return &cobra.Command{
		Use: "show", Short: "Show how nodes are chosen, as `schedule set` takes it", Args: exactly(0, "no arguments"),
		Example: "  cloister schedule show > policy.json",
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			s, err := cn.api.Scheduler(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.printPolicy(s)
		},
	}
}

// printPolicy writes the policy as JSON in any case: it has no table form that could be given back.
func (a *app) printPolicy(s client.Scheduler) error {
	if a.output != "json" {
		_, _ = fmt.Fprintf(a.err, "In force by: %s\n", s.Source)
	}
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	if a.output == "json" {
		return enc.Encode(s)
	}
	return enc.Encode(s.Policy)
}

// maxPolicy bounds a policy file, in bytes.
const maxPolicy = 64 << 10

func (a *app) scheduleSet() *cobra.Command {
	return &cobra.Command{
		Use: "set FILE", Short: "Choose nodes as a JSON file says, from now on and after restarts; - reads standard input",
		Long: "Choose nodes as a JSON file says: what `schedule show` prints, of which parts may be left out for their defaults. It goes\n" +
			"before the daemon's settings until `schedule reset`. A file that cannot be leaves everything as it was.",
		Example: "  echo '{\"strategy\":\"binpack\"}' | cloister schedule set -",
		Args:    exactly(1, "one file, or - for standard input"),
		RunE: func(c *cobra.Command, args []string) error {
			p, err := a.readPolicy(args[0])
			if err != nil {
				return err
			}
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			s, err := cn.api.SetScheduler(c.Context(), p)
			if err != nil {
				return cn.check(err)
			}
			return a.printPolicy(s)
		},
	}
}

func (a *app) readPolicy(name string) (client.SchedulerPolicy, error) {
	var p client.SchedulerPolicy
	in := a.in
	if name != "-" {
		f, err := os.Open(name) //nolint:gosec // the user names the file
		if err != nil {
			return p, err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, maxPolicy))
	if err != nil {
		return p, err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&p); err != nil {
		return p, &usageError{fmt.Errorf("policy %s: %w; `cloister schedule show` prints one", name, err)}
	}
	return p, nil
}

func (a *app) scheduleReset() *cobra.Command {
	return &cobra.Command{
		Use: "reset", Short: "Choose nodes as the daemon's settings say again", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			s, err := cn.api.ResetScheduler(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.printPolicy(s)
		},
	}
}
