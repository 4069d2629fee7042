package image

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// unmountBelow takes away every mount below dir and makes sure that none is left, so that what is deleted there is ours.
func unmountBelow(dir string) error {
	for range 2 {
		data, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return fmt.Errorf("read mounts: %w", err)
		}
		points := mountsBelow(string(data), dir)
		if len(points) == 0 {
			return nil
		}
		for _, point := range points {
			if err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("unmount %s: %w", point, err)
			}
		}
	}
	return sandbox.Conflictf("something keeps mounting file systems below %s", dir)
}
