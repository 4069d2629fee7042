package install

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseVersion(t *testing.T) {
	for in, want := range map[string]version{
		"6.18.44-fc": {6, 18}, "5.4": {5, 4}, "4.19.0+\n": {4, 19}, "6.1-rc1": {6, 1},
	} {
		if got, known := parseVersion(in); got != want || !known {
			t.Errorf("%q: %v, %v, want %v", in, got, known, want)
		}
	}
	for _, in := range []string{"", "6", "6.", "x.y", "-1.2", "6.x"} {
		if got, known := parseVersion(in); known {
			t.Errorf("%q: %v, want none", in, got)
		}
	}
}

func TestParseMeminfo(t *testing.T) {
	got := parseMeminfo([]byte("MemTotal:       2048 kB\nHugePages_Total:       3\nbroken\nBad: x kB\nHuge: 99999999999999999999 kB\nNegative: -5 kB\n"))
	if diff := cmp.Diff(map[string]int64{"MemTotal": 2 << 20, "HugePages_Total": 3}, got); diff != "" {
		t.Error(diff)
	}
}

func TestParseMountinfo(t *testing.T) {
	const text = "24 30 0:22 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup none rw,cpu,cpuacct\n" +
		"25 30 0:23 / /mnt/a\\040b ro - ext4 /dev/vda ro\n" +
		"broken line\n26 30 0:24 / /x rw - \n"
	want := []mount{
		{"/sys/fs/cgroup/cpu", "cgroup", []string{"rw", "relatime", "rw", "cpu", "cpuacct"}},
		{"/mnt/a b", "ext4", []string{"ro", "ro"}},
	}
	if diff := cmp.Diff(want, parseMountinfo([]byte(text)), cmp.AllowUnexported(mount{})); diff != "" {
		t.Error(diff)
	}
}

func TestParseSockets(t *testing.T) {
	const text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n" +
		"   0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n" +
		"   1: 0100007F:0BB9 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n" +
		"   2: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 4713 1 0\n" +
		"   3: zz:0016 0:0 0A 0:0 0:0 0 0 0 4714 1 0\n"
	want := []socket{
		{netip.MustParseAddrPort("127.0.0.1:3000"), 4711},
		{netip.MustParseAddrPort("[::1]:22"), 4713},
	}
	if diff := cmp.Diff(want, parseSockets([]byte(text)), cmp.AllowUnexported(socket{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func FuzzParsers(f *testing.F) {
	f.Add([]byte("MemTotal: 1 kB\n6.1\n"))
	f.Add([]byte("24 30 0:22 / /a\\040\\999 rw - cgroup none rw,cpu\n"))
	f.Add([]byte("0: 0100007F:0BB8 0:0 0A 0:0 0:0 0 0 0 4711 1 0\n"))
	f.Add([]byte("-P FORWARD DROP\n-N x\n-A x -i clo+ -j ACCEPT\n"))
	f.Add([]byte("CapEff:\t000001ffffffffff\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for name, n := range parseMeminfo(data) {
			if n < 0 {
				t.Errorf("%q is %d bytes", name, n)
			}
		}
		if v, known := parseVersion(string(data)); known && (v.major < 0 || v.minor < 0) {
			t.Errorf("version %v", v)
		}
		for _, m := range parseMountinfo(data) {
			if m.kind == "" {
				t.Errorf("mount without a kind: %+v", m)
			}
		}
		for _, s := range parseSockets(data) {
			if !s.addr.Addr().IsValid() {
				t.Errorf("socket without an address: %+v", s)
			}
		}
		parseCapabilities(parseStatus(data)["CapEff"])
		parseNumber(data)
		parseLegacy(string(data))
	})
}
