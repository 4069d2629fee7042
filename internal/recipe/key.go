package recipe

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"maps"
	"slices"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// keyVersion is part of every key: a change of what a step does changes it, and so forgets every result.
const keyVersion = "cloister step 1"

// Keys names the result of each step: what the root file system is after it, given the digest of the image that the steps
// begin with. A step's key depends on all that came before, so that a change invalidates what follows; g is the settings in
// force at the beginning. Force is no part of it. Errors are those of After.
func Keys(base string, g sandbox.GuestSettings, steps []Step) ([]string, error) {
	keys := make([]string, 0, len(steps))
	last := base
	for i := range steps {
		h := sha256.New()
		addTo(h, keyVersion, last)
		addSettings(h, g)
		s := &steps[i]
		addTo(h, s.Type, s.FilesHash)
		addTo(h, s.Args...)
		last = hex.EncodeToString(h.Sum(nil))
		keys = append(keys, last)
		var err error
		if g, err = After(g, *s); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// FinalKey names what a whole recipe comes to: its last result with settings, resources and the processes that run in it.
func FinalKey(last string, g sandbox.GuestSettings, r sandbox.Resources, start, ready string) string {
	h := sha256.New()
	addTo(h, keyVersion, last)
	addSettings(h, g)
	addTo(h, start, ready)
	var size [24]byte
	for i, n := range []int64{r.MilliCPU, r.MemoryBytes, r.DiskBytes} {
		binary.BigEndian.PutUint64(size[8*i:], uint64(n)) //nolint:gosec // Only told apart from others.
	}
	_, _ = h.Write(size[:])
	return hex.EncodeToString(h.Sum(nil))
}

func addSettings(h hash.Hash, g sandbox.GuestSettings) {
	env := make([]string, 0, 2*len(g.Env))
	for _, name := range slices.Sorted(maps.Keys(g.Env)) {
		env = append(env, name, g.Env[name])
	}
	addTo(h, env...)
	addTo(h, g.User, g.WorkDir)
}

// addTo adds a list so that no two different ones give the same bytes.
func addTo(h hash.Hash, texts ...string) {
	var n [8]byte
	add := func(v int) {
		binary.BigEndian.PutUint64(n[:], uint64(v)) //nolint:gosec // A length.
		_, _ = h.Write(n[:])
	}
	add(len(texts))
	for _, t := range texts {
		add(len(t))
		_, _ = h.Write([]byte(t))
	}
}
