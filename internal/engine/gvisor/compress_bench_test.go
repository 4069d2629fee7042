package gvisor

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"gvisor.dev/gvisor/pkg/sentry/control"
	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"
	"gvisor.dev/gvisor/pkg/state/statefile"
	"gvisor.dev/gvisor/pkg/urpc"
	runscboot "gvisor.dev/gvisor/runsc/boot"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// BenchmarkCompression compares checkpoints as they are with gVisor's own compression, and with zstd over the pages after the
// save and before the start. See docs/decisions/checkpoints-uncompressed.md.
func BenchmarkCompression(b *testing.B) {
	for _, heap := range []int64{0, 200 << 20} {
		for _, how := range []struct {
			name string
			run  func(*testing.B, *compressing) error
		}{
			{"none", func(b *testing.B, c *compressing) error { b.Helper(); return c.plain() }},
			{"flate", func(b *testing.B, c *compressing) error { b.Helper(); return c.flate() }},
			{"zstd", func(b *testing.B, c *compressing) error { b.Helper(); return c.zstd() }},
		} {
			b.Run(fmt.Sprintf("heap-%dMiB/%s", heap>>20, how.name), func(b *testing.B) {
				p := benchPlace(b, false)
				e := p.open(b)
				s, w := loaded(b, p, e, 0, 0)
				w.ask(b, fmt.Sprintf("fill %d", heap))
				s.NetNS = ""
				var saves, starts []time.Duration
				var size int64
				for b.Loop() {
					c := &compressing{e: e, s: s, dir: b.TempDir()}
					if err := how.run(b, c); err != nil {
						b.Fatal(err)
					}
					saves, starts, size = append(saves, c.save), append(starts, c.start), c.size
					if err := os.RemoveAll(c.dir); err != nil {
						b.Fatal(err)
					}
				}
				report(b, "save", saves)
				report(b, "start", starts)
				b.ReportMetric(float64(size)/(1<<20), "MiB")
			})
		}
	}
}

// compressing is one way of a guest to a directory and back.
type compressing struct {
	e           *Engine
	s           engine.Spec
	dir         string
	save, start time.Duration
	size        int64
}

func (c *compressing) plain() error {
	begin := time.Now()
	_, err := c.e.Save(context.Background(), c.s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: c.dir})
	c.save = time.Since(begin)
	if err != nil {
		return err
	}
	if err := c.measure(); err != nil {
		return err
	}
	return c.begin(func(s engine.Spec) error { return c.e.Start(context.Background(), s) })
}

// begin measures a start, and stops what it started.
func (c *compressing) begin(start func(engine.Spec) error) error {
	s := c.s
	s.ID, s.Checkpoint = sandbox.NewID("testno"), c.dir
	begin := time.Now()
	if err := start(s); err != nil {
		return err
	}
	c.start += time.Since(begin)
	return c.e.Stop(context.Background(), s.ID)
}

// measure adds up what the files occupy.
func (c *compressing) measure() error {
	entries, err := os.ReadDir(c.dir)
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			return err
		}
		c.size += info.Size()
	}
	return err
}

// flate has the sentry compress everything into its state file, and starts from that.
func (c *compressing) flate() error {
	g, err := c.e.find(c.s.ID)
	if err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(c.dir, checkpointfiles.StateFileName))
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // flushed below
	begin := time.Now()
	err = c.e.callWith(context.Background(), g, runscboot.ContMgrCheckpoint, &control.SaveOpts{
		Metadata: statefile.CompressionLevelFlateBestSpeed.ToMetadata(), AppMFExcludeCommittedZeroPages: true,
		Resume: true, FilePayload: urpc.FilePayload{Files: []*os.File{f}},
	}, nil)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	c.save = time.Since(begin)
	if err := c.measure(); err != nil {
		return err
	}
	return c.begin(func(s engine.Spec) error {
		dir := s.Checkpoint
		s.Checkpoint = ""
		st, err := c.e.newStarting(s)
		if err != nil {
			return err
		}
		st.spec.Checkpoint, st.from = dir, manifest{Kind: engine.SaveMemory}
		if err := c.e.reserve(s.ID); err != nil {
			return err
		}
		made, err := st.run(context.Background())
		c.e.mu.Lock()
		c.e.guests[s.ID] = made
		c.e.mu.Unlock()
		return err
	})
}

// zstd compresses the pages after the guest goes on, and decompresses them before a start. Its time counts as the save's and
// the start's.
func (c *compressing) zstd() error {
	begin := time.Now()
	if _, err := c.e.Save(context.Background(), c.s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Dir: c.dir}); err != nil {
		return err
	}
	pages := filepath.Join(c.dir, checkpointfiles.PagesFileName)
	if err := rewrite(pages, pages+".zst", func(w io.Writer, r io.Reader) error {
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err != nil {
			return err
		}
		if _, err := z.ReadFrom(r); err != nil {
			return err
		}
		return z.Close()
	}); err != nil {
		return err
	}
	c.save = time.Since(begin)
	if err := c.measure(); err != nil {
		return err
	}
	begin = time.Now()
	if err := rewrite(pages+".zst", pages, func(w io.Writer, r io.Reader) error {
		z, err := zstd.NewReader(r)
		if err != nil {
			return err
		}
		defer z.Close()
		_, err = z.WriteTo(w)
		return err
	}); err != nil {
		return err
	}
	c.start = time.Since(begin)
	return c.begin(func(s engine.Spec) error { return c.e.Start(context.Background(), s) })
}

// rewrite writes one file from another, which it removes.
func rewrite(from, to string, f func(io.Writer, io.Reader) error) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }() // opened for reading
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	if err := f(out, in); err != nil {
		_ = out.Close() // the first error says it
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Remove(from)
}
