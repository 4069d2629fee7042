package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// clockUnsynchronised is what adjtimex returns while nothing keeps the clock right.
const clockUnsynchronised = 5

func checkClock(context.Context, Settings) []Finding {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	return []Finding{judgeClock(state, err)}
}

func judgeClock(state int, err error) Finding {
	const check = "clock"
	switch {
	case err != nil:
		return hint(check, fmt.Sprintf("unknown: %v", err), "make sure that something keeps the clock right: certificates and timeouts follow it")
	case state == clockUnsynchronised:
		return hint(check, "nothing keeps it synchronised", "before joining machines to a cluster: timedatectl set-ntp true, or apt-get install -y chrony")
	}
	return ok(check, "synchronised")
}

func checkTools(context.Context, Settings) []Finding {
	_, err := exec.LookPath("debootstrap")
	return []Finding{judgeTools(err == nil)}
}

func judgeTools(debootstrap bool) Finding {
	if !debootstrap {
		return warn("debootstrap", "not installed: template base can only come from a registry or a file", "apt-get install -y debootstrap")
	}
	return ok("debootstrap", "installed")
}

func checkDevices(context.Context, Settings) []Finding {
	return []Finding{judgeDevice("/dev/kvm", openDevice("/dev/kvm")), judgeDevice("/dev/net/tun", openDevice("/dev/net/tun"))}
}

func openDevice(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0) //nolint:gosec // one of two devices
	if err != nil {
		return err
	}
	return f.Close()
}

// judgeDevice is for information alone: sandboxes need neither device.
func judgeDevice(path string, err error) Finding {
	check := "device " + path
	switch {
	case err == nil:
		return ok(check, "present")
	case errors.Is(err, fs.ErrNotExist):
		return ok(check, "absent; sandboxes do not need it")
	}
	return ok(check, fmt.Sprintf("not usable: %v; sandboxes do not need it", err))
}
