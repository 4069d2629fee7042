package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/daemon"
)

// eventsFD is where a detached daemon writes its start-up events, as JSON lines, until it is ready.
const eventsFD = 3

// eventsFlag tells a detached daemon that eventsFD is open. It is for this program's own use.
const eventsFlag = "start-events"

// starts makes c run the roles of this machine, in the foreground or detached. roles says which, or why not.
func (a *app) starts(c *cobra.Command, roles func(*config.Config) (daemon.Roles, error)) *cobra.Command {
	var detach, events bool
	detachFlag(c, &detach)
	c.Flags().BoolVar(&events, eventsFlag, false, "write start-up events to file descriptor 3")
	_ = c.Flags().MarkHidden(eventsFlag) // the flag exists: it was made on the line before
	config.Flags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := config.Load(c.Flags(), a.environ)
		if err != nil {
			return &usageError{err}
		}
		r, err := roles(cfg)
		if err != nil {
			return err
		}
		if err := r.Check(cfg); err != nil {
			return &usageError{err}
		}
		if err := needRoot(c, r); err != nil {
			return err
		}
		if detach && !events {
			return a.startDetached(c.Context(), cfg, detachedArgs(a.args))
		}
		return a.startHere(c, cfg, r, events)
	}
	return c
}

func detachFlag(c *cobra.Command, at *bool) {
	c.Flags().BoolVarP(at, "detach", "d", false, "return once ready and go on in the background; its log is in the data directory")
}

// needRoot refuses what only root can do before anything was made.
func needRoot(c *cobra.Command, r daemon.Roles) error {
	if os.Geteuid() == 0 || !r.Node {
		return nil
	}
	return fmt.Errorf("`%s` makes network namespaces and cgroups: run it as root (sudo %s)", c.CommandPath(), c.CommandPath())
}

// startHere runs the roles until it is told to stop. events says that somebody reads eventsFD.
func (a *app) startHere(c *cobra.Command, cfg *config.Config, r daemon.Roles, events bool) error {
	show := a.showStart
	if events {
		pipe := os.NewFile(eventsFD, "start events")
		syscall.CloseOnExec(eventsFD)
		show = func() func(daemon.Event) { return sendEvents(pipe) }
	}
	return daemon.Run(c.Context(), cfg, daemon.Options{
		Roles: r, Version: version, LogTo: a.err, Notify: show(),
		Reload: func() (*config.Config, error) { return config.Load(c.Flags(), a.environ) },
	})
}

// sendEvents writes events for the process that waits for the daemon; that one may go away at any time.
func sendEvents(pipe *os.File) func(daemon.Event) {
	enc := json.NewEncoder(pipe)
	return func(e daemon.Event) {
		_ = enc.Encode(e) // nobody reads any more: nothing to tell
		if e.Ready != nil {
			_ = pipe.Close()
		}
	}
}

// showStart renders start-up events for a person.
func (a *app) showStart() func(daemon.Event) {
	show := newProgress(a.err)
	return func(e daemon.Event) {
		if e.Step != "" {
			show.update(e.Step, e.Fraction)
		}
		if e.Message != "" {
			show.line(e.Message)
		}
		if e.Ready != nil {
			show.end()
			a.banner(e.Ready)
		}
	}
}

// startDetached starts the daemon by these arguments in a session of its own, and waits until it is ready or has failed.
func (a *app) startDetached(ctx context.Context, cfg *config.Config, args []string) error {
	if h, held := daemon.HolderOf(cfg.DataDir); held {
		return fmt.Errorf("data directory %s is in use by process %d since %s; `cloister down --data-dir %s` stops it",
			cfg.DataDir, h.PID, h.Since.Local().Format(time.DateTime), cfg.DataDir)
	}
	log, err := openLog(cfg.DataDir)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	events, theirs, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer func() { _ = events.Close() }()
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	cmd := exec.Command(exe, args...) //nolint:gosec,noctx // this program itself; it outlives this command
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	_ = theirs.Close() // ours; the daemon holds its own
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	if a.follow(events) {
		return cmd.Process.Release()
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return errors.New("interrupted: the daemon was stopped again")
	}
	return fmt.Errorf("the daemon ended before it was ready (%w); the last lines of %s:\n%s", err, log.Name(), tail(log.Name()))
}

// detachedArgs are this call's arguments for the daemon that it starts.
func detachedArgs(args []string) []string {
	out := slices.DeleteFunc(slices.Clone(args), func(s string) bool {
		return s == "--detach" || s == "-d" || strings.HasPrefix(s, "--detach=")
	})
	return append(out, "--"+eventsFlag)
}

// settingArgs are the settings that c was given by flags, for another command that takes the same ones.
func settingArgs(c *cobra.Command) []string {
	known := pflag.NewFlagSet("settings", pflag.ContinueOnError)
	config.Flags(known)
	var out []string
	c.Flags().Visit(func(f *pflag.Flag) {
		if known.Lookup(f.Name) == nil && f.Name != "output" {
			return
		}
		value := f.Value.String()
		if list, ok := f.Value.(pflag.SliceValue); ok {
			value = strings.Join(list.GetSlice(), ",")
		}
		out = append(out, "--"+f.Name+"="+value)
	})
	return out
}

// follow shows the daemon's events and reports whether it became ready.
func (a *app) follow(events io.Reader) bool {
	show := a.showStart()
	for dec := json.NewDecoder(events); ; {
		var e daemon.Event
		if dec.Decode(&e) != nil {
			return false
		}
		show(e)
		if e.Ready != nil {
			return true
		}
	}
}

// maxLog is when a new start puts the daemon's log aside, in bytes.
const maxLog = 32 << 20

func openLog(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	name := filepath.Join(dir, "cloister.log")
	if info, err := os.Stat(name); err == nil && info.Size() > maxLog {
		if err := os.Rename(name, name+".1"); err != nil {
			return nil, fmt.Errorf("put log aside: %w", err)
		}
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600) //nolint:gosec // the user names the directory
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}

// tail returns the last lines of a log.
func tail(name string) string {
	const most = 4 << 10
	text, err := os.ReadFile(name) //nolint:gosec // our own log
	if err != nil {
		return err.Error()
	}
	if len(text) > most {
		text = text[len(text)-most:]
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(len(lines)-10, 0):], "\n")
}
