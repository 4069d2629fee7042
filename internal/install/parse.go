package install

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// readLimit bounds what is read of one file of /proc.
const readLimit = 8 << 20

// readFile returns at most readLimit bytes of a file; nil when it cannot be read.
func readFile(path string) []byte {
	data, err := os.ReadFile(path) //nolint:gosec // fixed paths of /proc, /sys and /etc
	if err != nil {
		return nil
	}
	return data[:min(len(data), readLimit)]
}

// readNumber reads a file that holds one number; ok is false when it does not.
func readNumber(path string) (int64, bool) { return parseNumber(readFile(path)) }

func parseNumber(data []byte) (int64, bool) {
	fields := bytes.Fields(data)
	if len(fields) == 0 {
		return 0, false
	}
	n, err := strconv.ParseInt(string(fields[0]), 10, 64)
	return n, err == nil
}

// version is a kernel's, without what vendors append.
type version struct{ major, minor int }

func (v version) less(o version) bool {
	return v.major < o.major || (v.major == o.major && v.minor < o.minor)
}

func (v version) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

// parseVersion reads the start of a kernel release such as "6.1.0-13-amd64".
func parseVersion(release string) (version, bool) {
	head, rest, dotted := strings.Cut(strings.TrimSpace(release), ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end >= 0 {
		rest = rest[:end]
	}
	major, err1 := strconv.ParseUint(head, 10, 16)
	minor, err2 := strconv.ParseUint(rest, 10, 16)
	return version{int(major), int(minor)}, dotted && err1 == nil && err2 == nil
}

// parseMeminfo returns the values of /proc/meminfo in bytes.
func parseMeminfo(data []byte) map[string]int64 {
	out := make(map[string]int64)
	for line := range bytes.Lines(data) {
		name, rest, found := strings.Cut(string(line), ":")
		fields := strings.Fields(rest)
		if !found || len(fields) == 0 {
			continue
		}
		n, err := strconv.ParseInt(fields[0], 10, 64)
		if err != nil || n < 0 || n > 1<<52 {
			continue
		}
		if len(fields) > 1 && fields[1] == "kB" {
			n *= 1024
		}
		out[name] = n
	}
	return out
}

// parseStatus returns the fields of /proc/self/status.
func parseStatus(data []byte) map[string]string {
	out := make(map[string]string)
	for line := range bytes.Lines(data) {
		if name, value, found := strings.Cut(string(line), ":"); found {
			out[name] = strings.TrimSpace(value)
		}
	}
	return out
}

// parseCapabilities reads a set of capabilities as /proc/self/status writes it.
func parseCapabilities(text string) (uint64, bool) {
	n, err := strconv.ParseUint(text, 16, 64)
	return n, err == nil
}

// mount is one line of /proc/self/mountinfo.
type mount struct {
	point, kind string
	// options are the mount's own and its file system's.
	options []string
}

func (m mount) has(option string) bool { return slices.Contains(m.options, option) }

func parseMountinfo(data []byte) []mount {
	var out []mount
	for line := range bytes.Lines(data) {
		before, after, found := strings.Cut(strings.TrimSuffix(string(line), "\n"), " - ")
		own, fs := strings.Fields(before), strings.Fields(after)
		if !found || len(own) < 6 || len(fs) < 1 {
			continue
		}
		m := mount{point: unescape(own[4]), kind: fs[0], options: strings.Split(own[5], ",")}
		if len(fs) > 2 {
			m.options = append(m.options, strings.Split(fs[2], ",")...)
		}
		out = append(out, m)
	}
	return out
}

// unescape undoes the kernel's \040 for a space and its like.
func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// socket is a listening TCP socket of /proc/net/tcp or tcp6.
type socket struct {
	addr  netip.AddrPort
	inode uint64
}

// listening is the state of a listening socket in /proc/net/tcp.
const listening = "0A"

func parseSockets(data []byte) []socket {
	var out []socket
	for line := range bytes.Lines(data) {
		f := strings.Fields(string(line))
		if len(f) < 10 || f[3] != listening {
			continue
		}
		addr, known := parseSocketAddr(f[1])
		inode, err := strconv.ParseUint(f[9], 10, 64)
		if known && err == nil {
			out = append(out, socket{addr, inode})
		}
	}
	return out
}

// parseSocketAddr reads "0100007F:0BB8": 32-bit words in the machine's byte order, then the port.
func parseSocketAddr(s string) (netip.AddrPort, bool) {
	host, port, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	n, err2 := strconv.ParseUint(port, 16, 16)
	if err != nil || err2 != nil || (len(raw) != 4 && len(raw) != 16) {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.BigEndian.PutUint32(raw[i:], binary.NativeEndian.Uint32(raw[i:]))
	}
	a, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), true
}

// size writes bytes for people.
func size(n int64) string {
	for _, unit := range []struct {
		bytes int64
		name  string
	}{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= unit.bytes {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(unit.bytes), unit.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// lastPart returns what follows the last dot.
func lastPart(name string) string { return name[strings.LastIndexByte(name, '.')+1:] }
