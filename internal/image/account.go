package image

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const (
	userName = "user"
	userHome = "/home/user"
	// firstID is the first user and group id that is tried.
	firstID = 1000
	// sudoID is the group id that Debian gives to sudo.
	sudoID = 27
	// firstSystemID and lastSystemID are where sudo goes when its own id is taken.
	firstSystemID, lastSystemID = 100, 999
)

// accounts are the text files that say who exists. A nil file does not exist; shadow files are only kept where they do.
type accounts struct {
	passwd, group, shadow, gshadow []string
}

// owner is the ids of the sandbox's user.
type owner struct {
	uid, gid uint32
	home     string
}

// ensureUser makes sure of the user, its group and its place in group sudo, and keeps every other line as it is.
func (a *accounts) ensureUser(shell string) owner {
	o := owner{home: userHome}
	if i := find(a.passwd, userName); i >= 0 {
		if f := fields(a.passwd[i], 7); validIDs(f) {
			return a.keepUser(i, f, shell)
		}
		a.passwd = slices.Delete(a.passwd, i, i+1)
	}
	o.gid = a.ensureGroup()
	o.uid = o.gid
	if ids(a.passwd)[o.uid] {
		o.uid = a.freeID()
	}
	a.passwd = append(a.passwd, fmt.Sprintf("%s:x:%d:%d::%s:%s", userName, o.uid, o.gid, userHome, shell))
	a.ensureShadow()
	a.ensureSudo()
	return o
}

// keepUser leaves the ids of a user that the image has, and sees that it can be used.
func (a *accounts) keepUser(i int, f []string, shell string) owner {
	f[5] = userHome
	if f[6] == "" || strings.HasSuffix(f[6], "/nologin") || strings.HasSuffix(f[6], "/false") {
		f[6] = shell
	}
	a.passwd[i] = strings.Join(f, ":")
	a.ensureShadow()
	a.ensureSudo()
	return owner{uid: id(f[2]), gid: id(f[3]), home: userHome}
}

// ensureGroup returns the id of group user.
func (a *accounts) ensureGroup() uint32 {
	if i := find(a.group, userName); i >= 0 {
		f := fields(a.group[i], 4)
		if _, err := strconv.ParseUint(f[2], 10, 31); err == nil {
			return id(f[2])
		}
		a.group = slices.Delete(a.group, i, i+1)
	}
	gid := a.freeID()
	a.group = append(a.group, fmt.Sprintf("%s:x:%d:", userName, gid))
	if a.gshadow != nil && find(a.gshadow, userName) < 0 {
		a.gshadow = append(a.gshadow, userName+":!::")
	}
	return gid
}

// ensureShadow gives the user no password: none fits, and the account is not locked.
func (a *accounts) ensureShadow() {
	if a.shadow != nil && find(a.shadow, userName) < 0 {
		a.shadow = append(a.shadow, userName+":*:19000:0:99999:7:::")
	}
}

func (a *accounts) ensureSudo() {
	a.group = ensureMember(a.group, func() string { return fmt.Sprintf("sudo:x:%d:", a.sudoGID()) }, 4)
	if a.gshadow != nil {
		a.gshadow = ensureMember(a.gshadow, func() string { return "sudo:*::" }, 4)
	}
}

// ensureMember adds the user to group sudo's last field; entry makes the group where it is missing.
func ensureMember(lines []string, entry func() string, count int) []string {
	i := find(lines, "sudo")
	if i < 0 {
		lines = append(lines, entry())
		i = len(lines) - 1
	}
	f := fields(lines[i], count)
	members := slices.DeleteFunc(strings.Split(f[count-1], ","), func(s string) bool { return s == "" })
	if !slices.Contains(members, userName) {
		members = append(members, userName)
	}
	f[count-1] = strings.Join(members, ",")
	lines[i] = strings.Join(f, ":")
	return lines
}

func (a *accounts) sudoGID() uint32 {
	taken := ids(a.group)
	if !taken[sudoID] {
		return sudoID
	}
	for gid := uint32(lastSystemID); gid > firstSystemID; gid-- {
		if !taken[gid] {
			return gid
		}
	}
	return a.freeID()
}

// freeID is the first id that no user and no group has.
func (a *accounts) freeID() uint32 {
	users, groups := ids(a.passwd), ids(a.group)
	n := uint32(firstID)
	for users[n] || groups[n] {
		n++
	}
	return n
}

// ids returns the ids, which are the third field of both files, that are in use.
func ids(lines []string) map[uint32]bool {
	taken := make(map[uint32]bool, len(lines))
	for _, line := range lines {
		if n, err := strconv.ParseUint(fields(line, 3)[2], 10, 31); err == nil {
			taken[uint32(n)] = true
		}
	}
	return taken
}

// find returns the line of that name, or -1.
func find(lines []string, name string) int {
	return slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, name+":") })
}

// fields splits a line into exactly count fields.
func fields(line string, count int) []string {
	f := strings.Split(line, ":")
	for len(f) < count {
		f = append(f, "")
	}
	return f[:count]
}

func validIDs(f []string) bool {
	_, uidErr := strconv.ParseUint(f[2], 10, 31)
	_, gidErr := strconv.ParseUint(f[3], 10, 31)
	return uidErr == nil && gidErr == nil
}

func id(s string) uint32 {
	n, _ := strconv.ParseUint(s, 10, 31)
	return uint32(n)
}

// lines splits a text file; the last newline ends a line instead of beginning one.
func lines(data []byte) []string {
	text := strings.TrimSuffix(string(data), "\n")
	if text == "" {
		return []string{}
	}
	return strings.Split(text, "\n")
}

func unlines(lines []string) []byte { return []byte(strings.Join(lines, "\n") + "\n") }
