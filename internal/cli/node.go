package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cloister-dev/cloister/internal/client"
)

func (a *app) nodeCommand() *cobra.Command {
	return a.nodeRun(group(&cobra.Command{Use: "node", Short: "Run this machine's node, look at all nodes, and say what may run there"},
		a.nodeList(), a.nodeShow(), a.nodeLabel(), a.nodeTaint(), a.nodeCordon(), a.nodeUncordon(), a.nodeDrain(), a.nodeRemove()))
}

func (a *app) nodeList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List nodes", Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			all, err := cn.api.Nodes(c.Context())
			if err != nil {
				return cn.check(err)
			}
			return a.print(all, func(w io.Writer) {
				row(w, "ID", "NAME", "STATE", "SANDBOXES", "WARM", "CPU", "MEMORY", "DISK", "ENGINES", "TAINTS", "VERSION", "ADDRESS", "SEEN")
				for _, n := range all {
					row(w, n.ID, n.Name, nodeState(n), strconv.Itoa(n.Sandboxes), strconv.Itoa(n.Warm), share(n, cpuShare),
						share(n, memoryShare), share(n, diskShare), strings.Join(n.Engines, ","), taints(n), n.Version, orDash(n.Address), ago(n.LastSeenAt))
				}
			})
		},
	}
}

// nodeState tells of a cordon also where the node has a worse state.
func nodeState(n client.Node) string {
	switch n.State {
	case "cordoned", "draining", "drained":
		return n.State
	}
	if n.Cordoned {
		return n.State + ",cordoned"
	}
	return n.State
}

func cpuShare(r client.Resources) string    { return cpus(r.MilliCPU) }
func memoryShare(r client.Resources) string { return size(r.MemoryBytes) }
func diskShare(r client.Resources) string   { return size(r.DiskBytes) }

// share writes how much of a node is given away.
func share(n client.Node, part func(client.Resources) string) string {
	return part(n.Allocated) + "/" + part(n.Capacity)
}

func taints(n client.Node) string {
	out := make([]string, 0, len(n.Taints))
	for _, t := range n.Taints {
		out = append(out, taintText(t))
	}
	return orDash(strings.Join(out, ","))
}

func taintText(t client.Taint) string {
	if t.Value == "" {
		return t.Key + ":" + t.Effect
	}
	return t.Key + "=" + t.Value + ":" + t.Effect
}

func (a *app) nodeShow() *cobra.Command {
	return &cobra.Command{
		Use: "show NODE", Short: "Show one node", Example: "  cloister node show node-1\n  cloister node show node-1 -o json",
		Args: exactly(1, "one node, by name or id"), ValidArgsFunction: a.complete(1, nodeNames),
		RunE: func(c *cobra.Command, args []string) error {
			cn, err := a.target.connect()
			if err != nil {
				return err
			}
			n, err := cn.api.Node(c.Context(), args[0])
			if err != nil {
				return cn.check(err)
			}
			return a.printNode(n)
		},
	}
}

func (a *app) printNode(n client.Node) error {
	return a.print(n, func(w io.Writer) {
		row(w, "id", n.ID)
		row(w, "name", n.Name)
		row(w, "state", nodeState(n)+", since "+n.StateAt.Local().Format(time.DateTime))
		if n.CordonReason != "" {
			row(w, "cordoned because", n.CordonReason)
		}
		row(w, "seen", ago(n.LastSeenAt))
		row(w, "sandboxes", fmt.Sprintf("%d, %d being created, %d warm", n.Sandboxes, n.Creating, n.Warm))
		if n.Drain != nil {
			row(w, "drain", drainText(n))
			for _, f := range n.Drain.Failed {
				row(w, "not moved", f.ID+": "+f.Reason)
			}
		}
		row(w, "cpu", share(n, cpuShare)+", "+percent(n.UsedCPU)+" in use")
		row(w, "memory", share(n, memoryShare)+", "+percent(n.UsedMemory)+" in use")
		row(w, "disk", share(n, diskShare)+", "+percent(n.UsedDisk)+" in use")
		row(w, "machine", cpus(n.Machine.MilliCPU)+" cores, "+size(n.Machine.MemoryBytes)+" of memory, "+size(n.Machine.DiskBytes)+" of disk")
		row(w, "address", orDash(n.Address))
		features := wrapped(n.CPUFeatures)
		row(w, "cpu features", orDash(features[0]))
		for _, more := range features[1:] {
			row(w, "", more)
		}
		row(w, "labels", pairs(n.Labels))
		row(w, "taints", taints(n))
		if n.Failures > 0 {
			row(w, "failures lately", strconv.FormatFloat(n.Failures, 'f', 1, 64))
		}
		row(w, "engines", strings.Join(n.Engines, ","))
		row(w, "version", n.Version)
		row(w, "system", n.Architecture+", "+n.Kernel)
		row(w, "registered", n.RegisteredAt.Local().Format(time.DateTime))
	})
}

