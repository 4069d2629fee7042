package gvisor

import (
	"errors"
	"fmt"
	"os"
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

func TestNamedFiles(t *testing.T) {
	got := namedFiles([]string{"runsc-sandbox", "--root=/a/fd=4", "--panic-log-fd=3", "--cpu-num=9", "--stdio-fds=5,6", "--pass-fd=7:268435456", "--log-fd=x", "id"})
	if diff := cmp.Diff(map[int]bool{3: true, 5: true, 6: true, 7: true, 268435456: true}, got); diff != "" {
		t.Error(diff)
	}
}
