package cli

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/client"
)

// What the figures should be at most on two idle cores; those of the disk tier where the data directory has reflinks.
const (
	pauseTarget      = 60   // ms
	resumeTarget     = 70   // ms
	wakeTarget       = 90   // ms
	snapshotTarget   = 60   // ms
	forkTarget       = 600  // ms, for forkCount
	heapPauseTarget  = 300  // ms
	heapResumeTarget = 400  // ms
	diskPauseTarget  = 150  // ms
	diskResumeTarget = 120  // ms
	diskForkTarget   = 300  // ms, for diskForkCount
	diskUseTarget    = 10   // MiB, for diskForkCount
	forkCount        = 10   // copies made by the fork tier
	diskForkCount    = 3    // copies made by the disk tier
	heapMiB          = 200  // written before each pause of the heap tier
	diskMiB          = 1024 // written once by the disk tier
)

// rounds is how many samples a slow tier takes.
func (b *bench) rounds() int { return max(b.count/6, min(b.count, 3)) }

// whole lets a change of the cluster come to its end also when the benchmark is interrupted: what it made is known then, and
// can be removed.
func whole[T any](ctx context.Context, change func(context.Context) (T, error)) (T, time.Duration, error) {
	if err := ctx.Err(); err != nil {
		var none T
		return none, 0, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createWithin)
	defer cancel()
	begin := time.Now()
	out, err := change(ctx)
	return out, time.Since(begin), err
}

// sized makes a sandbox with more than the template's memory or disk, and opens it.
func (b *bench) sized(ctx context.Context, r client.Resources) (*guestConn, error) {
	return b.opened(ctx, client.CreateSandbox{Resources: r})
}

// opened makes a sandbox and opens it.
func (b *bench) opened(ctx context.Context, in client.CreateSandbox) (*guestConn, error) {
	in.Template, in.TimeoutSeconds = b.template, 1800
	s, _, err := whole(ctx, func(ctx context.Context) (client.Sandbox, error) {
		made, err := b.cn.api.CreateSandbox(ctx, in)
		if err != nil {
			return made, b.cn.check(err)
		}
		s, err := b.cn.api.GetSandbox(ctx, made.ID) // the answer to a create holds no token
		if err != nil {
			b.kill(ctx, made)
		}
		return s, b.cn.check(err)
	})
	if err != nil {
		return nil, err
	}
	return b.cn.open(ctx, s, "")
}

func (b *bench) pauseOne(ctx context.Context, id string) (time.Duration, error) {
	_, took, err := whole(ctx, func(ctx context.Context) (client.Sandbox, error) { return b.cn.api.PauseSandbox(ctx, id, "") })
	return took, b.cn.check(err)
}

// resumeOne returns how long it takes until the call returns, and until the agent inside answers.
func (b *bench) resumeOne(ctx context.Context, g *guestConn) (call, answer time.Duration, err error) {
	begin := time.Now()
	_, call, err = whole(ctx, func(ctx context.Context) (client.Sandbox, error) {
		return b.cn.api.ResumeSandbox(ctx, g.sandbox.ID, client.ResumeSandbox{TimeoutSeconds: 1800})
	})
	if err != nil {
		return 0, 0, b.cn.check(err)
	}
	err = g.answers(ctx)
	return call, time.Since(begin), err
}

// answers asks the agent inside whether it is there.
func (g *guestConn) answers(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.base+"/health", http.NoBody)
	if err != nil {
		return err
	}
	return g.discard(req)
}

// cycles are the figures of pausing and resuming: until the calls return, and until the agent answers.
type cycles struct{ pause, call, answer series }

// cycle pauses and resumes one sandbox over and over; before runs ahead of each pause.
func (b *bench) cycle(ctx context.Context, g *guestConn, rounds int, before func() error) (cycles, error) {
	c := cycles{pause: series{Name: "pause", Unit: "ms"}, call: series{Name: "resume", Unit: "ms"}, answer: series{Name: "resume+answer", Unit: "ms"}}
	for range rounds {
		if before != nil {
			if err := before(); err != nil {
				return c, err
			}
		}
		paused, err := b.pauseOne(ctx, g.sandbox.ID)
		if err != nil {
			return c, err
		}
		call, answer, err := b.resumeOne(ctx, g)
		if err != nil {
			return c, err
		}
		c.pause.Samples = append(c.pause.Samples, ms(paused))
		c.call.Samples = append(c.call.Samples, ms(call))
		c.answer.Samples = append(c.answer.Samples, ms(answer))
	}
	return c, nil
}

