package gvisor

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// BenchmarkStream measures how long it takes until a guest with a heap of 64 MiB is loaded anew from one that stands still, and
// from then until it answers.
func BenchmarkStream(b *testing.B) {
	p := benchPlace(b, false)
	e := p.open(b)
	s, w := loaded(b, p, e, 64<<20, 0)
	w2 := newWireAt(b, 1)
	var streams, answers []time.Duration
	for b.Loop() {
		to := s
		to.ID, to.NetNS, to.Hold = sandbox.NewID("testno"), w2.path, true
		r, in := io.Pipe()
		to.Stream = r
		begin := time.Now()
		go func() {
			_, err := e.Save(context.Background(), s.ID, engine.SaveSpec{Kind: engine.SaveMemory, Stream: in, Hold: true})
			_ = in.CloseWithError(err)
		}()
		if err := e.Start(context.Background(), to); err != nil {
			b.Fatal(err)
		}
		streams = append(streams, time.Since(begin))
		begin = time.Now()
		if err := e.Thaw(context.Background(), to.ID); err != nil {
			b.Fatal(err)
		}
		w2.ask(b, "host")
		answers = append(answers, time.Since(begin))
		if err := e.Stop(context.Background(), to.ID); err != nil {
			b.Fatal(err)
		}
		w2.renew(b, 1)
		if err := e.Thaw(context.Background(), s.ID); err != nil {
			b.Fatal(err)
		}
		w.ask(b, "host")
	}
	report(b, "stream", streams)
	report(b, "answer", answers)
}