// wrapped joins words to lines that a terminal has room for; at least one, which may be empty.
func wrapped(words []string) []string {
	const width = 90
	lines := []string{""}
	for _, word := range words {
		if last := &lines[len(lines)-1]; len(*last)+len(word) < width {
			*last = strings.TrimPrefix(*last+" "+word, " ")
		} else {
			lines = append(lines, word)
		}
	}
	return lines
}

func percent(part float64) string { return strconv.FormatFloat(part*100, 'f', 0, 64) + "%" }

// changeNode carries out a change and prints the node.
func (a *app) changeNode(ctx context.Context, node string, u client.UpdateNode) error {
	cn, err := a.target.connect()
	if err != nil {
		return err
	}
	n, err := cn.api.UpdateNode(ctx, node, u)
	if err != nil {
		return cn.check(err)
	}
	return a.printNode(n)
}

func (a *app) nodeLabel() *cobra.Command {
	return &cobra.Command{
		Use: "label NODE KEY=VALUE|KEY- ...", Short: "Set labels of a node, or take them away",
		Long: "Set labels of a node, or take away those that end in `-`. Labels outlive the node's restarts. A create that asks for\n" +
			"labels by the metadata cloister.dev/node-selector only goes to nodes that have them.",
		Example: "  cloister node label node-1 zone=eu disk=nvme\n  cloister node label node-1 disk-",
		Args:    several("a node and labels: NODE KEY=VALUE ... or NODE KEY- ..."), ValidArgsFunction: a.complete(1, nodeNames),
		RunE: func(c *cobra.Command, args []string) error {
			u := client.UpdateNode{Labels: make(map[string]*string)}
			for _, arg := range args[1:] {
				key, value, set := strings.Cut(arg, "=")
				bare, remove := strings.CutSuffix(arg, "-")
				switch {
				case set && key != "":
					u.Labels[key] = &value
				case remove && bare != "":
					u.Labels[bare] = nil
				default:
					return &usageError{fmt.Errorf("label %q: want KEY=VALUE to set it or KEY- to take it away", arg)}
				}
			}
			return a.changeNode(c.Context(), args[0], u)
		},
	}
}

func (a *app) nodeTaint() *cobra.Command {
	return &cobra.Command{
		Use: "taint NODE KEY[=VALUE]:EFFECT|KEY[:EFFECT]- ...", Short: "Keep sandboxes off a node that do not tolerate a taint",
		Long: "Set taints of a node, or take away those that end in `-`. NoSchedule keeps new sandboxes off the node unless their\n" +
			"metadata cloister.dev/tolerations names the taint; PreferNoSchedule only counts against the node.",
		Example: "  cloister node taint node-1 gpu=only:NoSchedule\n  cloister node taint node-1 old:PreferNoSchedule\n  cloister node taint node-1 gpu-",
		Args:    several("a node and taints: NODE KEY=VALUE:NoSchedule ... or NODE KEY- ..."), ValidArgsFunction: a.complete(1, nodeNames),
		RunE: func(c *cobra.Command, args []string) error {
			var u client.UpdateNode
			for _, arg := range args[1:] {
				bare, remove := strings.CutSuffix(arg, "-")
				head, effect, _ := strings.Cut(bare, ":")
				key, value, _ := strings.Cut(head, "=")
				t := client.Taint{Key: key, Value: value, Effect: effect}
				if remove {
					u.RemoveTaints = append(u.RemoveTaints, t)
				} else {
					u.AddTaints = append(u.AddTaints, t)
				}
			}
			return a.changeNode(c.Context(), args[0], u)
		},
	}
}

func (a *app) nodeCordon() *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use: "cordon NODE", Short: "Give a node no new sandboxes; what it has stays, and its paused ones can resume",
		Example: "  cloister node cordon node-1 --reason 'new disk on Friday'",
		Args:    exactly(1, "one node, by name or id"), ValidArgsFunction: a.complete(1, nodeNames),
		RunE: func(c *cobra.Command, args []string) error {
			yes := true
			return a.changeNode(c.Context(), args[0], client.UpdateNode{Cordoned: &yes, Reason: reason})
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "`why`, for those who look at the node")
	return c
}

func (a *app) nodeUncordon() *cobra.Command {
	return &cobra.Command{
		Use: "uncordon NODE", Short: "Give a node new sandboxes again", Example: "  cloister node uncordon node-1",
		Args: exactly(1, "one node, by name or id"), ValidArgsFunction: a.complete(1, nodeNames),
		RunE: func(c *cobra.Command, args []string) error {
			no := false
			return a.changeNode(c.Context(), args[0], client.UpdateNode{Cordoned: &no})
		},
	}
}

// several wants at least two arguments, the first of which is a node.
func several(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < 2 {
			return &usageError{fmt.Errorf("%s: want %s, got %s; see `%s --help`",
				strings.TrimPrefix(c.CommandPath(), "cloister "), what, quoted(args), c.CommandPath())}
		}
		return nil
	}
}

func nodeNames(ctx context.Context, cn *conn) ([]string, error) {
	all, err := cn.api.Nodes(ctx)
	out := make([]string, 0, len(all))
	for _, n := range all {
		out = append(out, n.Name+"\t"+printable(nodeState(n)+" "+n.ID))
	}
	return out, err
}
