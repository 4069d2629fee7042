package erofs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func openFile(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestReadGivesWhatWasWritten(t *testing.T) {
	tr := sample(t)
	file := writeFile(t, tr.Root)
	again, err := Read(t.Context(), openFile(t, file), tree.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fromTree(t, tr.Root), fromTree(t, again.Root)); diff != "" {
		t.Errorf("tree (-written +read):\n%s", diff)
	}
	if again.Lookup("/setuid") != again.Lookup("/many/hard") {
		t.Error("hard links are different files")
	}
	sink := &cloningSink{}
	if _, err := Write(t.Context(), sink, again.Root, nil); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(sink.Bytes(), want) {
		t.Error("written again with clones, the image is another")
	}
	if sink.clones != 1 {
		t.Errorf("the unchanged files were cloned in %d pieces, want 1", sink.clones)
	}
}

// cloningSink copies what it is told to clone.
type cloningSink struct {
	bytes.Buffer
	clones int
}

func (c *cloningSink) Clone(_ context.Context, src *os.File, off, size int64) error {
	c.clones++
	if c.Len()%blockSize != 0 || off%blockSize != 0 || size%blockSize != 0 {
		return errors.New("not at a block")
	}
	_, err := io.Copy(c, io.NewSectionReader(src, off, size))
	return err
}

func TestReadRefuses(t *testing.T) {
	good, err := os.ReadFile(writeFile(t, sample(t).Root))
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	root := int(le.Uint16(good[superStart+14:])) << slotBits
	for name, damage := range map[string]func([]byte) []byte{
		"nothing":          func([]byte) []byte { return nil },
		"magic":            func(b []byte) []byte { b[superStart] ^= 1; return b },
		"checksum":         func(b []byte) []byte { b[superStart+100] ^= 1; return b },
		"cut short":        func(b []byte) []byte { return b[:len(b)-blockSize] },
		"no directory":     func(b []byte) []byte { b[root+5] = 0x81; return resum(b) },
		"compressed":       func(b []byte) []byte { b[root] = 1<<1 | 1; return resum(b) },
		"compact inode":    func(b []byte) []byte { b[root] &^= 1; return resum(b) },
		"attributes":       func(b []byte) []byte { b[root+2] = 1; return resum(b) },
		"huge directory":   func(b []byte) []byte { le.PutUint64(b[root+8:], 1<<40); return resum(b) },
		"negative size":    func(b []byte) []byte { le.PutUint64(b[root+8:], 1<<63); return resum(b) },
		"nanoseconds":      func(b []byte) []byte { le.PutUint32(b[root+40:], 1e9); return resum(b) },
		"names nowhere":    func(b []byte) []byte { le.PutUint16(b[root+inodeSize+8:], 4000); return resum(b) },
		"directory in two": func(b []byte) []byte { return loop(b, root) },
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(file, damage(bytes.Clone(good)), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Read(t.Context(), openFile(t, file), tree.DefaultLimits()); !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("got %v, want %v", err, sandbox.ErrInvalid)
			}
		})
	}
	small := tree.DefaultLimits()
	small.Entries = 100
	if _, err := Read(t.Context(), openFile(t, writeFile(t, sample(t).Root)), small); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("more entries than allowed: %v", err)
	}
}

func resum(b []byte) []byte {
	clear(b[superStart+4 : superStart+8])
	checksum(b[:blockSize])
	return b
}

// loop makes the last name of the root lead to the first directory.
func loop(b []byte, root int) []byte {
	le := binary.LittleEndian
	block := b[root+inodeSize:]
	count := int(le.Uint16(block[8:])) / direntSize
	var dir uint64
	for i := range count {
		if e := block[i*direntSize:]; e[10] == 2 && i > 1 {
			dir = le.Uint64(e)
			break
		}
	}
	le.PutUint64(block[(count-1)*direntSize:], dir)
	return resum(b)
}

func FuzzRead(f *testing.F) {
	tr := tree.New(tree.DefaultLimits())
	for _, name := range []string{"/a/b/c", "/a/d", "/e"} {
		if err := tr.WriteFile(name, []byte(name), tree.Attr{Perm: 0o644}); err != nil {
			f.Fatal(err)
		}
	}
	if err := tr.Symlink("a/d", "/link", tree.Attr{}); err != nil {
		f.Fatal(err)
	}
	var image bytes.Buffer
	if _, err := Write(f.Context(), &image, tr.Root, nil); err != nil {
		f.Fatal(err)
	}
	f.Add(image.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) >= blockSize {
			resum(data)
		}
		file := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Read(t.Context(), openFile(t, file), tree.Limits{Entries: 1000, Bytes: 1 << 24})
		if err != nil {
			return
		}
		if _, err := Write(t.Context(), &cloningSink{}, got.Root, nil); err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Fatalf("write what was read: %v", err)
		}
	})
}
