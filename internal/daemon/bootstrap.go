package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/gen/envd/process"
	"github.com/cloister-dev/cloister/internal/gen/envd/process/processconnect"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

// bootstrap brings a started daemon to the point where its roles work, and then says that it is ready: where server and
// node are in one process, a sandbox has run a command by then.
func (d *daemon) bootstrap(ctx context.Context) error {
	if d.server == nil {
		return d.bootstrapMember(ctx)
	}
	key, err := d.ensureAdminKey(ctx)
	if err != nil {
		return err
	}
	ready := Ready{APIURL: d.cfg.PublicAPIURL, ProxyURL: d.cfg.PublicProxyURL, KeyFile: d.path("admin.key"), AdminKey: key}
	if d.node == nil {
		d.tellReady(&ready)
		return d.prepareTemplate(ctx)
	}
	if err := d.ensureTemplate(ctx); err != nil {
		return err
	}
	d.notify(Event{Step: "trying a sandbox", Fraction: 1})
	if err := d.trySandbox(ctx, &ready); err != nil {
		return err
	}
	d.tellReady(&ready)
	return nil
}

func (d *daemon) tellReady(r *Ready) {
	d.ready.Store(true)
	r.Took = time.Since(d.begun)
	d.notify(Event{Ready: r})
}

// reachTimeout is how long a machine that joined waits for its server before it counts as ready by itself.
const reachTimeout = 5 * time.Second

// bootstrapMember waits until the server knows what the node runs, or the proxy has the routing table. Without a server both
// go on with what they have.
func (d *daemon) bootstrapMember(ctx context.Context) error {
	d.notify(Event{Step: "reaching the server", Fraction: 0.5})
	wait, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	if d.node != nil {
		_ = d.node.uplink.wait(wait) // goes on without
	} else {
		d.proxy.wait(wait)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	st := d.ownStatus()
	d.tellReady(&Ready{ProxyURL: st.ProxyURL, Member: st.Member})
	return nil
}

// firstNodeEvery is how often a server without a node looks for the first one, and templatePause how long it waits after a
// build that failed.
const (
	firstNodeEvery = time.Second
	templatePause  = time.Minute
)

// prepareTemplate has the default template built as soon as a node has joined that can do it.
func (d *daemon) prepareTemplate(ctx context.Context) error {
	for sleepUntil(ctx, time.Now().Add(firstNodeEvery)) {
		st, err := d.server.control.Status(ctx)
		if err != nil || st.Nodes[sandbox.NodeReady] == 0 {
			continue
		}
		if err = d.ensureTemplate(ctx); err == nil {
			return nil
		}
		if ctx.Err() != nil {
			break
		}
		d.log.ErrorContext(ctx, "the default template was not made; trying again", slog.Duration("in", templatePause), slog.Any("err", err))
		sleepUntil(ctx, time.Now().Add(templatePause))
	}
	return ctx.Err()
}

// ensureAdminKey makes the admin key on the first start, and returns it only then.
func (d *daemon) ensureAdminKey(ctx context.Context) (string, error) {
	kept, err := d.server.store.Keys(ctx)
	if err != nil {
		return "", fmt.Errorf("read keys: %w", err)
	}
	if len(kept) > 0 {
		if _, err := os.Stat(d.path("admin.key")); err != nil {
			d.log.WarnContext(ctx, "the file with the admin key cannot be read: where the key is lost, `cloister key create` makes another", slog.Any("err", err))
		}
		return "", nil
	}
	made, err := auth.NewKey()
	if err != nil {
		return "", fmt.Errorf("make admin key: %w", err)
	}
	// The file comes first: a key that is stored but nowhere to be read would lock everybody out.
	if err := writeSecret(d.path("admin.key"), made.Secret+"\n"); err != nil {
		return "", fmt.Errorf("write admin key: %w", err)
	}
	_, first, err := d.server.store.CreateFirstKey(ctx, store.Key{Name: "admin", Hash: made.Hash, Hint: made.Hint, Admin: true})
	if err != nil || !first {
		return "", err
	}
	return made.Secret, nil
}

// writeSecret replaces a file with one that only its owner can read, all of it or nothing.
func writeSecret(path, text string) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) //nolint:gosec // in our own directory
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// ensureTemplate waits until the default template can be used, and builds it where it cannot.
func (d *daemon) ensureTemplate(ctx context.Context) error {
	spec := control.BuildSpec{
		Name: d.cfg.DefaultTemplate, Resources: d.defaultResources(),
		Recipe: control.Recipe{
			Sources: d.cfg.BaseSources, RegistryUsername: d.cfg.RegistryUsername, RegistryPassword: d.cfg.RegistryPassword,
		},
	}
	_, build, err := d.server.control.EnsureTemplate(ctx, spec)
	if err != nil {
		return fmt.Errorf("prepare template %s: %w", spec.Name, err)
	}
	if build.State == sandbox.BuildReady {
		return nil
	}
	for offset := int32(0); ; {
		b, err := d.server.control.GetBuild(ctx, control.BuildQuery{ID: build.ID, Offset: offset, Wait: 10 * time.Second})
		if err != nil {
			return fmt.Errorf("follow the build of template %s: %w", spec.Name, err)
		}
		d.notify(Event{Step: b.Step, Fraction: b.Progress})
		for _, e := range b.Entries {
			d.notify(Event{Message: e.Message})
		}
		offset += int32(len(b.Entries)) //nolint:gosec // a bounded page
		switch b.State {
		case sandbox.BuildReady:
			return nil
		case sandbox.BuildFailed:
			return fmt.Errorf("build template %s: %s", spec.Name, b.Error)
		}
	}
}

