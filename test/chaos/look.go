package chaos

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	_ "modernc.org/sqlite" // the journal's format

	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/test/harness"
)

// errMoving says that a journal was written to while it was copied.
var errMoving = errors.New("the journal changes while it is read")

// readJournal returns the records of a node's journal, as they are on the disk. Nobody else can open the file while the node
// runs, so a copy is read; a copy that was written to meanwhile does not count.
func readJournal(ctx context.Context, m *harness.Machine, scratch string) ([]journal.Record, error) {
	err := errMoving
	for range 20 {
		var out []journal.Record
		if out, err = readCopy(ctx, m, scratch); err == nil {
			return out, nil
		}
		if !pause(ctx, 20*time.Millisecond) {
			break
		}
	}
	return nil, fmt.Errorf("read the journal of %s: %w", m.Name, err)
}

func readCopy(ctx context.Context, m *harness.Machine, scratch string) ([]journal.Record, error) {
	dir, err := os.MkdirTemp(scratch, m.Name)
	if err != nil {
		return nil, fmt.Errorf("make a place for the copy: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // it goes with the test, too
	from, to := filepath.Join(m.DataDir(), "node", "journal.db"), filepath.Join(dir, "journal.db")
	before, err := stamp(from)
	if err != nil {
		return nil, err
	}
	for _, end := range []string{"", "-wal"} {
		raw, err := os.ReadFile(from + end) //nolint:gosec // a file of the test's own node
		if err == nil {
			err = os.WriteFile(to+end, raw, 0o600) //nolint:gosec // below the test's own directory
		}
		if err != nil && (end == "" || !errors.Is(err, fs.ErrNotExist)) {
			return nil, fmt.Errorf("copy: %w", err)
		}
	}
	if after, err := stamp(from); err != nil || after != before {
		return nil, errors.Join(errMoving, err)
	}
	return records(ctx, to)
}

// stamp changes with every write to the journal's files.
func stamp(path string) (string, error) {
	var out strings.Builder
	for _, end := range []string{"", "-wal"} {
		info, err := os.Stat(path + end)
		if errors.Is(err, fs.ErrNotExist) && end != "" {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("look at the journal: %w", err)
		}
		fmt.Fprintf(&out, "%d %d ", info.Size(), info.ModTime().UnixNano())
	}
	return out.String(), nil
}

func records(ctx context.Context, path string) (out []journal.Record, err error) {
	db, err := sql.Open("sqlite", "file:"+path)
	if err != nil {
		return nil, fmt.Errorf("open the copy: %w", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	rows, err := db.QueryContext(ctx, "SELECT record FROM sandboxes")
	if err != nil {
		return nil, fmt.Errorf("read the copy: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var raw []byte
		var r journal.Record
		if err := rows.Scan(&raw); err != nil {
			return nil, fmt.Errorf("read the copy: %w", err)
		}
		if err := json.Unmarshal(raw, &r); err != nil {
			return nil, fmt.Errorf("decode a record: %w", err)
		}
		out = append(out, r)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read the copy: %w", err)
	}
	return out, nil
}

// instant names one process for good: its number may be used again.
type instant struct {
	pid    int
	parent string
	begun  string
}

// alive reports whether the process is there and no zombie, and returns its name.
func alive(pid int) (instant, bool) {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return instant{}, false
	}
	fields := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	const state, parent, begun = 0, 4 - 3, 22 - 3 // counted from the third
	if len(fields) <= begun || fields[state] == "Z" || fields[state] == "X" {
		return instant{}, false
	}
	return instant{pid, fields[parent], fields[begun]}, true
}

// cmdline returns a process's arguments; none where it has gone.
func cmdline(pid string) string {
	raw, _ := os.ReadFile(filepath.Join("/proc", pid, "cmdline")) //nolint:gosec // of a process; empty where it has gone
	return string(raw)
}

// sentries returns the processes of each sandbox of each machine, by the machine's name. What a sandbox's process has forked
// is not counted: it looks like its parent until it has become something else.
func sentries(machines []*harness.Machine) map[string]map[string][]int {
	out := make(map[string]map[string][]int, len(machines))
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return out
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		args := cmdline(e.Name())
		if !strings.HasPrefix(args, "runsc-sandbox\x00") {
			continue
		}
		for _, m := range machines {
			_, rest, found := strings.Cut(args, "\x00--bundle="+filepath.Join(m.DataDir(), "node", "gvisor")+"/")
			p, ok := alive(pid)
			if !found || !ok || strings.HasPrefix(cmdline(p.parent), "runsc-sandbox\x00") {
				continue
			}
			if out[m.Name] == nil {
				out[m.Name] = make(map[string][]int)
			}
			id, _, _ := strings.Cut(rest, "\x00")
			out[m.Name][id] = append(out[m.Name][id], pid)
		}
	}
	return out
}

// still returns those of the processes that are the same and alive at this moment.
func still(all map[string]map[string][]int, begun map[int]instant) map[string]map[string][]int {
	out := make(map[string]map[string][]int, len(all))
	for machine, boxes := range all {
		out[machine] = make(map[string][]int)
		for id, pids := range boxes {
			for _, pid := range pids {
				if p, ok := alive(pid); ok && p == begun[pid] {
					out[machine][id] = append(out[machine][id], pid)
				}
			}
		}
	}
	return out
}

// twice says which sandboxes run more than once at one moment. The machine cannot be looked at all at once: what was seen is
// looked at again. Of a sandbox that moves there is a process at both ends, which stands still wherever the record says that it
// is migrating.
func (r *Run) twice(ctx context.Context) []Violation {
	seen := sentries(r.cluster.Nodes)
	begun := make(map[int]instant)
	for _, boxes := range seen {
		for _, pids := range boxes {
			for _, pid := range pids {
				if p, ok := alive(pid); ok {
					begun[pid] = p
				}
			}
		}
	}
	if len(Twice(still(seen, begun))) == 0 {
		return nil
	}
	for _, m := range r.cluster.Nodes {
		records, err := readJournal(ctx, m, r.scratch)
		if err != nil {
			return nil // it is being written to: the next time
		}
		Standing(seen[m.Name], records)
	}
	return Twice(still(seen, begun))
}

// groups returns the sandboxes of a node that have a control group.
func groups(node string) []string {
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup/*/cloister-" + node + "/*", "/sys/fs/cgroup/cloister-" + node + "/*"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			continue // the pattern is ours
		}
		for _, path := range paths {
			info, err := os.Stat(path)
			if _, bad := sandbox.ParseID(filepath.Base(path)); err == nil && info.IsDir() && bad == nil {
				out = append(out, filepath.Base(path))
			}
		}
	}
	return out
}

// checkpoints returns the ages of the checkpoints that a machine has.
func checkpoints(m *harness.Machine) map[string]time.Duration {
	out := make(map[string]time.Duration)
	dir := filepath.Join(m.DataDir(), "node", "snapshots")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return out
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			out[e.Name()] = time.Since(info.ModTime())
		}
	}
	return out
}

// links counts the network links for sandboxes that a machine's node has.
func links(ctx context.Context, m *harness.Machine, node string) int {
	out, _ := m.Run(ctx, "ip", "-o", "link")
	return strings.Count(out, ": clo"+node)
}

// pause waits, and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
