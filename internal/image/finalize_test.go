package image

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFinalize(t *testing.T) {
	dir := t.TempDir()
	put := func(file, body string, mode os.FileMode) {
		t.Helper()
		full := filepath.Join(dir, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(full), 0o755), os.WriteFile(full, []byte(body), mode)); err != nil {
			t.Fatal(err)
		}
	}
	put("etc/passwd", "root:x:0:0::/root:/bin/sh\n", 0o644)
	put("etc/shadow", "root:*:::::::\n", 0o600)
	put("etc/skel/.bashrc", "alias", 0o644)
	put("etc/profile", "if [ \"$(id -u)\" -eq 0 ]; then\n  [ \"${EUID:-$(id -u)}\" ]\nfi\n", 0o644)
	put("etc/sudoers", "root ALL=(ALL) ALL\n", 0o440)
	put("etc/machine-id", "0123", 0o444)
	put("etc/ssh/ssh_host_rsa_key", "secret", 0o600)
	put("etc/ssh/ssh_config", "x", 0o644)
	put("bin/bash", "sh", 0o755)
	put("usr/bin/sudo", "sudo", 0o755)
	put("usr/bin/python3", "py", 0o755)
	put("var/lib/dpkg/status", "", 0o644)
	put("dev/leftover", "x", 0o644)
	if err := os.Symlink("../run/systemd/resolve/stub-resolv.conf", filepath.Join(dir, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../../../../../../../escape", filepath.Join(dir, "usr/local")); err != nil {
		t.Fatal(err)
	}
	s := newStore(t, func(c *Config) { c.Nameservers = []string{"9.9.9.9"} })
	img, err := s.Build(t.Context(), Request{Sources: []string{"dir:" + dir}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []struct {
		path, data string
		perm       uint16
		uid        uint32
	}{
		{"/escape/bin/cloister-guest", "guest agent", 0o755, 0},
		{"/etc/passwd", "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\n", 0o644, 0},
		{"/etc/shadow", "root:*:::::::\nuser:*:19000:0:99999:7:::\n", 0o600, 0},
		{"/etc/group", "root:x:0:\nuser:x:1000:\nsudo:x:27:user\n", 0o644, 0},
		{"/home/user/.bashrc", "alias", 0o644, 1000},
		{"/etc/sudoers.d/user", "user ALL=(ALL:ALL) NOPASSWD: ALL\n", 0o440, 0},
		{"/etc/sudoers", "root ALL=(ALL) ALL\n@includedir /etc/sudoers.d\n", 0o440, 0},
		{"/etc/resolv.conf", "nameserver 9.9.9.9\n", 0o644, 0},
		{"/etc/hostname", "sandbox\n", 0o644, 0},
		{"/etc/profile", "if [ \"${EUID:-$(id -u)}\" -eq 0 ]; then\n  [ \"${EUID:-$(id -u)}\" ]\nfi\n", 0o644, 0},
		{"/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755, 0},
		{"/usr/bin/python", "python3", 0o777, 0},
		{"/etc/machine-id", "", 0o644, 0},
		{"/etc/default/locale", "LANG=C.UTF-8\n", 0o644, 0},
	} {
		data, ino := imageFile(t, s, img.Digest, want.path)
		if ino == nil {
			t.Errorf("%s is missing", want.path)
			continue
		}
		if data != want.data || ino.Mode()&0o7777 != want.perm || (os.Geteuid() == 0 && ino.UID() != want.uid) {
			t.Errorf("%s: %q, %o, owner %d; want %q, %o, %d", want.path, data, ino.Mode(), ino.UID(), want.data, want.perm, want.uid)
		}
	}
	have := paths(t, s, img.Digest)
	for _, gone := range []string{"/dev/leftover", "/etc/ssh/ssh_host_rsa_key"} {
		if slices.Contains(have, gone) {
			t.Errorf("%s is still there", gone)
		}
	}
	if _, tmp := imageFile(t, s, img.Digest, "/tmp"); tmp == nil || tmp.Mode() != unix.S_IFDIR|0o1777 {
		t.Errorf("/tmp: %+v", tmp)
	}
	if _, err := os.Lstat(filepath.Join(filepath.Dir(dir), "escape")); err == nil {
		t.Error("a link of the image led out of it")
	}
}

func TestFinalizeIsStable(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	digests := map[string]bool{}
	for range 2 {
		img, err := newStore(t, nil).Build(t.Context(), Request{Sources: []string{"dir:" + dir}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		digests[img.Digest] = true
	}
	if len(digests) != 1 {
		t.Errorf("the same directory gave different images: %v", digests)
	}
}