// smokeTimeout bounds the sandbox that proves the installation.
const smokeTimeout = time.Minute

// trySandbox creates a sandbox, runs a command in it by way of the proxy's own path, and kills it. A full machine is no
// reason not to start.
func (d *daemon) trySandbox(ctx context.Context, ready *Ready) error {
	ctx, cancel := context.WithTimeout(ctx, smokeTimeout)
	defer cancel()
	s, err := d.server.control.Create(ctx, control.CreateRequest{
		Template: d.cfg.DefaultTemplate, Timeout: smokeTimeout, Secure: true, AllowInternet: true, Metadata: map[string]string{"cloister": "smoke-test"},
	})
	short := d.node.journal.Ledger().Capacity.DiskBytes < d.defaultResources().DiskBytes
	if err != nil && (short || errors.Is(err, sandbox.ErrExhausted)) {
		ready.NoRoom = err.Error()
		if short {
			ready.NoRoom += fmt.Sprintf("; the disk of %s is (nearly) full: free space there, or lower reserved-disk, which is %s", d.cfg.DataDir, d.cfg.ReservedDisk.String())
		}
		d.log.WarnContext(ctx, "no room to try a sandbox", slog.String("why", ready.NoRoom))
		return nil
	}
	if err != nil {
		return fmt.Errorf("try a sandbox: %w", err)
	}
	defer func() {
		killCtx, stop := context.WithTimeout(context.WithoutCancel(ctx), smokeTimeout)
		defer stop()
		_ = d.server.control.Kill(killCtx, s.ID) // its timeout ends it otherwise
	}()
	ready.Sandbox, ready.Command = string(s.ID), "uname -s"
	if ready.Output, err = d.runIn(ctx, s, ready.Command); err != nil {
		return fmt.Errorf("run `%s` in sandbox %s: %w", ready.Command, s.ID, err)
	}
	return nil
}

// runIn runs a shell command in a sandbox and returns what it printed.
func (d *daemon) runIn(ctx context.Context, s sandbox.Sandbox, command string) (string, error) {
	transport := &http.Transport{DialContext: guestDialer(d.node.agent, s.ID)}
	defer transport.CloseIdleConnections()
	token := d.server.control.AccessToken(s)
	client := processconnect.NewProcessClient(&http.Client{Transport: withToken{transport, token}}, "http://guest")
	stdin := false
	stream, err := client.Start(ctx, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", command}}, Stdin: &stdin})
	if err != nil {
		return "", err
	}
	defer func() { _ = stream.Close() }()
	return collect(stream)
}

func collect(stream *connect.ServerStreamForClient[process.StartResponse]) (string, error) {
	var out strings.Builder
	for stream.Receive() {
		e := stream.Msg().GetEvent()
		out.Write(e.GetData().GetStdout())
		if end := e.GetEnd(); end != nil {
			if end.GetExitCode() != 0 {
				return "", fmt.Errorf("exit code %d", end.GetExitCode())
			}
			return strings.TrimSpace(out.String()), nil
		}
	}
	return "", errors.Join(errors.New("the stream ended before the command did"), stream.Err())
}
