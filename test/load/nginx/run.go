package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// way is one way to the backend.
type way struct {
	name, addr string
	pid        int // of who serves it
}

// kind is what is measured of each way.
type kind struct {
	name, path  string
	connections int
}

// sample is one measurement.
type sample struct {
	rate     float64 // requests per second
	p50, p99 time.Duration
	cpu      time.Duration // of the processor, per request
}

// run starts all that is measured, measures and prints.
func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "cloister-load")
	if err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // nginx's worker is another user
		return fmt.Errorf("open the directory: %w", err)
	}
	ports, err := freePorts(ctx, 4)
	if err != nil {
		return err
	}
	backend := ports[0]
	ways := []way{{name: "direct", addr: backend}, {name: "nginx", addr: ports[1]}, {name: "fast", addr: ports[2]}, {name: "standard", addr: ports[3]}}
	var group processes
	defer group.stop()
	if err := startAll(ctx, &group, o, dir, ways); err != nil {
		return err
	}
	kinds := []kind{{"1KiB", "/small", o.connections}, {"100KiB", "/large", o.connections}, {"1KiB-one", "/small", 1}}
	got := make(map[string][]sample)
	for range o.rounds {
		for _, k := range kinds {
			for _, w := range ways {
				s, err := measure(ctx, o, w, k)
				if err != nil {
					return err
				}
				key := k.name + "/" + w.name
				got[key] = append(got[key], s)
				_, _ = fmt.Fprintf(os.Stdout, "BenchmarkProxy/body=%s/via=%s 1 %.0f req/s %d p50-ns %d p99-ns %d cpu-ns\n", k.name, w.name, s.rate, s.p50.Nanoseconds(), s.p99.Nanoseconds(), s.cpu.Nanoseconds())
			}
		}
	}
	report(kinds, ways, got)
	return nil
}

// freePorts returns addresses on loopback that nobody listens on.
func freePorts(ctx context.Context, n int) ([]string, error) {
	var out []string
	for range n {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find a port: %w", err)
		}
		defer func() { _ = l.Close() }()
		out = append(out, l.Addr().String())
	}
	return out, nil
}

func startAll(ctx context.Context, group *processes, o options, dir string, ways []way) error {
	if err := os.WriteFile(filepath.Join(dir, "large"), make([]byte, 100<<10), 0o644); err != nil { //nolint:gosec // for nginx's worker
		return fmt.Errorf("write the large body: %w", err)
	}
	const common = "daemon off; worker_processes 1; pid %s/%s.pid; error_log %s/%s.log; events { worker_connections 4096; }\n" +
		"http { access_log off; keepalive_requests 1000000000; sendfile on; tcp_nopush on; tcp_nodelay on; open_file_cache max=10; %s }\n"
	backend := fmt.Sprintf("server { listen %s backlog=4096; location /small { return 200 %q; } location /large { root %s; } }", ways[0].addr, strings.Repeat("x", 1024), dir)
	reverse := fmt.Sprintf("upstream b { server %s; keepalive %d; keepalive_requests 1000000000; } server { listen %s backlog=4096; location / { proxy_pass http://b; proxy_http_version 1.1; "+
		"proxy_set_header Connection \"\"; proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme; "+
		"proxy_set_header X-Forwarded-Host $http_host; } }", ways[0].addr, o.connections, ways[1].addr)
	for name, server := range map[string]string{"backend": backend, "reverse": reverse} {
		text := fmt.Sprintf(common, dir, name, dir, name, server)
		if err := os.WriteFile(filepath.Join(dir, name+".conf"), []byte(text), 0o600); err != nil {
			return fmt.Errorf("write nginx's settings: %w", err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	last := strconv.Itoa(runtime.NumCPU() - 1)
	commands := [][]string{
		{"taskset", "-c", "0", "nginx", "-p", dir, "-c", filepath.Join(dir, "backend.conf")},
		{"taskset", "-c", last, "nginx", "-p", dir, "-c", filepath.Join(dir, "reverse.conf")},
		{"taskset", "-c", last, self, "-serve", "fast", "-listen", ways[2].addr, "-backend", ways[0].addr, "-profile", o.profile},
		{"taskset", "-c", last, self, "-serve", "standard", "-listen", ways[3].addr, "-backend", ways[0].addr},
	}
	for i, c := range commands {
		pid, err := group.start(ctx, c)
		if err != nil {
			return err
		}
		ways[i].pid = pid
	}
	for _, w := range ways {
		if err := answers(ctx, w.addr); err != nil {
			return err
		}
	}
	return nil
}

// processes are what has been started here.
type processes []*exec.Cmd

func (p *processes) start(ctx context.Context, args []string) (int, error) {
	c := exec.CommandContext(context.WithoutCancel(ctx), args[0], args[1:]...) //nolint:gosec // our own arguments
	c.Env = append(c.Environ(), "GOMAXPROCS=1")
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", args[3], err)
	}
	*p = append(*p, c)
	return c.Process.Pid, nil
}

func (p *processes) stop() {
	for _, c := range *p {
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait() // a signal is no success, and was ours
	}
}

// answers waits until somebody listens.
func answers(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("nobody listens on %s: %w", addr, err)
		case <-tick.C:
		}
	}
}

