package cgroup2_test

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const kernelPackage = "linux-image-cloud-amd64"

// kernel is what a Debian package of a kernel holds.
type kernel struct {
	image   string
	modules map[string]string // from their names to their files
}

// findKernel returns Debian's kernel for virtual machines. It is unpacked into the user's cache, and never installed: that
// would change how this machine starts.
func findKernel(t *testing.T) kernel {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "cloister", "kernel")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		download(t, dir)
	}
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		t.Fatalf("kernels in %s: %v, %v; want one: remove the directory to have it made again", dir, images, err)
	}
	k := kernel{image: images[0], modules: map[string]string{}}
	err = filepath.WalkDir(filepath.Join(dir, "lib", "modules"), func(path string, _ fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			k.modules[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// download makes dir out of the newest kernel package, whole or not at all.
func download(t *testing.T, dir string) {
	t.Helper()
	work, err := os.MkdirTemp(mkdir(t, filepath.Dir(dir)), ".kernel-") //nolint:usetesting // on the disk of dir
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(work) }() // it is nobody's
	name := ""
	for line := range strings.Lines(output(t, work, "apt-cache", "depends", "--important", kernelPackage)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(v, "linux-image-") {
			name = v
		}
	}
	if name == "" {
		t.Fatalf("no package %s: this test needs Debian's kernel; run apt-get update on a Debian machine", kernelPackage)
	}
	output(t, work, "apt-get", "-qq", "download", name)
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		t.Fatalf("apt-get download %s: got %v, %v; want one file", name, debs, err)
	}
	root := filepath.Join(work, "root")
	output(t, work, "dpkg-deb", "-x", debs[0], root)
	if err := os.Rename(root, dir); err != nil {
		t.Fatal(err)
	}
}

// order returns the files of the named modules and of those that they need, each after those that it needs. What is no
// module of the package is taken to be part of the kernel.
func (k kernel) order(names ...string) ([]string, error) {
	var out []string
	for _, name := range names {
		file, ok := k.modules[name]
		if !ok {
			continue
		}
		needs, err := requirements(file)
		if err != nil {
			return nil, err
		}
		first, err := k.order(needs...)
		if err != nil {
			return nil, err
		}
		for _, f := range append(first, file) {
			if !slices.Contains(out, f) {
				out = append(out, f)
			}
		}
	}
	return out, nil
}

// requirements returns the names of the modules that a module says it depends on.
func requirements(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // opened for reading
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("%s: no module information", file)
	}
	raw, err := s.Data()
	if err != nil {
		return nil, err
	}
	for v := range strings.SplitSeq(string(raw), "\x00") {
		if list, ok := strings.CutPrefix(v, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}

func mkdir(t *testing.T, dir string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// output runs a program in dir and returns what it prints.
func output(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "LC_ALL=C")
	var says strings.Builder
	cmd.Stderr = &says
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v: %s%s", name, strings.Join(args, " "), err, out, says.String())
	}
	return string(out)
}
