package cli

import (
	"context"
	"io"
	"net/http"
	"time"
)

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
