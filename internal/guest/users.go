package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// maxAccountFile bounds what is read of passwd and group.
const maxAccountFile = 4 << 20

// account is one line of passwd with its groups.
type account struct {
	name   string
	home   string
	uid    uint32
	gid    uint32
	groups []uint32
}

// unknownUserError says that there is no such account.
type unknownUserError struct{ name string }

func (e *unknownUserError) Error() string { return "user: unknown user " + e.name }

// users looks accounts up in the passwd and group files below root, which processes in the sandbox may change at any
// time: the parsed tables are kept for as long as the files stay the same.
type users struct {
	root string

	adding sync.Mutex // held while an account is made; taken before mu

	mu     sync.Mutex
	passwd fileStamp
	group  fileStamp
	table  *accountTable
}

// fileStamp tells one version of a file from the next.
type fileStamp struct {
	modified time.Time
	size     int64
}

type accountTable struct {
	byName map[string]*account
	byUID  map[uint32]*account
	groups map[uint32]string
}

// lookup finds an account by name, or by number where no name matches.
func (u *users) lookup(name string) (*account, error) {
	t, err := u.load()
	if err != nil {
		return nil, err
	}
	if a := t.byName[name]; a != nil {
		return a, nil
	}
	if id, err := strconv.ParseUint(name, 10, 32); err == nil {
		if a := t.byUID[uint32(id)]; a != nil {
			return a, nil
		}
	}
	return nil, &unknownUserError{name}
}

// fallback returns whom requests act as that name nobody where there is no default user: the image is not ours, or somebody
// has deleted the account. Root is always there.
func (u *users) fallback() *account {
	if a, err := u.lookup("root"); err == nil {
		return a
	}
	return &account{name: "root", home: "/", groups: []uint32{0}}
}

// names returns a uid's and a gid's names, or their numbers where they have none.
func (u *users) names(uid, gid uint32) (owner, group string) {
	owner, group = strconv.FormatUint(uint64(uid), 10), strconv.FormatUint(uint64(gid), 10)
	t, err := u.load()
	if err != nil {
		return owner, group
	}
	if a := t.byUID[uid]; a != nil {
		owner = a.name
	}
	if name, ok := t.groups[gid]; ok {
		group = name
	}
	return owner, group
}

func (u *users) load() (*accountTable, error) {
	passwdPath, groupPath := filepath.Join(u.root, "etc/passwd"), filepath.Join(u.root, "etc/group")
	passwd, err := stampOf(passwdPath)
	if errors.Is(err, fs.ErrNotExist) { // an image of a single program
		return parseAccounts("", ""), nil
	}
	if err != nil {
		return nil, fmt.Errorf("look accounts up: %w", err)
	}
	group, _ := stampOf(groupPath) // an image without groups is odd, but works
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.table != nil && u.passwd == passwd && u.group == group {
		return u.table, nil
	}
	passwdText, err := readBounded(passwdPath)
	if err != nil {
		return nil, fmt.Errorf("look accounts up: %w", err)
	}
	groupText, _ := readBounded(groupPath)
	u.table, u.passwd, u.group = parseAccounts(passwdText, groupText), passwd, group
	return u.table, nil
}

func stampOf(path string) (fileStamp, error) {
	info, err := os.Stat(path)
	if err != nil {
		return fileStamp{}, err
	}
	return fileStamp{info.ModTime(), info.Size()}, nil
}

func readBounded(path string) (string, error) {
	f, err := os.Open(path) //nolint:gosec // The path is one of two fixed names below the root.
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // Nothing was written.
	text, err := io.ReadAll(io.LimitReader(f, maxAccountFile))
	return string(text), err
}

// parseAccounts skips lines that it does not understand. Where a name or number occurs twice, the first line counts.
func parseAccounts(passwd, group string) *accountTable {
	t := &accountTable{byName: map[string]*account{}, byUID: map[uint32]*account{}, groups: map[uint32]string{}}
	forLines(passwd, 7, func(f []string) {
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if f[0] == "" || err1 != nil || err2 != nil || t.byName[f[0]] != nil {
			return
		}
		a := &account{
			name: f[0], home: f[5], uid: uint32(uid), gid: uint32(gid), groups: []uint32{uint32(gid)},
		}
		if !filepath.IsAbs(a.home) {
			a.home = "/"
		}
		t.byName[a.name] = a
		if t.byUID[a.uid] == nil {
			t.byUID[a.uid] = a
		}
	})
	forLines(group, 4, func(f []string) {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if f[0] == "" || err != nil {
			return
		}
		if _, ok := t.groups[uint32(gid)]; !ok {
			t.groups[uint32(gid)] = f[0]
		}
		for member := range strings.SplitSeq(f[3], ",") {
			if a := t.byName[member]; a != nil && !slices.Contains(a.groups, uint32(gid)) { //nolint:gosec // Parsed as 32 bits.
				a.groups = append(a.groups, uint32(gid)) //nolint:gosec // As above.
			}
		}
	})
	return t
}

// forLines calls use with the fields of each line that has n of them.
func forLines(text string, n int, use func(fields []string)) {
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if fields := strings.Split(line, ":"); len(fields) == n {
			use(fields)
		}
	}
}
