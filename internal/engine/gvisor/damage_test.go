package gvisor

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"gvisor.dev/gvisor/pkg/sentry/state/checkpointfiles"

	"github.com/cloister-dev/cloister/internal/engine"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// TestDamage turns single bits of a checkpoint over.
func TestDamage(t *testing.T) {
	p := newPlace(t)
	e := p.open(t)
	s, w := p.servingIn(t, e, 0)
	w.ask(t, "write /tmp/a 100000")
	s.NetNS = ""
	for _, kind := range []engine.SaveKind{engine.SaveMemory, engine.SaveFiles} {
		dir, _ := p.save(t, e, s.ID, engine.SaveSpec{Kind: kind})
		for _, name := range append(kindFiles(kind), manifestFile) {
			t.Run(string(kind)+"/"+name, func(t *testing.T) { flipEach(t, p, s, dir, name) })
		}
		t.Run(string(kind)+"/whole again", func(t *testing.T) {
			if err := p.startAgain(t, s, dir); err != nil {
				t.Error(err)
			}
		})
	}
}

// startAgain starts a guest from a checkpoint, and stops it. It checks that a failure leaves nothing.
func (p place) startAgain(t *testing.T, s engine.Spec, dir string) error {
	t.Helper()
	e := p.open(t)
	before := len(p.left(t))
	s.ID, s.Checkpoint = sandbox.NewID("testno"), dir
	err := e.Start(testContext(t), s)
	if err == nil {
		if err := e.Stop(testContext(t), s.ID); err != nil {
			t.Error(err)
		}
	}
	if left := p.left(t); len(left) != before {
		t.Errorf("left: %v", left)
	}
	return err
}

// flipEach turns a bit over near a file's begin, middle and end, each alone.
func flipEach(t *testing.T, p place, s engine.Spec, dir, name string) {
	t.Helper()
	path := filepath.Join(dir, name)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{0, len(whole) / 2, len(whole) - 1} {
		damaged := append([]byte(nil), whole...)
		damaged[at] ^= 0x10
		if err := os.WriteFile(path, damaged, fileMode); err != nil {
			t.Fatal(err)
		}
		err := p.startAgain(t, s, dir)
		switch name {
		case checkpointfiles.PagesFileName: // the guest's own memory: it may run into that, or never
		case manifestFile: // it may make no difference
		default:
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("bit at %d of %d: got %v, want ErrInvalid", at, len(whole), err)
			}
			vouch(t, dir, name)
			t.Logf("with a checksum to match: %v", p.startAgain(t, s, dir))
		}
		if err := os.WriteFile(path, whole, fileMode); err != nil {
			t.Fatal(err)
		}
		if name != manifestFile {
			vouch(t, dir, name)
		}
	}
}

// vouch makes the manifest's checksum that of a file.
func vouch(t *testing.T, dir, name string) {
	t.Helper()
	m, err := readManifest(dir)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	entry := m.Files[name]
	if entry.CRC32C, err = sum(f, name); err != nil {
		t.Fatal(err)
	}
	m.Files[name] = entry
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, manifestFile), raw, fileMode); err != nil {
		t.Fatal(err)
	}
}
