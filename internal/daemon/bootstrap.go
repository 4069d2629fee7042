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

// bootstrap brings a started daemon to the point where a sandbox has run a command, and then says that it is ready.
func (d *daemon) bootstrap(ctx context.Context) error {
	key, err := d.ensureAdminKey(ctx)
	if err != nil {
		return err
	}
	if err := d.ensureTemplate(ctx); err != nil {
		return err
	}
	d.notify(Event{Step: "trying a sandbox", Fraction: 1})
	ready := Ready{APIURL: d.cfg.PublicAPIURL, ProxyURL: d.cfg.PublicProxyURL, KeyFile: d.path("admin.key"), AdminKey: key}
	if err := d.trySandbox(ctx, &ready); err != nil {
		return err
	}
	d.ready.Store(true)
	ready.Took = time.Since(d.begun)
	d.notify(Event{Ready: &ready})
	return nil
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
