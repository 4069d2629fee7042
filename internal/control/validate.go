package control

import (
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Limits of what a sandbox carries along.
const (
	maxMetadata      = 128
	maxMetadataKey   = 256
	maxMetadataValue = 4096
	maxMetadataBytes = 32 << 10
	maxEnv           = 512
	maxEnvName       = 256
	maxEnvBytes      = 256 << 10

	minMilliCPU    = 100
	minMemoryBytes = 64 << 20
	minDiskBytes   = 64 << 20
)

func checkMetadata(m map[string]string) error {
	if len(m) > maxMetadata {
		return sandbox.Invalidf("metadata has %d entries: want at most %d", len(m), maxMetadata)
	}
	total := 0
	for k, v := range m {
		switch {
		case k == "":
			return sandbox.Invalidf("metadata has an empty key, with the value %.40q", v)
		case len(k) > maxMetadataKey:
			return sandbox.Invalidf("metadata key %.40q... has %d bytes: want at most %d", k, len(k), maxMetadataKey)
		case len(v) > maxMetadataValue:
			return sandbox.Invalidf("metadata %q: the value has %d bytes: want at most %d", k, len(v), maxMetadataValue)
		}
		total += len(k) + len(v)
	}
	if total > maxMetadataBytes {
		return sandbox.Invalidf("metadata has %d bytes in all: want at most %d", total, maxMetadataBytes)
	}
	return nil
}

func checkEnv(m map[string]string) error {
	if len(m) > maxEnv {
		return sandbox.Invalidf("%d environment variables: want at most %d", len(m), maxEnv)
	}
	total := 0
	for k, v := range m {
		switch {
		case k == "" || len(k) > maxEnvName:
			return sandbox.Invalidf("environment variable %.40q: the name has %d bytes: want 1 to %d", k, len(k), maxEnvName)
		case strings.ContainsAny(k, "=\x00"):
			return sandbox.Invalidf("environment variable %q: a name holds neither '=' nor NUL", k)
		case strings.Contains(v, "\x00"):
			return sandbox.Invalidf("environment variable %q: the value holds a NUL", k)
		}
		total += len(k) + len(v)
	}
	if total > maxEnvBytes {
		return sandbox.Invalidf("the environment has %d bytes in all: want at most %d", total, maxEnvBytes)
	}
	return nil
}

func (l Limits) checkTimeout(d time.Duration, least time.Duration) error {
	if d < least || d > l.MaxTimeout {
		return sandbox.Invalidf("timeout %v: want %d to %d seconds", d, int64(least/time.Second), int64(l.MaxTimeout/time.Second))
	}
	return nil
}

// checkResources refuses what no sandbox can start with; whether a node is large enough is for the scheduler.
func checkResources(r sandbox.Resources) error {
	switch {
	case r.MilliCPU < minMilliCPU:
		return sandbox.Invalidf("%d millicores: want at least %d", r.MilliCPU, minMilliCPU)
	case r.MemoryBytes < minMemoryBytes:
		return sandbox.Invalidf("%d bytes of memory: want at least %d", r.MemoryBytes, minMemoryBytes)
	case r.DiskBytes < minDiskBytes:
		return sandbox.Invalidf("%d bytes of disk: want at least %d", r.DiskBytes, minDiskBytes)
	}
	return nil
}

// orElse returns r with the parts of o where r's are 0.
func orElse(r, o sandbox.Resources) sandbox.Resources {
	setDefault(&r.MilliCPU, o.MilliCPU)
	setDefault(&r.MemoryBytes, o.MemoryBytes)
	setDefault(&r.DiskBytes, o.DiskBytes)
	return r
}
