package gvisor

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestDropForeign(t *testing.T) {
	needHost(t)
	packet, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	var files [2]int // one that the arguments name, one that they do not
	for i := range files {
		if files[i], err = unix.Open(os.DevNull, unix.O_RDONLY, 0); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(files[i]) }()
	}
	if err := dropForeign([]string{"boot", fmt.Sprintf("--io-fds=%d,900", files[0])}); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(packet), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("the packet socket is open: %v", err)
	}
	for i, want := range []int{0, unix.FD_CLOEXEC} {
		if got, err := unix.FcntlInt(uintptr(files[i]), unix.F_GETFD, 0); err != nil || got != want {
			t.Errorf("flags of file %d: %d, %v; want %d", i, got, err, want)
		}
	}
}

// A packet socket that the garbage collector closes while a sentry is started is closed last by this process, not by the sentry.
func TestHoldForeign(t *testing.T) {
	needHost(t)
	packet, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	var want unix.Stat_t
	if err := unix.Fstat(packet, &want); err != nil {
		t.Fatal(err)
	}
	release := holdForeign()
	if err := unix.Close(packet); err != nil {
		t.Fatal(err)
	}
	held := filesOf(t, &want)
	if len(held) != 1 {
		t.Fatalf("descriptors that hold the socket: %v, want one", held)
	}
	if flags, err := unix.FcntlInt(uintptr(held[0]), unix.F_GETFD, 0); err != nil || flags != unix.FD_CLOEXEC {
		t.Errorf("flags %d, %v: sentries inherit it", flags, err)
	}
	release()
	if left := filesOf(t, &want); len(left) > 0 {
		t.Errorf("descriptors %v still hold the socket", left)
	}
}

// filesOf returns this process's descriptors of one file.
func filesOf(t *testing.T, want *unix.Stat_t) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, e := range entries {
		var st unix.Stat_t
		if fd, err := strconv.Atoi(e.Name()); err == nil && unix.Fstat(fd, &st) == nil && st.Ino == want.Ino && st.Dev == want.Dev {
			out = append(out, fd)
		}
	}
	return out
}

func TestNamedFiles(t *testing.T) {
	got := namedFiles([]string{"runsc-sandbox", "--root=/a/fd=4", "--panic-log-fd=3", "--cpu-num=9", "--stdio-fds=5,6", "--pass-fd=7:268435456", "--log-fd=x", "id"})
	if diff := cmp.Diff(map[int]bool{3: true, 5: true, 6: true, 7: true, 268435456: true}, got); diff != "" {
		t.Error(diff)
	}
}
