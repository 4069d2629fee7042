package install

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestPreflight runs everything on the machine that the tests run on, whatever that is.
func TestPreflight(t *testing.T) {
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	dir := t.TempDir()
	findings := Preflight(t.Context(), Settings{
		DataDir:   filepath.Join(dir, "not", "there", "yet"),
		Listeners: []Listener{{"api-addr", "127.0.0.1:0"}, {"proxy-addr", ln.Addr().String()}},
		Range:     netip.MustParsePrefix("10.199.0.0/16"),
		Overlaps:  func() ([]Overlap, error) { return nil, nil },
		Resolvers: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("192.0.2.53")} },
	})
	seen := make(map[string]bool)
	for _, f := range findings {
		t.Logf("%-4s %s: %s [%s]", f.Level, f.Check, f.Detail, f.Remedy)
		seen[f.Check] = true
		if f.Check == "" || f.Detail == "" || (f.Level != LevelOK && f.Remedy == "") {
			t.Errorf("finding is not complete: %+v", f)
		}
	}
	for _, check := range []string{"kernel", "cgroups", "nftables", "namespaces", "disk space", "address range", "address api-addr", "clock"} {
		if !seen[check] {
			t.Errorf("no finding of check %q", check)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("the checks left %v", left)
	}
}

func TestPreflightStopsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := Preflight(ctx, Settings{}); len(got) != 0 {
		t.Errorf("%d findings after the end of the context", len(got))
	}
}

func TestFindHolder(t *testing.T) {
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	got := findHolder(port)
	if got.pid != os.Getpid() || !got.ours || got.name == "" {
		t.Errorf("holder of port %s: %+v, want this process, %d", port, got, os.Getpid())
	}
	if got := findHolder("1"); got.pid != 0 {
		t.Errorf("holder of a free port: %+v", got)
	}
}

