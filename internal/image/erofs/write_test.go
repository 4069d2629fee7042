package erofs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	reader "gvisor.dev/gvisor/pkg/erofs"

	"github.com/cloister-dev/cloister/internal/image/tree"
)

// facts is what a reader of an image can tell about one path.
type facts struct {
	Mode     uint32
	UID, GID uint32
	Size     int64
	Links    uint32
	Sec      int64
	Nsec     uint32
	Rdev     uint32
	Data     string // contents, target, or a hash of what is long
	Ino      uint64
}

// sample is a tree with everything that has ever gone wrong in an image writer.
func sample(t *testing.T) *tree.Tree {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	put := func(hdr tar.Header, body string) {
		t.Helper()
		hdr.Format, hdr.Size = tar.FormatPAX, int64(len(body))
		if hdr.ModTime.IsZero() {
			hdr.ModTime = time.Unix(1_700_000_000, 5)
		}
		if err := w.WriteHeader(&hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	put(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}, "")
	for _, size := range []int{0, 1, 31, 4095, 4096, 4097, 1<<20 + 1} {
		put(tar.Header{Name: fmt.Sprintf("size/%d", size), Mode: 0o644}, strings.Repeat("s", size))
	}
	for _, size := range []int{1, 32, 4000, 4031, 4032, 4033, 4095} {
		put(tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprintf("links/%d", size), Linkname: strings.Repeat("t", size)}, "")
	}
	for i := range 3000 {
		put(tar.Header{Name: fmt.Sprintf("many/file-%04d", i), Mode: 0o600}, "")
	}
	for i := range 40 {
		put(tar.Header{Name: "long/" + strings.Repeat(string(rune('A'+i)), 255), Mode: 0o600}, "x")
	}
	for i := range 300 { // directories whose ends fall on all sides of block boundaries
		put(tar.Header{Name: fmt.Sprintf("dirs/%d/%s", i, strings.Repeat("n", i%250+1)), Mode: 0o600}, "")
	}
	put(tar.Header{Name: "setuid", Mode: 0o4755, Uid: 100_000, Gid: 4_000_000_000}, "x")
	put(tar.Header{Name: "setgid", Mode: 0o2755, Uid: 65_535, Gid: 65_536}, "x")
	put(tar.Header{Typeflag: tar.TypeDir, Name: "sticky", Mode: 0o1777}, "")
	put(tar.Header{Name: "old", Mode: 0o644, ModTime: time.Unix(-5, 0)}, "x")
	put(tar.Header{Name: "future", Mode: 0o644, ModTime: time.Unix(1<<33, 999_999_999)}, "x")
	put(tar.Header{Typeflag: tar.TypeLink, Name: "many/hard", Linkname: "setuid"}, "")
	put(tar.Header{Typeflag: tar.TypeLink, Name: "zz-hard", Linkname: "setuid"}, "")
	put(tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, "")
	put(tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Mode: 0o660, Devmajor: 259, Devminor: 0x12345}, "")
	put(tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o600}, "")
	for _, name := range []string{"-dash", "!bang", ".hidden", "..dots", "~tilde", "\xff\xfe", "with space", "ünï"} {
		put(tar.Header{Name: "odd/" + name, Mode: 0o644}, name)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	spool, err := tree.NewSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = spool.Close() })
	tr := tree.New(tree.DefaultLimits())
	if err := tr.ApplyLayer(t.Context(), &buf, spool); err != nil {
		t.Fatal(err)
	}
	// Names that a tar header cannot carry reach a tree from directories.
	if !slices.Contains(tr.Lookup("/odd").Names(), "\xff\xfe") {
		t.Fatal("the sample lost a name")
	}
	return tr
}

func short(data []byte) string {
	if len(data) <= 64 {
		return string(data)
	}
	sum := sha256.Sum256(data)
	return fmt.Sprintf("%d bytes %x", len(data), sum[:8])
}

// fromTree says what a reader should find.
func fromTree(t *testing.T, root *tree.Node) map[string]facts {
	t.Helper()
	links := map[*tree.Node]uint32{}
	all := map[string]facts{}
	nodes := map[string]*tree.Node{}
	var visit func(string, *tree.Node)
	visit = func(at string, n *tree.Node) {
		nodes[at] = n
		links[n]++
		if n.IsDir() {
			links[n]++
		}
		for _, name := range n.Names() {
			child := n.Child(name)
			if child.IsDir() {
				links[n]++
			}
			visit(path.Join(at, name), child)
		}
	}
	visit("/", root)
	for at, n := range nodes {
		f := facts{
			Mode: n.Mode, UID: n.UID, GID: n.GID, Size: n.Size(), Links: links[n], Sec: n.Sec, Nsec: n.Nsec, Rdev: n.Rdev,
			Data: short([]byte(n.Target)),
		}
		if n.Content != nil {
			r, err := n.Content.Open()
			if err != nil {
				t.Fatal(err)
			}
			data, err := io.ReadAll(r)
			if err := errors.Join(err, r.Close()); err != nil {
				t.Fatal(err)
			}
			f.Data = short(data)
		}
		all[at] = f
	}
	return all
}