// measure has wrk ask one way.
func measure(ctx context.Context, o options, w way, k kind) (sample, error) {
	c := exec.CommandContext(ctx, "taskset", "-c", "0", "wrk", "-t1", "-c"+strconv.Itoa(k.connections), "-d"+strconv.Itoa(int(o.each.Seconds())), "--latency", //nolint:gosec // our own arguments
		"-H", "E2b-Sandbox-Id: "+string(guestID), "-H", "E2b-Sandbox-Port: 8000", "http://"+w.addr+k.path)
	before, err := processorTime(w.pid)
	if err != nil {
		return sample{}, err
	}
	out, err := c.Output()
	if err != nil {
		return sample{}, fmt.Errorf("run wrk: %w", err)
	}
	after, err := processorTime(w.pid)
	if err != nil {
		return sample{}, err
	}
	return parse(string(out), after-before)
}

// processorTime is what a process and its children have taken of the processor.
func processorTime(pid int) (time.Duration, error) {
	const tick = 10 * time.Millisecond // of USER_HZ
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(proc, "stat")) //nolint:gosec // of a number
	if err != nil {
		return 0, fmt.Errorf("read processor time: %w", err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	user, err := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	sum := time.Duration(user+system) * tick
	children, err3 := os.ReadFile(filepath.Join(proc, "task", strconv.Itoa(pid), "children")) //nolint:gosec // likewise
	for child := range strings.FieldsSeq(string(children)) {
		id, err := strconv.Atoi(child)
		if err != nil {
			return 0, fmt.Errorf("read children: %w", err)
		}
		more, err := processorTime(id)
		if err != nil {
			return 0, err
		}
		sum += more
	}
	return sum, errors.Join(err, err2, err3)
}

var (
	rateLine = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	p50Line  = regexp.MustCompile(`50%\s+([0-9.]+[a-z]+)`)
	allLine  = regexp.MustCompile(`(\d+) requests in`)
	p99Line  = regexp.MustCompile(`99%\s+([0-9.]+[a-z]+)`)
)

// parse reads what wrk prints. Any answer but 200 is an error.
func parse(out string, cpu time.Duration) (sample, error) {
	if strings.Contains(out, "Non-2xx") || strings.Contains(out, "Socket errors") {
		return sample{}, fmt.Errorf("requests failed:\n%s", out)
	}
	rate, p50, p99 := rateLine.FindStringSubmatch(out), p50Line.FindStringSubmatch(out), p99Line.FindStringSubmatch(out)
	all := allLine.FindStringSubmatch(out)
	if all == nil || rate == nil || p50 == nil || p99 == nil {
		return sample{}, fmt.Errorf("no figures in:\n%s", out)
	}
	r, err := strconv.ParseFloat(rate[1], 64)
	half, err2 := time.ParseDuration(p50[1])
	most, err3 := time.ParseDuration(p99[1])
	n, err4 := strconv.Atoi(all[1])
	return sample{r, half, most, cpu / time.Duration(max(n, 1))}, errors.Join(err, err2, err3, err4)
}

// report prints medians, and what they are of nginx's.
func report(kinds []kind, ways []way, got map[string][]sample) {
	for _, k := range kinds {
		base := median(got[k.name+"/nginx"], func(s sample) float64 { return s.rate })
		direct := median(got[k.name+"/direct"], func(s sample) float64 { return float64(s.p50) })
		fmt.Fprintf(os.Stderr, "\n%s, %d connections\n%-10s %10s %8s %10s %10s %12s %12s\n", k.name, k.connections, "via", "req/s", "/nginx", "p50", "p99", "p50-direct", "cpu/request")
		for _, w := range ways {
			all := got[k.name+"/"+w.name]
			rate := median(all, func(s sample) float64 { return s.rate })
			p50 := median(all, func(s sample) float64 { return float64(s.p50) })
			p99 := median(all, func(s sample) float64 { return float64(s.p99) })
			fmt.Fprintf(os.Stderr, "%-10s %10.0f %8.2f %10s %10s %12s %12s\n", w.name, rate, rate/base, time.Duration(p50), time.Duration(p99), time.Duration(p50-direct), time.Duration(median(all, func(s sample) float64 { return float64(s.cpu) })))
		}
	}
}

func median(all []sample, of func(sample) float64) float64 {
	v := make([]float64, len(all))
	for i, s := range all {
		v[i] = of(s)
	}
	slices.Sort(v)
	return v[len(v)/2]
}
