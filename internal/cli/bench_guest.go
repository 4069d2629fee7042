package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/client"
)

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
	err := b.cn.api.KillSandbox(ctx, s.ID)
	for client.IsConflict(err) && ctx.Err() == nil { // it is on its way from one state to another
		wait(ctx, 100*time.Millisecond)
		err = b.cn.api.KillSandbox(ctx, s.ID)
	}
	if err != nil {
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
