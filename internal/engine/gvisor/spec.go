package gvisor

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	maxOpenFiles = 1 << 20

	// The superblock of an EROFS image and the magic number that it begins with, little-endian.
	erofsSuperOffset = 1024
	erofsMagic       = 0xE0F5E1E2
)

// openImage opens a root file system after a look at its first bytes.
func openImage(id sandbox.ID, path string) (*os.File, error) {
	f, err := os.Open(path) //nolint:gosec // the node chose the path
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, sandbox.Invalidf("sandbox %s: root file system %s does not exist", id, path)
	case err != nil:
		return nil, fmt.Errorf("open root file system of %s: %w", id, err)
	}
	var magic [4]byte
	if _, err := f.ReadAt(magic[:], erofsSuperOffset); err != nil || binary.LittleEndian.Uint32(magic[:]) != erofsMagic {
		_ = f.Close() // opened for reading
		return nil, sandbox.Invalidf("sandbox %s: root file system %s is not an EROFS image", id, path)
	}
	return f, nil
}

// guestCPUs is how many processors a guest sees: parts count as one.
func guestCPUs(milli int64) int64 { return (milli + 999) / 1000 }

// ociSpec is what gVisor runs. The image and the overlay are not in it: they travel as open files.
func ociSpec(s engine.Spec, bundle string) *specs.Spec {
	host := s.Hostname
	if host == "" {
		host = string(s.ID)
	}
	return &specs.Spec{
		Version:  specs.Version,
		Hostname: host,
		Root:     &specs.Root{Path: bundle},
		Process: &specs.Process{
			Args:         s.Args,
			Env:          s.Env,
			Cwd:          "/",
			Capabilities: guestCapabilities(),
			Rlimits: []specs.POSIXRlimit{
				{Type: "RLIMIT_NOFILE", Soft: maxOpenFiles, Hard: maxOpenFiles},
			},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc"},
			{Destination: "/dev", Type: "tmpfs"},
			{Destination: "/dev/pts", Type: "devpts"},
			{Destination: "/dev/shm", Type: "tmpfs", Options: []string{"mode=1777"}},
			{Destination: "/sys", Type: "sysfs"},
			// A mount of a type that gVisor does not know is left out, but keeps it from putting a tmpfs over an
			// empty /tmp, which has to be part of the root so that it counts as disk and is part of snapshots.
			{Destination: "/tmp", Type: "none-tmp"},
		},
		Linux: &specs.Linux{Namespaces: namespaces(s.NetNS)},
	}
}

func namespaces(netns string) []specs.LinuxNamespace {
	out := []specs.LinuxNamespace{
		{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
	}
	return append(out, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: netns}) // no path: a new, empty one
}

// guestCapabilities is everything that gVisor's kernel knows: they count inside the guest alone, where sudo, mount,
// package managers and container engines need them.
func guestCapabilities() *specs.LinuxCapabilities {
	all := []string{
		"CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_CHOWN", "CAP_DAC_OVERRIDE",
		"CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_KILL", "CAP_LEASE",
		"CAP_LINUX_IMMUTABLE", "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE",
		"CAP_NET_BROADCAST", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN",
		"CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_SYS_MODULE", "CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE",
		"CAP_SYS_RAWIO", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_SYSLOG", "CAP_WAKE_ALARM",
	}
	return &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
}

// writeBundle writes what a new sentry reads: config.json, found by gVisor through its name, and boot.json, which it
// returns open.
func writeBundle(bundle string, spec *specs.Spec, b boot) (*os.File, error) {
	raw, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("encode spec: %w", err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, fileMode); err != nil {
		return nil, err
	}
	if raw, err = json.Marshal(b); err != nil {
		return nil, fmt.Errorf("encode boot parameters: %w", err)
	}
	path := filepath.Join(bundle, "boot.json")
	if err := os.WriteFile(path, raw, fileMode); err != nil {
		return nil, err
	}
	return os.Open(path) //nolint:gosec // written above
}