func (b *bench) pause(ctx context.Context) (benchResult, error) {
	g, err := b.sized(ctx, client.Resources{})
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, g.sandbox)
	c, err := b.cycle(ctx, g, b.count, nil)
	c.pause.Target = pauseTarget
	return benchResult{Series: []series{c.pause}}, err
}

func (b *bench) resume(ctx context.Context) (benchResult, error) {
	g, err := b.sized(ctx, client.Resources{})
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, g.sandbox)
	c, err := b.cycle(ctx, g, b.count, nil)
	c.answer.Target = resumeTarget
	return benchResult{Series: []series{c.call, c.answer}}, err
}

// wake sends a paused sandbox a request, which makes it run, and waits for the answer's first byte.
func (b *bench) wake(ctx context.Context) (benchResult, error) {
	g, err := b.opened(ctx, client.CreateSandbox{AutoPause: true, AutoResume: true})
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, g.sandbox)
	out := series{Name: "first answer", Unit: "ms", Target: wakeTarget}
	for range b.count {
		if _, err := b.pauseOne(ctx, g.sandbox.ID); err != nil {
			return benchResult{}, err
		}
		if err := b.settle(ctx, false); err != nil {
			return benchResult{}, err
		}
		begin := time.Now()
		if err := g.answers(ctx); err != nil {
			return benchResult{}, err
		}
		out.Samples = append(out.Samples, ms(time.Since(begin)))
	}
	return benchResult{Series: []series{out}}, nil
}

func (b *bench) snapshot(ctx context.Context) (benchResult, error) {
	g, err := b.sized(ctx, client.Resources{})
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, g.sandbox)
	out := series{Name: "snapshot", Unit: "ms", Target: snapshotTarget}
	for range b.count {
		s, took, err := whole(ctx, func(ctx context.Context) (client.Snapshot, error) {
			return b.cn.api.CreateSnapshot(ctx, g.sandbox.ID, client.CreateSnapshot{})
		})
		if err != nil {
			return benchResult{}, b.cn.check(err)
		}
		out.Samples = append(out.Samples, ms(took))
		b.remove(ctx, "snapshot "+s.ID, func(ctx context.Context) error { return b.cn.api.DeleteSnapshot(ctx, s.ID) })
		if err := g.answers(ctx); err != nil { // it keeps running
			return benchResult{}, err
		}
	}
	return benchResult{Series: []series{out}}, nil
}

// remove takes away what a tier made, also after an interrupt.
func (b *bench) remove(ctx context.Context, what string, do func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createWithin)
	defer cancel()
	if err := do(ctx); err != nil && !client.IsNotFound(err) {
		_, _ = fmt.Fprintf(b.progress, "remove %s: %v\n", what, err)
	}
}

// copies forks a sandbox and returns those that were made also beside an error.
func (b *bench) copies(ctx context.Context, id string, n int) (made []client.Sandbox, took time.Duration, err error) {
	forks, took, err := whole(ctx, func(ctx context.Context) ([]client.Fork, error) {
		return b.cn.api.ForkSandbox(ctx, id, client.ForkSandbox{Count: n, TimeoutSeconds: 900})
	})
	for _, f := range forks {
		if f.Sandbox != nil {
			made = append(made, *f.Sandbox)
		}
	}
	if failed := forkErrors(forks); err == nil && len(failed) > 0 {
		err = failed[0]
	}
	return made, took, b.cn.check(err)
}

func (b *bench) fork(ctx context.Context) (benchResult, error) {
	g, err := b.sized(ctx, client.Resources{})
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, g.sandbox)
	name := fmt.Sprintf("fork of %d", forkCount)
	all, answered := series{Name: name, Unit: "ms", Target: forkTarget}, series{Name: name + "+answer", Unit: "ms"}
	for range b.rounds() {
		begin := time.Now()
		made, took, err := b.copies(ctx, g.sandbox.ID, forkCount)
		if err == nil {
			err = b.allAnswer(ctx, made)
		}
		sum := time.Since(begin)
		b.killAll(ctx, made)
		if err != nil {
			return benchResult{}, err
		}
		all.Samples, answered.Samples = append(all.Samples, ms(took)), append(answered.Samples, ms(sum))
	}
	return benchResult{Series: []series{all, answered}}, nil
}

