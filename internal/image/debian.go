package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// debianPackages is what the base template has beyond Debian's smallest variant: what the E2B contract asks of it
// (python3, git, curl, sudo, bash) and what programs written by agents reach for.
const debianPackages = "python3,python3-pip,python3-venv,git,curl,wget,sudo,bash,ca-certificates,procps,iproute2," +
	"iputils-ping,less,nano,tar,gzip,xz-utils,unzip,netcat-openbsd,openssh-client,attr"

const (
	// maxDebBytes is what the cache of downloaded packages may hold before it begins again.
	maxDebBytes = 1 << 30
	// bootstrapShare is the part of filling the tree that debootstrap takes.
	bootstrapShare = 0.82
)

func (b *build) fromDebian(ctx context.Context) error {
	arch, err := debianArch()
	if err != nil {
		return err
	}
	suite := b.source.Ref
	cached := filepath.Join(b.store.debianDir(), debianKey(suite, arch)+".tar.zst")
	info, statErr := os.Stat(cached)
	if statErr == nil && time.Since(info.ModTime()) < b.store.cfg.CacheAge {
		if err = b.loadTree(ctx, cached); err == nil {
			return b.finishDebian(suite)
		}
		if ctx.Err() != nil {
			return err
		}
		b.store.log.WarnContext(ctx, "cached debian tree unusable", slog.String("path", cached), slog.Any("err", err))
		statErr = os.Remove(cached)
		b.tree = tree.New(b.store.cfg.Limits)
	}
	err = b.bootstrap(ctx, suite, arch)
	switch {
	case err == nil:
		if err := b.saveTree(ctx, cached); err != nil {
			return fmt.Errorf("cache the bootstrapped tree: %w", err)
		}
	case ctx.Err() != nil || statErr != nil:
		return err
	default:
		b.report(Progress{Step: "bootstrap", Message: fmt.Sprintf("%v; using the tree of %s instead", err,
			info.ModTime().Format(time.DateOnly))})
		b.store.log.WarnContext(ctx, "bootstrap failed, using an old tree", slog.String("suite", suite), slog.Any("err", err))
		b.tree = tree.New(b.store.cfg.Limits)
		if err := b.loadTree(ctx, cached); err != nil {
			return err
		}
	}
	return b.finishDebian(suite)
}

// debianKey names a bootstrapped tree by all that goes into it.
func debianKey(suite, arch string) string {
	recipe := strings.Join([]string{suite, arch, debianPackages, fmt.Sprint(debianClutter())}, "\n")
	return suite + "-" + arch + "-" + strings.TrimPrefix(digestOf([]byte(recipe)), "sha256:")[:12]
}

func debianArch() (string, error) {
	switch runtime.GOARCH {
	case "amd64", "arm64":
		return runtime.GOARCH, nil
	default:
		return "", sandbox.Unsupportedf("no Debian images are made on %s", runtime.GOARCH)
	}
}

// bootstrap runs debootstrap and reads what it made into the tree.
func (b *build) bootstrap(ctx context.Context, suite, arch string) error {
	if err := b.store.canBootstrap(suite); err != nil {
		return err
	}
	b.store.pruneDebs()
	var failures []error
	for _, m := range mirrorsFor(suite, readApt(b.store.cfg.AptDir)) {
		target := filepath.Join(b.work, "root")
		err := b.debootstrap(ctx, bootstrapArgs{suite: suite, arch: arch, target: target, mirror: m})
		if err == nil {
			return b.takeBootstrapped(ctx, target)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("bootstrap %s: %w", suite, context.Cause(ctx))
		}
		err = fmt.Errorf("from %s: %w", m.url, err)
		failures = append(failures, err)
		b.report(Progress{Step: "bootstrap", Message: err.Error()})
		if err := os.RemoveAll(target); err != nil {
			return fmt.Errorf("bootstrap %s: %w", suite, err)
		}
	}
	return fmt.Errorf("bootstrap %s: %w", suite, errors.Join(failures...))
}

func (s *Store) canBootstrap(suite string) error {
	if os.Geteuid() != 0 {
		return sandbox.Deniedf("making a Debian image needs root: debootstrap unpacks and configures packages in a chroot")
	}
	if _, err := s.debootstrapPath(); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(s.tools.scriptDir, suite)); errors.Is(err, fs.ErrNotExist) {
		return sandbox.Invalidf("this machine's debootstrap does not know the suite %q; upgrade it or use another suite", suite)
	}
	return nil
}

// pruneDebs empties the cache of packages when it has grown beyond use.
func (s *Store) pruneDebs() {
	entries, err := os.ReadDir(s.debDir())
	if err != nil {
		return
	}
	total := int64(0)
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			total += info.Size()
		}
	}
	if total < maxDebBytes {
		return
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(s.debDir(), e.Name())); err != nil {
			s.log.Warn("old package stays in the cache", slog.String("name", e.Name()), slog.Any("err", err))
		}
	}
}

