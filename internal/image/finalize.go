package image

import (
	"bytes"
	"errors"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloister-dev/cloister/internal/image/tree"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

const (
	maxTextFile   = 4 << 20
	guestHostname = "sandbox"
)

// finalizer fits a tree out for sandboxes. What it adds carries the newest time of the tree, so that the same source
// always gives the same image.
type finalizer struct {
	*tree.Tree
	now int64
}

// finalize returns the digest of the agent that it put into the tree, or "" where there is none. A tree that was fitted out
// before gets the agent and the network's files of this node, nothing else.
func (s *Store) finalize(t *tree.Tree, fitted bool) (guestDigest string, err error) {
	var guest []byte
	if s.cfg.Guest != nil {
		if guest, err = s.cfg.Guest(); err != nil {
			return "", err
		}
		guestDigest = digestOf(guest)
	}
	f := finalizer{Tree: t, now: t.Newest()}
	steps := []func() error{
		f.directories,
		func() error { return f.guest(guest) },
		func() error { return f.network(s.cfg.Nameservers) },
	}
	if !fitted {
		steps = append(steps, f.user, f.profile, f.python, f.services, f.identity)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return "", err
		}
	}
	return guestDigest, nil
}

func (f finalizer) attr(perm uint32) tree.Attr { return tree.Attr{Perm: perm, Sec: f.now} }

// exists says whether there is anything at the path, a symbolic link that leads nowhere included.
func (f finalizer) exists(name string) bool { return f.LookupLink(name) != nil }

func (f finalizer) directories() error {
	for _, d := range []struct {
		path string
		perm uint32
	}{
		{"/proc", 0o555},
		{"/sys", 0o555},
		{"/dev", 0o755},
		{"/run", 0o755},
		{"/etc", 0o755},
		{"/home", 0o755},
		{"/root", 0o700},
		{"/usr/local/bin", 0o755},
		{"/var/tmp", 0o1777},
		{"/tmp", 0o1777},
	} {
		n, _, err := f.Mkdir(d.path, f.attr(d.perm))
		if err != nil {
			return err
		}
		if d.perm == 0o1777 {
			n.Mode = unix.S_IFDIR | d.perm
		}
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		f.Clear(dir)
	}
	return nil
}

func (f finalizer) guest(binary []byte) error {
	if len(binary) == 0 {
		return nil
	}
	return f.ensure(GuestPath, binary, 0o755)
}

// ensure makes the path root's file with these contents. One that is so already keeps its time.
func (f finalizer) ensure(name string, data []byte, perm uint32) error {
	n := f.LookupLink(name)
	if n != nil && n.Mode == unix.S_IFREG|perm && n.UID == 0 && n.GID == 0 && n.Size() == int64(len(data)) {
		was, err := f.ReadFile(name, int64(len(data)))
		if err != nil {
			return err
		}
		if bytes.Equal(was, data) {
			return nil
		}
	}
	return f.ReplaceFile(name, data, f.attr(perm))
}

// text reads a text file of the image; one that does not exist has no lines, and nil says so.
func (f finalizer) text(name string) ([]string, error) {
	data, err := f.ReadFile(name, maxTextFile)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return lines(data), nil
}

// rewrite writes a text file with the owner and mode that it has, or else attr.
func (f finalizer) rewrite(name string, text []string, attr tree.Attr) error {
	if n := f.Lookup(name); n != nil {
		attr = tree.Attr{Perm: n.Mode, UID: n.UID, GID: n.GID, Sec: f.now}
	}
	return f.WriteFile(name, unlines(text), attr)
}

// profile lets a login shell learn its user without a process of its own: the SDKs run each command in a login shell, and
// `id` is half of what that takes. Shells that do not know EUID still ask.
func (f finalizer) profile() error {
	const name = "/etc/profile"
	text, err := f.text(name)
	if err != nil || text == nil {
		return err
	}
	asks := strings.NewReplacer("$(id -u)", "${EUID:-$(id -u)}", "`id -u`", "${EUID:-`id -u`}")
	changed := make([]string, 0, len(text))
	for _, line := range text {
		if !strings.Contains(line, "EUID") {
			line = asks.Replace(line)
		}
		changed = append(changed, line)
	}
	if slices.Equal(text, changed) {
		return nil
	}
	return f.rewrite(name, changed, f.attr(0o644))
}

