package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The kernels that Cloister needs and likes: nftables translates addresses for IPv4 and IPv6 in one table since 5.2,
// and processes start inside a cgroup since 5.7.
//
//nolint:gochecknoglobals // constants
var (
	oldestKernel = version{5, 4}
	goodKernel   = version{5, 10}
)

func checkKernel(context.Context, Settings) []Finding {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return []Finding{warn("kernel", fmt.Sprintf("version unknown: %v", err), "check that uname works")}
	}
	return []Finding{judgeKernel(unix.ByteSliceToString(uts.Release[:]), runtime.GOARCH)}
}

func judgeKernel(release, arch string) Finding {
	const check = "kernel"
	v, known := parseVersion(release)
	switch {
	case arch != "amd64" && arch != "arm64":
		return fail(check, "processor architecture "+arch, "use an amd64 or arm64 machine")
	case !known:
		return warn(check, fmt.Sprintf("release %q has no version that can be read", release), fmt.Sprintf("make sure that the kernel is Linux %s or newer", oldestKernel))
	case v.less(oldestKernel):
		return fail(check, "Linux "+release, fmt.Sprintf("install Linux %s or newer: Debian 11, Ubuntu 20.04 and anything later have it", oldestKernel))
	case v.less(goodKernel):
		return warn(check, fmt.Sprintf("Linux %s works, with slower starts", release), fmt.Sprintf("install Linux %s or newer", goodKernel))
	}
	return ok(check, fmt.Sprintf("Linux %s on %s", release, arch))
}

// environmentFacts says what the machine really is.
type environmentFacts struct {
	dockerenv, containerenv bool
	// systemd is what /run/systemd/container says, release the kernel's.
	systemd, release string
	procReadOnly     bool
	// hostPIDs means that processes are numbered as on the machine, root is the root file system's type.
	hostPIDs bool
	root     string
}

// hostPIDNamespace is what the kernel calls the namespace of process ids that the machine starts with.
const hostPIDNamespace = "pid:[4026531836]"

func checkEnvironment(context.Context, Settings) []Finding {
	exists := func(path string) bool {
		_, err := os.Stat(path)
		return err == nil
	}
	pids, _ := os.Readlink("/proc/self/ns/pid") // empty counts as another one
	root := ""
	for _, m := range parseMountinfo(readFile("/proc/self/mountinfo")) {
		if m.point == "/" {
			root = m.kind
		}
	}
	return []Finding{judgeEnvironment(environmentFacts{
		hostPIDs: pids == hostPIDNamespace, root: root,
		dockerenv:    exists("/.dockerenv"),
		containerenv: exists("/run/.containerenv"),
		systemd:      strings.TrimSpace(string(readFile("/run/systemd/container"))),
		release:      string(readFile("/proc/sys/kernel/osrelease")),
		procReadOnly: errors.Is(unix.Access("/proc/sys/net", unix.W_OK), unix.EROFS),
	})}
}

func judgeEnvironment(f environmentFacts) Finding {
	const check = "environment"
	kind := f.systemd
	switch {
	case f.dockerenv:
		kind = "docker"
	case f.containerenv && kind == "":
		kind = "podman"
	case strings.Contains(strings.ToLower(f.release), "microsoft"):
		return warn(check, "Windows Subsystem for Linux", "good for trying it out; limits and restarts follow Windows, so use a real Linux machine for work")
	}
	if f.hostPIDs && f.root != "overlay" {
		kind = "" // a machine whose image was once a container's keeps the marks
	}
	switch {
	case kind != "" && f.procReadOnly:
		return fail(check, fmt.Sprintf("inside a %s container whose kernel settings are read-only", kind), "run on the machine itself, or start the container with --privileged --cgroupns=host --network=host")
	case kind != "":
		return warn(check, fmt.Sprintf("inside a %s container", kind), "run on the machine itself: sandboxes started in a container end with it")
	case f.procReadOnly:
		return fail(check, "kernel settings below /proc/sys/net are read-only", "remount /proc/sys writable, or run outside of the container")
	}
	return ok(check, "a machine of its own")
}