// takeBootstrapped reads the tree that debootstrap made.
func (b *build) takeBootstrapped(ctx context.Context, target string) error {
	if err := unmountBelow(target); err != nil {
		return fmt.Errorf("read the bootstrapped tree: %w", err)
	}
	root, err := openRoot(target)
	if err != nil {
		return err
	}
	b.release = append(b.release, root)
	if _, err := b.tree.AddDir(ctx, root); err != nil {
		return fmt.Errorf("read the bootstrapped tree: %w", err)
	}
	for _, dir := range debianClutter() {
		b.tree.Clear(dir)
	}
	return nil
}

// debianClutter is what a bootstrap leaves behind that no sandbox needs.
func debianClutter() []string {
	return []string{
		"/var/cache/apt", "/var/lib/apt/lists", "/var/log/apt", "/var/cache/ldconfig",
		"/var/cache/debconf", "/dev", "/proc", "/sys", "/tmp",
	}
}

// finishDebian makes what debootstrap leaves to the administrator: package sources, locale, pip.
func (b *build) finishDebian(suite string) error {
	attr := tree.Attr{Perm: 0o644, Sec: b.tree.Newest()}
	for _, name := range []string{
		"/var/log/bootstrap.log", "/var/log/dpkg.log", "/var/log/alternatives.log", "/etc/apt/sources.list",
		"/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/var/lib/dpkg/status-old",
		"/var/lib/dpkg/available-old",
	} {
		b.tree.Remove(name)
	}
	for _, dir := range []string{"/var/cache/apt/archives/partial", "/var/lib/apt/lists/partial"} {
		if _, _, err := b.tree.Mkdir(dir, tree.Attr{Perm: 0o755, Sec: attr.Sec}); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"/etc/apt/sources.list.d/debian.sources": debianSources(suite),
		"/etc/default/locale":                    "LANG=C.UTF-8\n",
		// Debian keeps pip from installing next to its own packages; a sandbox is thrown away, and its users expect
		// "pip install" to work.
		"/etc/pip.conf": "[global]\nbreak-system-packages = true\n",
	} {
		if err := b.tree.WriteFile(name, []byte(text), attr); err != nil {
			return err
		}
	}
	b.image.Config = RunConfig{
		Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
	}
	return nil
}

// debianSources is the package sources of the image: those of Debian itself, whatever mirror it was made from.
func debianSources(suite string) string {
	const key = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
	if suite == "sid" || suite == "unstable" {
		return "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: " + suite + "\nComponents: main\n" + key
	}
	return "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: " + suite + " " + suite + "-updates\nComponents: main\n" + key +
		"\nTypes: deb\nURIs: http://deb.debian.org/debian-security\nSuites: " + suite + "-security\nComponents: main\n" + key
}

// newTree begins the names of trees that are still being written to the cache.
const newTree = "new-"

// saveTree keeps the tree for the next build. It is written next to its place, since the cache may be on another file
// system than the store and other stores may use it.
func (b *build) saveTree(ctx context.Context, path string) error {
	b.report(Progress{Step: "bootstrap", Fraction: bootstrapShare, Message: "caching the bootstrapped tree"})
	f, err := os.CreateTemp(filepath.Dir(path), newTree)
	if err != nil {
		return err
	}
	z, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err == nil {
		err = errors.Join(b.tree.WriteTar(ctx, z), z.Close())
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(path))
}

// clearNewTrees removes what interrupted builds left in the cache. A young one may be another store's and stays.
func (s *Store) clearNewTrees() error {
	const young = time.Hour
	left, err := filepath.Glob(filepath.Join(s.debianDir(), newTree+"*"))
	if err != nil {
		return err
	}
	for _, name := range left {
		if info, err := os.Lstat(name); err != nil || time.Since(info.ModTime()) < young {
			continue
		}
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

// loadTree reads a tree that saveTree kept.
func (b *build) loadTree(ctx context.Context, path string) error {
	f, err := os.Open(path) //nolint:gosec // a file of the store's own
	if err != nil {
		return err
	}
	return errors.Join(b.loadTreeFrom(ctx, f), f.Close())
}

func (b *build) loadTreeFrom(ctx context.Context, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	b.report(Progress{Step: "bootstrap", Message: "using the tree bootstrapped on " + info.ModTime().Format(time.DateOnly)})
	plain, closePlain, err := decompress(&countReader{ctx: ctx, r: f, report: func(n int64) {
		b.report(Progress{Step: "bootstrap", Fraction: filledShare * float64(n) / float64(info.Size())})
	}})
	if err != nil {
		return err
	}
	defer closePlain()
	if err := b.tree.ApplyLayer(ctx, plain, b.spool); err != nil {
		return fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return nil
}