func TestFindingAsJSON(t *testing.T) {
	got, err := json.Marshal(warn("a", "b", "c"))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"check":"a","level":"warn","detail":"b","remedy":"c"}`; string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestWorst(t *testing.T) {
	for _, tc := range []struct {
		in   []Finding
		want Level
	}{
		{nil, LevelOK},
		{[]Finding{ok("a", "b"), warn("a", "b", "c")}, LevelWarn},
		{[]Finding{fail("a", "b", "c"), warn("a", "b", "c")}, LevelFail},
	} {
		if got := Worst(tc.in); got != tc.want {
			t.Errorf("worst of %v: %s, want %s", tc.in, got, tc.want)
		}
	}
}

// want is a finding without its whole text.
type want struct {
	level Level
	text  string // part of detail or remedy
}

func checkFinding(t *testing.T, name string, got Finding, w want) {
	t.Helper()
	if got.Level != w.level || !strings.Contains(got.Detail+" | "+got.Remedy, w.text) {
		t.Errorf("%s: %+v, want level %s and %q", name, got, w.level, w.text)
	}
	if got.Level != LevelOK && got.Remedy == "" {
		t.Errorf("%s: no remedy: %+v", name, got)
	}
}

func TestJudgeKernel(t *testing.T) {
	for _, tc := range []struct {
		release, arch string
		want          want
	}{
		{"6.1.0-13-amd64", "amd64", want{LevelOK, "6.1.0"}},
		{"5.4.0-150-generic", "arm64", want{LevelWarn, "5.10"}},
		{"4.18.0-553.el8", "amd64", want{LevelFail, "5.4"}},
		{"6.1.0", "riscv64", want{LevelFail, "amd64"}},
		{"strange", "amd64", want{LevelWarn, "strange"}},
	} {
		checkFinding(t, tc.release, judgeKernel(tc.release, tc.arch), tc.want)
	}
}

func TestJudgeMachine(t *testing.T) {
	all := uint64(1)<<41 - 1
	for name, tc := range map[string]struct {
		got  Finding
		want want
	}{
		"machine":                {judgeEnvironment(environmentFacts{release: "6.1.0"}), want{LevelOK, "own"}},
		"docker, privileged":     {judgeEnvironment(environmentFacts{dockerenv: true}), want{LevelWarn, "docker"}},
		"docker":                 {judgeEnvironment(environmentFacts{dockerenv: true, procReadOnly: true}), want{LevelFail, "--privileged"}},
		"was a container":        {judgeEnvironment(environmentFacts{dockerenv: true, hostPIDs: true, root: "ext4"}), want{LevelOK, "own"}},
		"container, --pid=host":  {judgeEnvironment(environmentFacts{dockerenv: true, hostPIDs: true, root: "overlay"}), want{LevelWarn, "docker"}},
		"podman":                 {judgeEnvironment(environmentFacts{containerenv: true}), want{LevelWarn, "podman"}},
		"nspawn":                 {judgeEnvironment(environmentFacts{systemd: "systemd-nspawn"}), want{LevelWarn, "nspawn"}},
		"wsl":                    {judgeEnvironment(environmentFacts{release: "5.15-microsoft-standard-WSL2"}), want{LevelWarn, "Windows"}},
		"root":                   {judgePrivileges(0, all, true), want{LevelOK, "root"}},
		"user":                   {judgePrivileges(1000, 0, true), want{LevelFail, "1000"}},
		"root without net admin": {judgePrivileges(0, all&^(1<<unix.CAP_NET_ADMIN), true), want{LevelFail, "CAP_NET_ADMIN"}},
		"capabilities unknown":   {judgePrivileges(0, 0, false), want{LevelWarn, "/proc"}},
		"namespaces":             {judgeNamespaces(namespaceFacts{limit: 100}), want{LevelOK, "user"}},
		"user namespaces off":    {judgeNamespaces(namespaceFacts{err: unix.ENOSPC, limit: 0}), want{LevelFail, "max_user_namespaces=65536"}},
		"namespaces used up":     {judgeNamespaces(namespaceFacts{err: unix.ENOSPC, limit: 10}), want{LevelFail, "limit"}},
		"namespaces forbidden":   {judgeNamespaces(namespaceFacts{err: unix.EPERM, limit: 10}), want{LevelFail, "AppArmor"}},
		"memory":                 {judgeMemory(memoryFacts{16 << 30, 8 << 30}), want{LevelOK, "8.0 GiB"}},
		"little memory":          {judgeMemory(memoryFacts{2 << 30, 1 << 30}), want{LevelWarn, "2 GiB"}},
		"no memory":              {judgeMemory(memoryFacts{1 << 30, 100 << 20}), want{LevelFail, "100.0 MiB"}},
		"memory unknown":         {judgeMemory(memoryFacts{}), want{LevelWarn, "/proc"}},
		"clock":                  {judgeClock(0, nil), want{LevelOK, "synchronised"}},
		"clock alone":            {judgeClock(clockUnsynchronised, nil), want{LevelOK, "chrony"}},
		"clock unknown":          {judgeClock(0, unix.EPERM), want{LevelOK, "unknown"}},
		"tools":                  {judgeTools(true), want{LevelOK, "installed"}},
		"no tools":               {judgeTools(false), want{LevelWarn, "apt-get install -y debootstrap"}},
		"device":                 {judgeDevice("/dev/kvm", nil), want{LevelOK, "present"}},
		"no device":              {judgeDevice("/dev/kvm", unix.ENOENT), want{LevelOK, "absent"}},
		"forbidden device":       {judgeDevice("/dev/kvm", unix.EACCES), want{LevelOK, "not usable"}},
	} {
		checkFinding(t, name, tc.got, tc.want)
	}
}

func TestJudgeEngine(t *testing.T) {
	good := engineFacts{actions: "kill_process trap errno allow", ptraceScope: 1}
	for name, tc := range map[string]struct {
		change func(*engineFacts)
		check  int
		want   want
	}{
		"good trace":   {func(*engineFacts) {}, 0, want{LevelOK, "traced"}},
		"good seccomp": {func(*engineFacts) {}, 1, want{LevelOK, "actions"}},
		"good memory":  {func(*engineFacts) {}, 2, want{LevelOK, "memfd"}},
		"no trace":     {func(f *engineFacts) { f.traceErr = unix.EPERM }, 0, want{LevelFail, "CAP_SYS_PTRACE"}},
		"yama 3":       {func(f *engineFacts) { f.traceErr, f.ptraceScope = unix.EPERM, 3 }, 0, want{LevelFail, "restart"}},
		"no seccomp":   {func(f *engineFacts) { f.actions = "" }, 1, want{LevelFail, "CONFIG_SECCOMP_FILTER"}},
		"no memfd":     {func(f *engineFacts) { f.memfdErr = unix.EACCES }, 2, want{LevelFail, "memfd_noexec"}},
		"overcommit":   {func(f *engineFacts) { f.overcommit = 2 }, 2, want{LevelWarn, "overcommit_memory=0"}},
	} {
		f := good
		tc.change(&f)
		checkFinding(t, name, judgeEngine(f)[tc.check], tc.want)
	}
}

func TestJudgeCgroups(t *testing.T) {
	all := []string{"cpu", "memory", "pids"}
	for name, tc := range map[string]struct {
		facts cgroupFacts
		want  want
	}{
		"v2":             {cgroupFacts{v2: append([]string{"io"}, all...), quota: true}, want{LevelOK, "v2"}},
		"v1":             {cgroupFacts{v1: all, quota: true}, want{LevelOK, "v1"}},
		"v1, empty v2":   {cgroupFacts{v1: all, v2: nil, quota: true}, want{LevelOK, "v1"}},
		"hybrid":         {cgroupFacts{v1: all, v2: []string{"io"}, quota: true}, want{LevelOK, "hybrid, controllers of v1"}},
		"none":           {cgroupFacts{}, want{LevelFail, "mount -t cgroup2"}},
		"no memory":      {cgroupFacts{v2: []string{"cpu", "pids"}, quota: true}, want{LevelFail, "cgroup_enable=memory"}},
		"no cpu, pids":   {cgroupFacts{v2: []string{"memory"}, quota: true}, want{LevelFail, "+cpu +pids"}},
		"read-only":      {cgroupFacts{v2: all, readOnly: "/sys/fs/cgroup", quota: true}, want{LevelFail, "--cgroupns=host"}},
		"v1, no quota":   {cgroupFacts{v1: all}, want{LevelWarn, "CONFIG_CFS_BANDWIDTH"}},
		"v1, not memory": {cgroupFacts{v1: []string{"cpu", "pids"}, quota: true}, want{LevelFail, "memory"}},
	} {
		checkFinding(t, name, judgeCgroups(tc.facts), tc.want)
	}
}

func TestJudgeLimits(t *testing.T) {
	roomy := limitFacts{
		openFiles: 1 << 20, processes: -1, pidMax: 1 << 22, threadsMax: 1 << 20, fileMax: 1 << 40,
		inotifyInstances: 128, inotifyWatches: 65536, conntrackMax: 262144, conntrack: 10, mapCount: 65530,
	}
	for _, f := range judgeLimits(roomy, 1000) {
		checkFinding(t, "roomy", f, want{LevelOK, ""})
	}
	for name, tc := range map[string]struct {
		change func(*limitFacts)
		check  string
		want   want
	}{
		"files":          {func(f *limitFacts) { f.openFiles = 4096 }, "open files", want{LevelWarn, "LimitNOFILE=1048576"}},
		"pids":           {func(f *limitFacts) { f.pidMax = 32768 }, "process ids", want{LevelWarn, "kernel.pid_max=4194304"}},
		"threads":        {func(f *limitFacts) { f.threadsMax = 10000 }, "threads", want{LevelWarn, "60-cloister-threads-max.conf"}},
		"processes":      {func(f *limitFacts) { f.processes = 1000 }, "processes per user", want{LevelWarn, "LimitNPROC"}},
		"tracking":       {func(f *limitFacts) { f.conntrackMax = 8192 }, "connection tracking", want{LevelWarn, "=262144"}},
		"tracking full":  {func(f *limitFacts) { f.conntrack = 250000 }, "connection tracking", want{LevelWarn, "=1048576"}},
		"tracking later": {func(f *limitFacts) { f.conntrackMax = -1 }, "connection tracking", want{LevelOK, "first sandbox"}},
	} {
		facts := roomy
		tc.change(&facts)
		for _, f := range judgeLimits(facts, 1000) {
			if f.Check == tc.check {
				checkFinding(t, name, f, tc.want)
			} else if f.Level != LevelOK {
				t.Errorf("%s: also %+v", name, f)
			}
		}
	}
}

func TestJudgeDisk(t *testing.T) {
	good := diskFacts{dir: "/var/lib", kind: "xfs", free: 100 << 30, total: 200 << 30, freeInodes: -1, fsync: time.Millisecond}
	for name, tc := range map[string]struct {
		change func(*diskFacts)
		check  string
		want   want
	}{
		"good":          {func(*diskFacts) {}, "disk space", want{LevelOK, "100.0 GiB free of 200.0 GiB"}},
		"small":         {func(f *diskFacts) { f.free = 5 << 30 }, "disk space", want{LevelWarn, "5.0 GiB"}},
		"full":          {func(f *diskFacts) { f.free = 1 << 30 }, "disk space", want{LevelFail, "--data-dir"}},
		"no inodes":     {func(f *diskFacts) { f.freeInodes = 5 }, "disk space", want{LevelFail, "5 more files"}},
		"no nameless":   {func(f *diskFacts) { f.nameless = unix.EOPNOTSUPP }, "file system", want{LevelFail, "O_TMPFILE"}},
		"memory":        {func(f *diskFacts) { f.kind = "tmpfs" }, "file system", want{LevelWarn, "memory"}},
		"network":       {func(f *diskFacts) { f.kind = "nfs" }, "file system", want{LevelFail, "local disk"}},
		"container":     {func(f *diskFacts) { f.kind = "overlay" }, "file system", want{LevelWarn, "volume"}},
		"slow":          {func(f *diskFacts) { f.fsync = 25 * time.Millisecond }, "disk latency", want{LevelWarn, "25ms"}},
		"broken":        {func(f *diskFacts) { f.fsyncErr = unix.EIO }, "disk latency", want{LevelFail, "input/output"}},
		"read-only":     {func(f *diskFacts) { f.readOnly, f.err = true, unix.EROFS }, "disk", want{LevelFail, "read-only"}},
		"no permission": {func(f *diskFacts) { f.err = unix.EACCES }, "disk", want{LevelFail, "/data cannot be used"}},
	} {
		facts := good
		tc.change(&facts)
		found := false
		for _, f := range judgeDisk("/data", facts) {
			if f.Check == tc.check {
				found = true
				checkFinding(t, name, f, tc.want)
			}
		}
		if !found {
			t.Errorf("%s: no finding of check %q", name, tc.check)
		}
	}
}

func TestNearestDir(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := nearestDir(filepath.Join(dir, "a", "b")); got != dir || err != nil {
		t.Errorf("parent of what is missing: %s, %v, want %s", got, err, dir)
	}
	if _, err := nearestDir(file); err == nil {
		t.Error("a file counts as a directory")
	}
	if _, err := nearestDir(filepath.Join(file, "below")); err == nil {
		t.Error("a file counts as a parent directory")
	}
}

func TestJudgeNetwork(t *testing.T) {
	busy := holder{pid: 42, name: "nginx"}
	api := Listener{"api-addr", "127.0.0.1:3000"}
	guests := netip.MustParsePrefix("10.64.0.0/16")
	for name, tc := range map[string]struct {
		got  Finding
		want want
	}{
		"works":           {judgeNetwork(networkFacts{})[1], want{LevelOK, "work"}},
		"no veth":         {judgeNetwork(networkFacts{link: unix.EOPNOTSUPP})[0], want{LevelFail, "modprobe veth"}},
		"no nftables":     {judgeNetwork(networkFacts{table: unix.ENOENT})[1], want{LevelFail, "nft_fib_inet"}},
		"no namespace":    {judgeNetwork(networkFacts{space: unix.EPERM})[0], want{LevelFail, "root"}},
		"forwarding":      {judgeForwarding(1, true, true), want{LevelOK, "on"}},
		"forwarding off":  {judgeForwarding(0, true, true), want{LevelOK, "switches"}},
		"forwarding not":  {judgeForwarding(0, true, false), want{LevelFail, "sysctl -w"}},
		"free port":       {judgeListener(api, listenerFacts{}), want{LevelOK, "free"}},
		"held port":       {judgeListener(api, listenerFacts{unix.EADDRINUSE, busy}), want{LevelFail, "process 42 (nginx)"}},
		"own port":        {judgeListener(api, listenerFacts{unix.EADDRINUSE, holder{7, "cloister", true}}), want{LevelOK, "itself, process 7"}},
		"unknown holder":  {judgeListener(api, listenerFacts{err: unix.EADDRINUSE}), want{LevelFail, "--api-addr"}},
		"foreign address": {judgeListener(api, listenerFacts{err: unix.EADDRNOTAVAIL}), want{LevelFail, "no address of this machine"}},
		"low port":        {judgeListener(api, listenerFacts{err: unix.EACCES}), want{LevelFail, "1023"}},
		"no address":      {judgeListener(api, listenerFacts{err: &net.AddrError{Err: "missing port"}}), want{LevelFail, "host:port"}},
		"other trouble":   {judgeListener(api, listenerFacts{err: errors.New("odd")}), want{LevelFail, "odd"}},
		"range":           {judgeRange(guests, nil, nil)[0], want{LevelOK, "10.64.0.0/16"}},
		"range taken":     {judgeRange(guests, []Overlap{{"interface", "docker0 overlaps", "choose"}}, nil)[0], want{LevelFail, "docker0"}},
		"route":           {judgeRange(guests, []Overlap{{"route", "10.0.0.0/8 overlaps", "choose"}}, nil)[0], want{LevelWarn, "choose"}},
		"range unknown":   {judgeRange(guests, nil, unix.EPERM)[0], want{LevelWarn, "root"}},
		"resolvers":       {judgeResolvers([]netip.Addr{netip.MustParseAddr("1.1.1.1")}), want{LevelOK, "1.1.1.1"}},
		"no resolvers":    {judgeResolvers(nil), want{LevelWarn, "name servers"}},
	} {
		checkFinding(t, name, tc.got, tc.want)
	}
}

func TestJudgeFirewalls(t *testing.T) {
	guests := netip.MustParsePrefix("10.64.0.0/16")
	for name, tc := range map[string]struct {
		wall firewall
		want want
	}{
		"accepting":    {firewall{table: "filter"}, want{LevelOK, "no other"}},
		"docker":       {firewall{table: "filter", drops: true, chains: []string{"FORWARD", "DOCKER-USER"}}, want{LevelWarn, "iptables -I DOCKER-USER -i clo+ -j ACCEPT"}},
		"docker, told": {firewall{table: "filter", drops: true, chains: []string{"DOCKER-USER"}, admits: true}, want{LevelOK, "no other"}},
		"ufw":          {firewall{table: "filter", drops: true, chains: []string{"ufw-before-forward"}}, want{LevelWarn, "ufw route allow in on clo+"}},
		"firewalld":    {firewall{table: "firewalld", drops: true}, want{LevelWarn, "--add-interface=clo+"}},
		"legacy":       {firewall{table: "filter", drops: true, legacy: true}, want{LevelWarn, "iptables-legacy -I FORWARD"}},
		"own":          {firewall{table: "mine", drops: true}, want{LevelWarn, `iifname "clo*"`}},
	} {
		checkFinding(t, name, judgeFirewalls([]firewall{tc.wall}, guests, nil)[0], tc.want)
	}
	checkFinding(t, "unknown", judgeFirewalls(nil, guests, unix.EPERM)[0], want{LevelWarn, "root"})
}

func TestParseLegacy(t *testing.T) {
	const plain = "-P INPUT ACCEPT\n-P FORWARD DROP\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n"
	got := parseLegacy(plain)
	if diff := cmp.Diff(firewall{table: "filter", legacy: true, drops: true, chains: []string{"DOCKER-USER"}}, got, cmp.AllowUnexported(firewall{})); diff != "" {
		t.Error(diff)
	}
	if !parseLegacy(plain + "-A DOCKER-USER -i clo+ -j ACCEPT\n").admits {
		t.Error("the rule that admits guests is not recognised")
	}
}

func TestPlannedSandboxes(t *testing.T) {
	for total, want := range map[int64]int{0: 1, 2 << 30: 64, 24 << 30: 768, 1 << 40: 1000} {
		if got := plannedSandboxes(memoryFacts{total: total}); got != want {
			t.Errorf("%s: %s, want %d", size(total), strconv.Itoa(got), want)
		}
	}
}