// neededCapabilities is what a node does as root, by number.
//
//nolint:gochecknoglobals // a constant table
var neededCapabilities = []struct {
	bit  uint
	name string
}{
	{unix.CAP_CHOWN, "CAP_CHOWN"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"},
	{unix.CAP_FOWNER, "CAP_FOWNER"},
	{unix.CAP_KILL, "CAP_KILL"},
	{unix.CAP_SETGID, "CAP_SETGID"},
	{unix.CAP_SETUID, "CAP_SETUID"},
	{unix.CAP_SETPCAP, "CAP_SETPCAP"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	{unix.CAP_NET_RAW, "CAP_NET_RAW"},
	{unix.CAP_SYS_CHROOT, "CAP_SYS_CHROOT"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
	{unix.CAP_MKNOD, "CAP_MKNOD"},
}

func checkPrivileges(context.Context, Settings) []Finding {
	effective, known := parseCapabilities(parseStatus(readFile("/proc/self/status"))["CapEff"])
	return []Finding{judgePrivileges(os.Geteuid(), effective, known)}
}

func judgePrivileges(uid int, effective uint64, known bool) Finding {
	const check = "privileges"
	if uid != 0 {
		return fail(check, fmt.Sprintf("running as user %d", uid), "run as root, for example with sudo")
	}
	if !known {
		return warn(check, "root, with capabilities that cannot be read", "make sure that /proc is mounted")
	}
	var missing []string
	for _, c := range neededCapabilities {
		if effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fail(check, "root without "+strings.Join(missing, ", "), "give the service or container these capabilities (systemd: CapabilityBoundingSet=, Docker: --privileged)")
	}
	return ok(check, "root with all capabilities that are needed")
}

// namespaceFacts says what became of a process in new namespaces.
type namespaceFacts struct {
	err error
	// limit is user.max_user_namespaces, -1 when unknown.
	limit int64
}

func checkNamespaces(ctx context.Context, _ Settings) []Finding {
	limit, known := readNumber("/proc/sys/user/max_user_namespaces")
	if !known {
		limit = -1
	}
	cmd := exec.CommandContext(ctx, "true")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 65534, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 65534, Size: 1}},
	}
	return []Finding{judgeNamespaces(namespaceFacts{err: cmd.Run(), limit: limit})}
}

func judgeNamespaces(f namespaceFacts) Finding {
	const check = "namespaces"
	switch {
	case f.err == nil:
		return ok(check, "user, mount, pid, network, ipc and uts namespaces can be made")
	case f.limit == 0:
		return fail(check, "user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=65536")
	case errors.Is(f.err, unix.ENOSPC):
		return fail(check, fmt.Sprintf("the limit of namespaces is reached: %v", f.err), "raise user.max_user_namespaces and user.max_net_namespaces with sysctl")
	}
	return fail(check, fmt.Sprintf("no process can be started in new namespaces: %v", f.err),
		"use a kernel with namespaces, and check that no seccomp or AppArmor profile forbids them (sysctl kernel.apparmor_restrict_unprivileged_userns)")
}

// engineFacts says whether the parts of the kernel are there that run the guests' system calls.
type engineFacts struct {
	traceErr, memfdErr error
	// actions is /proc/sys/kernel/seccomp/actions_avail.
	actions string
	// ptraceScope and overcommit are settings, -1 when unknown.
	ptraceScope, overcommit int64
}

func checkEngine(ctx context.Context, _ Settings) []Finding {
	f := engineFacts{
		traceErr: tryTrace(ctx), memfdErr: tryMemfd(), ptraceScope: -1, overcommit: -1,
		actions: string(bytes.TrimSpace(readFile("/proc/sys/kernel/seccomp/actions_avail"))),
	}
	if n, known := readNumber("/proc/sys/kernel/yama/ptrace_scope"); known {
		f.ptraceScope = n
	}
	if n, known := readNumber("/proc/sys/vm/overcommit_memory"); known {
		f.overcommit = n
	}
	return judgeEngine(f)
}

// tryTrace starts a traced process and lets it go.
func tryTrace(ctx context.Context) error {
	runtime.LockOSThread() // a traced process belongs to the thread that started it
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, "true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	var status unix.WaitStatus
	_, err := unix.Wait4(cmd.Process.Pid, &status, 0, nil)
	if err == nil && status.Stopped() {
		err = unix.PtraceDetach(cmd.Process.Pid)
	}
	return errors.Join(err, cmd.Wait())
}

func tryMemfd() error {
	fd, err := unix.MemfdCreate("cloister-preflight", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func judgeEngine(f engineFacts) []Finding {
	trace := ok("ptrace", "processes can be traced")
	switch {
	case f.traceErr != nil && f.ptraceScope == 3:
		trace = fail("ptrace", "kernel.yama.ptrace_scope is 3: nobody may trace processes", "set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d and restart the machine, since 3 is final until then")
	case f.traceErr != nil:
		trace = fail("ptrace", fmt.Sprintf("a process cannot be traced: %v", f.traceErr), "allow ptrace: CAP_SYS_PTRACE, and no seccomp profile that forbids it")
	}
	seccomp := ok("seccomp", "filters with all actions that are needed")
	if !strings.Contains(f.actions, "trap") || !strings.Contains(f.actions, "allow") {
		seccomp = fail("seccomp", fmt.Sprintf("available actions: %q", f.actions), "use a kernel with CONFIG_SECCOMP_FILTER")
	}
	memory := ok("memory files", "memfd works")
	if f.memfdErr != nil {
		memory = fail("memory files", fmt.Sprintf("memfd_create: %v", f.memfdErr), "set vm.memfd_noexec to 1 or 0 with sysctl, and use a kernel with CONFIG_MEMFD_CREATE")
	} else if f.overcommit == 2 {
		memory = warn("memory files", "vm.overcommit_memory is 2: reserving address space can fail", "sysctl -w vm.overcommit_memory=0")
	}
	return []Finding{trace, seccomp, memory}
}