func (f finalizer) user() error {
	var a accounts
	files := []struct {
		path string
		text *[]string
		perm uint32
	}{
		{"/etc/passwd", &a.passwd, 0o644},
		{"/etc/group", &a.group, 0o644},
		{"/etc/shadow", &a.shadow, 0o640},
		{"/etc/gshadow", &a.gshadow, 0o640},
	}
	for _, file := range files {
		var err error
		if *file.text, err = f.text(file.path); err != nil {
			return err
		}
	}
	if a.passwd == nil {
		a.passwd = []string{"root:x:0:0:root:/root:" + f.shell()}
	}
	if a.group == nil {
		a.group = []string{"root:x:0:"}
	}
	o := a.ensureUser(f.shell())
	for _, file := range files {
		if *file.text == nil {
			continue
		}
		if err := f.rewrite(file.path, *file.text, f.attr(file.perm)); err != nil {
			return err
		}
	}
	if err := f.home(o); err != nil {
		return err
	}
	return f.sudo()
}

func (f finalizer) shell() string {
	if f.Lookup("/bin/bash") != nil {
		return "/bin/bash"
	}
	return "/bin/sh"
}

func (f finalizer) home(o owner) error {
	home, _, err := f.Mkdir(o.home, f.attr(0o755))
	if err != nil {
		return err
	}
	home.UID, home.GID = o.uid, o.gid
	skel := f.Lookup("/etc/skel")
	if skel == nil || !skel.IsDir() {
		return nil
	}
	return f.CopyDir(skel, home, func(n *tree.Node) { n.UID, n.GID = o.uid, o.gid })
}

// sudo lets the user become root without a password, where the image has sudo.
func (f finalizer) sudo() error {
	if f.Lookup("/usr/bin/sudo") == nil && f.Lookup("/bin/sudo") == nil {
		return nil
	}
	if _, _, err := f.Mkdir("/etc/sudoers.d", f.attr(0o750)); err != nil {
		return err
	}
	const rule = userName + " ALL=(ALL:ALL) NOPASSWD: ALL\n"
	if err := f.ReplaceFile("/etc/sudoers.d/"+userName, []byte(rule), f.attr(0o440)); err != nil {
		return err
	}
	main, err := f.text("/etc/sudoers")
	if err != nil {
		return err
	}
	if main == nil {
		main = []string{"root ALL=(ALL:ALL) ALL"}
	}
	for _, line := range main {
		if words := strings.Fields(line); len(words) == 2 && words[1] == "/etc/sudoers.d" &&
			(words[0] == "@includedir" || words[0] == "#includedir") {
			return nil
		}
	}
	return f.rewrite("/etc/sudoers", append(main, "@includedir /etc/sudoers.d"), f.attr(0o440))
}

// network makes the files that say who the sandbox is plain and writable; a link would lead to a file of a service that
// does not run in a sandbox.
func (f finalizer) network(nameservers []string) error {
	resolv := make([]string, 0, len(nameservers))
	for _, ns := range nameservers {
		resolv = append(resolv, "nameserver "+ns)
	}
	hosts := []string{
		"127.0.0.1\tlocalhost", "127.0.1.1\t" + guestHostname, "::1\tlocalhost ip6-localhost ip6-loopback",
	}
	for file, text := range map[string][]string{
		"/etc/hostname": {guestHostname}, "/etc/hosts": hosts, "/etc/resolv.conf": resolv,
	} {
		if err := f.ensure(file, unlines(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// python gives python3 its other name.
func (f finalizer) python() error {
	for _, dir := range []string{"/usr/local/bin", "/usr/bin"} {
		if f.Lookup(path.Join(dir, "python")) != nil {
			return nil
		}
	}
	for _, dir := range []string{"/usr/local/bin", "/usr/bin"} {
		if f.Lookup(path.Join(dir, "python3")) != nil {
			return f.Symlink("python3", path.Join(dir, "python"), f.attr(0o777))
		}
	}
	return nil
}

// services keeps package installations from starting daemons, and gives a locale that always exists.
func (f finalizer) services() error {
	if f.Lookup("/var/lib/dpkg/status") == nil {
		return nil
	}
	const policy = "/usr/sbin/policy-rc.d"
	if !f.exists(policy) {
		if err := f.ReplaceFile(policy, []byte("#!/bin/sh\nexit 101\n"), f.attr(0o755)); err != nil {
			return err
		}
	}
	const locale = "/etc/default/locale"
	if n := f.Lookup(locale); n != nil && n.Size() > 0 {
		return nil
	}
	return f.WriteFile(locale, []byte("LANG=C.UTF-8\n"), f.attr(0o644))
}

// identity takes away what would make all sandboxes of an image the same machine.
func (f finalizer) identity() error {
	f.Remove("/var/lib/dbus/machine-id")
	if dir := f.Lookup("/etc/ssh"); dir != nil && dir.IsDir() {
		for _, name := range dir.Names() {
			if strings.HasPrefix(name, "ssh_host_") {
				f.Remove("/etc/ssh/" + name)
			}
		}
	}
	if !f.exists("/etc/machine-id") {
		return nil
	}
	return f.ReplaceFile("/etc/machine-id", nil, f.attr(0o644))
}