// allAnswer waits until the agent of each answers.
func (b *bench) allAnswer(ctx context.Context, made []client.Sandbox) error {
	if _, err := b.cn.guest(ctx, "any", guestPort); err != nil { // finds the proxy once, for all
		return err
	}
	errs := make(chan error, len(made))
	var wg sync.WaitGroup
	for _, s := range made {
		wg.Go(func() {
			g, err := b.cn.open(ctx, s, "")
			if err == nil {
				err = g.answers(ctx)
			}
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// heapProgram holds memory that no compression makes smaller, and writes to each page of it when it is told to.
const heapProgram = `import os, signal
b = bytearray(os.urandom(%d << 20))
def dirty(*_):
    for i in range(0, len(b), 4096): b[i] ^= 1
    open('/tmp/bench-dirty', 'w').close()
signal.signal(signal.SIGUSR1, dirty)
open('/tmp/bench-pid', 'w').write(str(os.getpid()))
dirty()
while True: signal.pause()
`

// dirtied waits for the program's word; it fails where the program is not there any more.
const dirtied = `for i in $(seq 600); do [ -e /tmp/bench-dirty ] && [ -s /tmp/bench-pid ] && exit 0; sleep 0.1; done; exit 1`

func (b *bench) heap(ctx context.Context) (benchResult, error) {
	g, err := b.sized(ctx, client.Resources{MemoryBytes: 1 << 30})
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, g.sandbox)
	start := "nohup python3 -c \"$0\" >/tmp/bench-out 2>&1 </dev/null & " + dirtied
	if err := g.command(ctx, "/bin/bash", "-c", start, fmt.Sprintf(heapProgram, heapMiB)); err != nil {
		return benchResult{}, err
	}
	c, err := b.cycle(ctx, g, b.rounds(), func() error {
		return g.command(ctx, "/bin/bash", "-c", "rm /tmp/bench-dirty && kill -USR1 $(cat /tmp/bench-pid) && "+dirtied)
	})
	c.pause.Target, c.answer.Target = heapPauseTarget, heapResumeTarget
	return benchResult{Series: []series{c.pause, c.call, c.answer}}, err
}

func (b *bench) disk(ctx context.Context) (benchResult, error) {
	g, err := b.sized(ctx, client.Resources{DiskBytes: 4 << 30})
	if err != nil {
		return benchResult{}, err
	}
	defer b.kill(ctx, g.sandbox)
	write := fmt.Sprintf("dd if=/dev/urandom of=/home/user/bench.bin bs=1M count=%d status=none && sync", diskMiB)
	if err := g.command(ctx, "/bin/bash", "-c", write); err != nil {
		return benchResult{}, err
	}
	c, err := b.cycle(ctx, g, b.rounds(), nil)
	if err != nil {
		return benchResult{}, err
	}
	c.pause.Target, c.answer.Target = diskPauseTarget, diskResumeTarget
	name := fmt.Sprintf("fork of %d", diskForkCount)
	forks, use := series{Name: name, Unit: "ms", Target: diskForkTarget}, series{Name: name + ", on disk", Unit: "MiB", Target: diskUseTarget}
	for range b.rounds() {
		before := b.diskUsed()
		made, took, err := b.copies(ctx, g.sandbox.ID, diskForkCount)
		after := b.diskUsed()
		b.killAll(ctx, made)
		if err != nil {
			return benchResult{}, err
		}
		forks.Samples = append(forks.Samples, ms(took))
		if b.cn.local {
			use.Samples = append(use.Samples, float64(max(after-before, 0))/(1<<20))
		}
	}
	return benchResult{Series: []series{c.pause, c.call, c.answer, forks, use}}, nil
}

// diskUsed is how much of the file system that sandboxes write to is in use, in bytes; 0 where that is another machine's.
func (b *bench) diskUsed() int64 {
	if !b.cn.local {
		return 0
	}
	dir, err := os.Open(filepath.Join(b.dataDir, "node"))
	if err != nil {
		return 0
	}
	defer func() { _ = dir.Close() }()
	fd := int(dir.Fd())
	_ = unix.Syncfs(fd)                         // without it, less than the use is counted
	var st unix.Statfs_t                        // its fields are in blocks
	_ = unix.Fstatfs(fd, &st)                   // zero where it fails
	return int64(st.Blocks-st.Bfree) * st.Bsize //nolint:gosec // no disk has 2^63 bytes
}