// throughGvisor reads an image with the code that serves it to sandboxes.
func throughGvisor(t *testing.T, file string) map[string]facts {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	img, err := reader.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	all := map[string]facts{}
	var visit func(string, uint64, uint64)
	visit = func(at string, nid, parent uint64) {
		ino, err := img.Inode(nid)
		if err != nil {
			t.Fatalf("inode of %s: %v", at, err)
		}
		all[at] = factsOf(t, at, &ino)
		if !ino.IsDir() {
			return
		}
		seen := []string{}
		err = ino.IterDirents(func(name string, kind uint8, child uint64) error {
			seen = append(seen, name)
			if got, err := ino.Lookup(name); err != nil || got != child {
				t.Errorf("look %q up in %s: %d, %v; want %d", name, at, got, err, child)
			}
			switch name {
			case ".":
				if child != nid {
					t.Errorf("%s/. leads to %d, want %d", at, child, nid)
				}
			case "..":
				if child != parent {
					t.Errorf("%s/.. leads to %d, want %d", at, child, parent)
				}
			default:
				visit(path.Join(at, name), child, nid)
				if want := kindOf(all[path.Join(at, name)].Mode); kind != want {
					t.Errorf("%s/%s has entry type %d, want %d", at, name, kind, want)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatalf("list %s: %v", at, err)
		}
		if !slices.IsSorted(seen) || !slices.Contains(seen, ".") || !slices.Contains(seen, "..") {
			t.Errorf("the names of %s are not in order or not whole", at)
		}
	}
	visit("/", img.RootNid(), img.RootNid())
	return all
}

func kindOf(mode uint32) uint8 {
	return map[uint32]uint8{
		unix.S_IFREG: 1, unix.S_IFDIR: 2, unix.S_IFCHR: 3, unix.S_IFBLK: 4, unix.S_IFIFO: 5, unix.S_IFSOCK: 6, unix.S_IFLNK: 7,
	}[mode&unix.S_IFMT]
}

func factsOf(t *testing.T, at string, ino *reader.Inode) facts {
	t.Helper()
	f := facts{
		Mode: uint32(ino.Mode()), UID: ino.UID(), GID: ino.GID(), Size: int64(ino.Size()), Links: ino.Nlink(),
		Sec: int64(ino.Mtime()), Nsec: ino.MtimeNsec(), Ino: ino.Nid(),
	}
	switch {
	case ino.IsSymlink():
		target, err := ino.Readlink()
		if err != nil {
			t.Fatalf("read link %s: %v", at, err)
		}
		f.Data = short([]byte(target))
	case ino.IsRegular():
		off, err := ino.DataOffset() // gVisor maps files only where this works
		if err != nil {
			t.Fatalf("map %s: %v", at, err)
		}
		if off%blockSize != 0 {
			t.Errorf("%s begins at %d, not at a block", at, off)
		}
		ranges, err := ino.DataRanges()
		if err != nil {
			t.Fatalf("read %s: %v", at, err)
		}
		f.Data = short(slices.Concat(ranges[0].Bytes, ranges[1].Bytes))
	}
	return f
}

// comparable leaves out what the reader in question cannot tell.
func comparable(all map[string]facts, strip func(*facts)) map[string]facts {
	out := maps.Clone(all)
	for at, f := range out {
		f.Ino = 0
		if f.Mode&unix.S_IFMT == unix.S_IFDIR {
			f.Size = 0
		}
		strip(&f)
		out[at] = f
	}
	return out
}

func writeFile(t *testing.T, root *tree.Node) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.erofs")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	size, err := Write(t.Context(), f, root, nil)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() != size || size%blockSize != 0 {
		t.Errorf("wrote %d bytes, said %d; it must be a multiple of %d", info.Size(), size, blockSize)
	}
	return file
}

func TestGvisorReadsWhatWasWritten(t *testing.T) {
	tr := sample(t)
	got := throughGvisor(t, writeFile(t, tr.Root))
	noRdev := func(f *facts) { f.Rdev = 0 }
	if diff := cmp.Diff(comparable(fromTree(t, tr.Root), noRdev), comparable(got, noRdev)); diff != "" {
		t.Errorf("image (-want +got):\n%s", diff)
	}
	if a, b, c := got["/setuid"].Ino, got["/many/hard"].Ino, got["/zz-hard"].Ino; a != b || b != c {
		t.Errorf("hard links are different files: %d, %d, %d", a, b, c)
	}
}

func TestFsckAcceptsWhatWasWritten(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("erofs-utils are not installed; the other tests read the image by other means")
	}
	if out, err := exec.CommandContext(t.Context(), fsck, writeFile(t, sample(t).Root)).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

// TestKernelReadsWhatWasWritten mounts an image with Linux.
func TestKernelReadsWhatWasWritten(t *testing.T) {
	requireHosts(t)
	tr := sample(t)
	mnt := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "mount", "-t", "erofs", "-o", "loop,ro", writeFile(t, tr.Root), mnt).
		CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	defer func() {
		if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	got := map[string]facts{}
	err := filepath.WalkDir(mnt, func(at string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		got["/"+strings.TrimPrefix(strings.TrimPrefix(at, mnt), "/")] = hostFacts(t, at)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	same := func(*facts) {}
	if diff := cmp.Diff(comparable(fromTree(t, tr.Root), same), comparable(got, same)); diff != "" {
		t.Errorf("mounted image (-want +got):\n%s", diff)
	}
}

func hostFacts(t *testing.T, at string) facts {
	t.Helper()
	info, err := os.Lstat(at)
	if err != nil {
		t.Fatal(err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatalf("no stat of %s", at)
	}
	f := facts{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Size: st.Size, Links: uint32(st.Nlink), Sec: st.Mtim.Sec,
		Nsec: uint32(st.Mtim.Nsec),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target, err := os.Readlink(at)
		if err != nil {
			t.Fatal(err)
		}
		f.Data = short([]byte(target))
	case unix.S_IFREG:
		data, err := os.ReadFile(at)
		if err != nil {
			t.Fatal(err)
		}
		f.Data = short(data)
	case unix.S_IFCHR, unix.S_IFBLK:
		f.Rdev = tree.Device(unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return f
}

// requireHosts skips without root, and fails instead where the machine is there for such tests.
func requireHosts(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_HOSTS") == "1" { //nolint:forbidigo // the tests' own switch
		t.Fatal("this test needs root")
	}
	t.Skip("needs root")
}

// TestGolden pins the bytes: the same tree must give the same image in every release, or caches and clusters disagree.
func TestGolden(t *testing.T) {
	const want = "3a85712dc16531c39e8e5f36263fd051daf753075f70b0606320813ff7459fb6"
	for range 2 {
		sum := sha256.New()
		if _, err := Write(t.Context(), sum, sample(t).Root, nil); err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(sum.Sum(nil)); got != want {
			t.Errorf("image digest %s, want %s", got, want)
		}
	}
}

func TestWriteSaysWhatFails(t *testing.T) {
	tr := sample(t)
	full := errors.New("no space")
	if _, err := Write(t.Context(), failing{full}, tr.Root, nil); !errors.Is(err, full) {
		t.Errorf("a full disk: %v", err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if _, err := Write(ctx, io.Discard, tr.Root, nil); !errors.Is(err, gone) {
		t.Errorf("a cancelled build: %v", err)
	}
	tr.Lookup("/size/4097").Content = shrunk{tr.Lookup("/size/4097").Content}
	if _, err := Write(t.Context(), io.Discard, tr.Root, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a file that became shorter: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

// shrunk has fewer bytes than it says.
type shrunk struct{ tree.Content }

func (s shrunk) Size() int64 { return s.Content.Size() + 1 }

// FuzzWrite writes whatever tree a layer makes and reads it back.
func FuzzWrite(f *testing.F) {
	for _, seed := range []struct {
		name, target string
		size         uint16
		count        uint8
	}{{"a", "t", 0, 1}, {"dir/name", "../x", 4096, 200}, {strings.Repeat("n", 255), strings.Repeat("t", 4032), 5000, 60}} {
		f.Add(seed.name, seed.target, seed.size, seed.count)
	}
	f.Fuzz(func(t *testing.T, name, target string, size uint16, count uint8) {
		tr := tree.New(tree.DefaultLimits())
		for i := range int(count) {
			at := fmt.Sprintf("%s-%d", name, i)
			if tr.WriteFile(at, bytes.Repeat([]byte{'x'}, int(size)), tree.Attr{Perm: 0o644}) != nil {
				return
			}
			if len(target) < maxSymlinkTarget && target != "" && tr.Symlink(target, at+"l", tree.Attr{}) != nil {
				return
			}
		}
		strip := func(f *facts) { f.Rdev = 0 }
		got := throughGvisor(t, writeFile(t, tr.Root))
		if diff := cmp.Diff(comparable(fromTree(t, tr.Root), strip), comparable(got, strip)); diff != "" {
			t.Fatalf("image (-want +got):\n%s", diff)
		}
	})
}
