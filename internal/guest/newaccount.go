package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// firstUserID is the first user and group id that is tried for a new account.
const firstUserID = 1000

// accountName is what a new account may be called, or a number.
var accountName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}$`)

// accountRequest is the body of POST /accounts.
type accountRequest struct {
	User string `json:"user"`
}

// accountAnswer describes the account that there is now.
type accountAnswer struct {
	User    string `json:"user"`
	UID     uint32 `json:"uid"`
	GID     uint32 `json:"gid"`
	Home    string `json:"home"`
	Created bool   `json:"created"`
}

// postAccounts sees that an account exists, as a USER step of a build does. The image need not have programs for that. The
// proxy lets nobody but the node reach this route.
func (s *Server) postAccounts(w http.ResponseWriter, r *http.Request) {
	var req accountRequest
	err := decodeJSON(w, r, maxRequestBytes, &req)
	if err == nil && !accountName.MatchString(req.User) {
		err = httpErrorf(http.StatusBadRequest, "user %.80q: want 1 to 32 letters, digits, '_', '-' and '.'", req.User)
	}
	if err != nil {
		writeError(w, err)
		return
	}
	a, created, err := s.users.ensure(req.User)
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, accountAnswer{User: a.name, UID: a.uid, GID: a.gid, Home: a.home, Created: created})
}

// ensure returns an account, and makes it with its group and home where there is none. A number that nobody has becomes an
// account of that number.
func (u *users) ensure(name string) (a *account, created bool, err error) {
	u.adding.Lock()
	defer u.adding.Unlock()
	a, err = u.lookup(name)
	if unknown := (*unknownUserError)(nil); !errors.As(err, &unknown) {
		return a, false, err
	}
	table, err := u.load()
	if err != nil {
		return nil, false, err
	}
	a = newAccount(name, table)
	if err := u.add(a, table); err != nil {
		return nil, false, fmt.Errorf("make user '%s': %w", name, err)
	}
	home := filepath.Join(u.root, a.home)
	if err := os.MkdirAll(filepath.Dir(home), 0o755); err != nil { //nolint:gosec // Every user passes through it.
		return nil, false, err
	}
	err = os.Mkdir(home, 0o755) //nolint:gosec // The mode of other homes.
	if err == nil && os.Getuid() == 0 {
		err = os.Chown(home, int(a.uid), int(a.gid))
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, false, err
	}
	return a, true, nil
}

// newAccount chooses the ids of an account: those of its number, or the first that no user and no group has.
func newAccount(name string, table *accountTable) *account {
	a := &account{name: name, home: "/home/" + name}
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		a.name, a.home, a.uid = "u"+name, "/home/u"+name, uint32(n)
	} else {
		for a.uid = firstUserID; table.byUID[a.uid] != nil || table.groups[a.uid] != ""; {
			a.uid++
		}
	}
	a.gid = a.uid
	for gid, group := range table.groups {
		if group == a.name {
			a.gid = gid
		}
	}
	return a
}

// add writes the account's lines. Shadow files are only kept where the image has them; no password fits.
func (u *users) add(a *account, table *accountTable) error {
	shell := "/bin/sh"
	if _, err := os.Stat(filepath.Join(u.root, "bin/bash")); err == nil {
		shell = "/bin/bash"
	}
	lines := []struct {
		file, line string
		always     bool
	}{
		{"etc/group", fmt.Sprintf("%s:x:%d:", a.name, a.gid), true},
		{"etc/gshadow", a.name + ":!::", false},
		{"etc/shadow", a.name + ":*:19000:0:99999:7:::", false},
		{"etc/passwd", fmt.Sprintf("%s:x:%d:%d::%s:%s", a.name, a.uid, a.gid, a.home, shell), true},
	}
	if table.groups[a.gid] != "" {
		lines = lines[2:]
	}
	for _, l := range lines {
		if err := appendLine(filepath.Join(u.root, l.file), l.line, l.always); err != nil {
			return err
		}
	}
	return nil
}

// appendLine adds a line to a text file, whose last line may lack its end.
func appendLine(name, line string, create bool) error {
	old, err := os.ReadFile(name) //nolint:gosec // One of four fixed names below the root.
	switch missing := errors.Is(err, fs.ErrNotExist); {
	case missing && !create:
		return nil
	case err != nil && !missing:
		return err
	}
	text := string(old)
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	return os.WriteFile(name, []byte(text+line+"\n"), 0o644) //nolint:gosec // The mode counts for a new file only; these are read by all.
}
