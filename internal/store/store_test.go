package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// childArg as the first argument makes this test binary a store, in the directory that follows, to be killed.
const childArg = "write-for-ever"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == childArg {
		panic(writeForEver(os.Args[2]))
	}
	goleak.VerifyTestMain(m)
}

// writeForEver opens a store and prints the number of each node record once it is acknowledged.
func writeForEver(dir string) error {
	ctx := context.Background()
	s, err := Open(ctx, Config{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		n := sandbox.Node{ID: sandbox.NodeID(fmt.Sprintf("n%05d", i)), Name: "written"}
		if err := s.PutNode(ctx, n); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(os.Stdout, i); err != nil {
			return err
		}
	}
}

func open(tb testing.TB, dir string) *Store {
	tb.Helper()
	s, err := Open(context.Background(), Config{Dir: dir, Logger: slog.New(slog.NewTextHandler(tb.Output(), nil))})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func fresh(tb testing.TB) *Store {
	tb.Helper()
	s := open(tb, tb.TempDir())
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// run keeps s.Run going until the test ends.
func run(t *testing.T, s *Store) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// eventually polls cond, which a background follower makes true.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline, tick := time.After(10*time.Second), time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never came true: %s", what)
		}
	}
}

func TestOpenTwiceIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	_, err := Open(context.Background(), Config{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	if !errors.Is(err, sandbox.ErrConflict) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("second Open: %v, want a conflict that names this process", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := open(t, dir).Close(); err != nil {
		t.Errorf("Open after Close: %v", err)
	}
}

func TestOpenNeedsConfig(t *testing.T) {
	if _, err := Open(context.Background(), Config{}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("Open without a directory: %v, want ErrInvalid", err)
	}
}

func TestListensNowhere(t *testing.T) {
	s := fresh(t)
	if len(s.etcd.Clients) != 0 || len(s.etcd.Peers) != 0 {
		t.Errorf("etcd has %d client and %d peer listeners, want none", len(s.etcd.Clients), len(s.etcd.Peers))
	}
}

func TestStatus(t *testing.T) {
	s := fresh(t)
	if err := s.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	st := s.Status()
	if st.Members != 1 || !st.Leader || st.QuotaBytes != defaultQuota || st.SizeBytes <= 0 {
		t.Errorf("Status() = %+v", st)
	}
}

func TestFillLevel(t *testing.T) {
	for size, want := range map[int64]int64{0: 0, 499: 0, 500: 50, 799: 50, 800: 80, 2000: 80} {
		if got := fillLevel(size, 1000); got != want {
			t.Errorf("fillLevel(%d, 1000) = %d, want %d", size, got, want)
		}
	}
}

func TestRecordsSurviveReopen(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := open(t, dir)
	node := sandbox.Node{ID: "abcdef", Name: "one", State: sandbox.NodeReady, Labels: map[string]string{"zone": "a"}}
	tmpl := sandbox.Template{ID: sandbox.NewTemplateID(), Names: []string{"base"}, CreatedAt: time.Unix(1, 0).UTC()}
	secret, err := s.Secret(ctx, "token", 32)
	id, idErr := s.ClusterID(ctx)
	key, keyErr := s.CreateKey(ctx, Key{Name: "admin", Hash: "h1", Hint: "e2b_1…f", Admin: true})
	if err := errors.Join(err, idErr, keyErr, s.PutNode(ctx, node), s.CreateTemplate(ctx, tmpl), s.Close()); err != nil {
		t.Fatal(err)
	}

	s = open(t, dir)
	defer func() { _ = s.Close() }()
	if got, err := s.Node(ctx, "abcdef"); err != nil || !cmp.Equal(got, node) {
		t.Errorf("Node: %v, %s", err, cmp.Diff(node, got))
	}
	if got, err := s.Template(ctx, "base"); err != nil || !cmp.Equal(got, tmpl) {
		t.Errorf("Template: %v, %s", err, cmp.Diff(tmpl, got))
	}
	if got, err := s.KeyByHash("h1"); err != nil || got != key {
		t.Errorf("KeyByHash: %v, %s", err, cmp.Diff(key, got))
	}
	if got, err := s.Secret(ctx, "token", 32); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("Secret: %v, %x, want %x", err, got, secret)
	}
	if got, err := s.ClusterID(ctx); err != nil || got != id || len(id) != 32 {
		t.Errorf("ClusterID: %v, %s, want %s", err, got, id)
	}
}

// TestSurvivesKill kills a process that writes as fast as it can: all that it had acknowledged must be there.
func TestSurvivesKill(t *testing.T) {
	dir := t.TempDir()
	for _, atLeast := range []int{1, 300} {
		acknowledged := writeAndKill(t, dir, atLeast)
		s := open(t, dir)
		nodes, err := s.Nodes(t.Context())
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		found := map[string]bool{}
		for _, n := range nodes {
			found[string(n.ID)] = n.Name == "written"
		}
		for i := range acknowledged + 1 {
			if !found[fmt.Sprintf("n%05d", i)] {
				t.Fatalf("record %d of %d acknowledged is lost", i, acknowledged)
			}
		}
	}
}

// writeAndKill returns the number of the last acknowledged record of a child that was killed.
func writeAndKill(t *testing.T, dir string, atLeast int) int {
	t.Helper()
	cmd := exec.Command(os.Args[0], childArg, dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	last := -1
	for last < atLeast {
		var i int
		if _, err := fmt.Fscanln(out, &i); err != nil {
			t.Errorf("child: %v", err)
			break
		}
		last = i
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // killed: always an error
	return last
}

func TestSecretIsSealed(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := open(t, dir)
	plain, err := s.Secret(ctx, "token", 32)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.client.Get(ctx, s.secrets.key("token"))
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("read the raw record: %v", err)
	}
	box, err := s.secrets.decode(resp.Kvs[0])
	if err != nil || bytes.Contains(box.Value.Box, plain) {
		t.Errorf("the stored record shows the secret (%v)", err)
	}
	if _, err := s.Secret(ctx, "token", 16); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("another size: %v, want ErrInvalid", err)
	}
	if _, err := s.seal.open("other", box.Value); err == nil {
		t.Error("a secret opens under another name")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, masterKeyName)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, Config{Dir: dir, Logger: slog.New(slog.DiscardHandler)}); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("Open without the master key: %v, want ErrUnavailable", err)
	}
}

func TestSecretIsMadeOnce(t *testing.T) {
	s := fresh(t)
	var wg sync.WaitGroup
	got := make([][]byte, 8)
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = s.Secret(t.Context(), "shared", 32); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, g := range got {
		if !bytes.Equal(g, got[0]) {
			t.Fatalf("two callers got %x and %x", got[0], g)
		}
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	s := fresh(t)
	ctx := t.Context()
	if _, err := s.client.Put(ctx, s.nodes.key("future"), `{"v":2,"d":{}}`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Put(ctx, s.nodes.key("junk"), `not json`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Node(ctx, "future"); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("a newer record: %v, want ErrUnsupported", err)
	}
	if _, err := s.Node(ctx, "junk"); err == nil {
		t.Error("a damaged record was read")
	}
	if _, err := s.Nodes(ctx); err == nil {
		t.Error("a list with damaged records was read")
	}
}

func TestNodes(t *testing.T) {
	s := fresh(t)
	ctx := t.Context()
	if _, err := s.Node(ctx, "nobody"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("Node: %v, want ErrNotFound", err)
	}
	if err := s.PutNode(ctx, sandbox.Node{ID: "a b"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("PutNode with a space in the id: %v, want ErrInvalid", err)
	}
	for _, id := range []sandbox.NodeID{"bbbbbb", "aaaaaa"} {
		if err := s.PutNode(ctx, sandbox.Node{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	cordon := func(n *sandbox.Node) error { n.State = sandbox.NodeCordoned; return nil }
	if n, err := s.UpdateNode(ctx, "aaaaaa", cordon); err != nil || n.State != sandbox.NodeCordoned {
		t.Errorf("UpdateNode = %+v, %v", n, err)
	}
	want := []sandbox.Node{{ID: "aaaaaa", State: sandbox.NodeCordoned}, {ID: "bbbbbb"}}
	if got, err := s.Nodes(ctx); err != nil || !cmp.Equal(got, want) {
		t.Errorf("Nodes: %v, %s", err, cmp.Diff(want, got))
	}
	if err := s.DeleteNode(ctx, "aaaaaa"); err != nil {
		t.Error(err)
	}
	if err := s.DeleteNode(ctx, "aaaaaa"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("DeleteNode again: %v, want ErrNotFound", err)
	}
}

func TestListPages(t *testing.T) {
	s := fresh(t)
	const n = pageSize + 500
	var ops []clientv3.Op
	for i := range n {
		ops = append(ops, clientv3.OpPut(s.nodes.key(fmt.Sprintf("%06d", i)), `{"v":1,"d":{}}`))
		if len(ops) == 128 || i == n-1 {
			if _, _, err := commit(t.Context(), s.client, nil, ops); err != nil {
				t.Fatal(err)
			}
			ops = nil
		}
	}
	records, rev, err := s.nodes.list(t.Context())
	if err != nil || len(records) != n || rev != s.Status().Revision {
		t.Fatalf("list: %d records at %d, %v; want %d at %d", len(records), rev, err, n, s.Status().Revision)
	}
	if records[n-1].Name != fmt.Sprintf("%06d", n-1) {
		t.Errorf("last record is %q", records[n-1].Name)
	}
}

func TestWatch(t *testing.T) {
	s := fresh(t)
	ctx, cancel := context.WithCancel(t.Context())
	if err := s.PutNode(ctx, sandbox.Node{ID: "first"}); err != nil {
		t.Fatal(err)
	}
	seen, done := make(chan string, 16), make(chan error, 1)
	go func() {
		done <- s.WatchNodes(ctx, Watcher[sandbox.Node]{
			Reset:  func(rs []Record[sandbox.Node], _ int64) { seen <- fmt.Sprintf("reset %d", len(rs)) },
			Put:    func(r Record[sandbox.Node]) { seen <- "put " + r.Name },
			Delete: func(name string, _ int64) { seen <- "delete " + name },
		})
	}()
	expect := func(want string) {
		t.Helper()
		if got := <-seen; got != want {
			t.Fatalf("watch saw %q, want %q", got, want)
		}
	}
	expect("reset 1")
	if err := s.PutNode(ctx, sandbox.Node{ID: "second"}); err != nil {
		t.Fatal(err)
	}
	expect("put second")
	if err := s.DeleteNode(ctx, "first"); err != nil {
		t.Fatal(err)
	}
	expect("delete first")
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("WatchNodes returned %v, want the context's error", err)
	}
}

// TestFollowAfterCompaction starts a watch at a revision that is no longer kept: it must say so, which lists again.
func TestFollowAfterCompaction(t *testing.T) {
	s := fresh(t)
	ctx := t.Context()
	for range 5 {
		if err := s.PutNode(ctx, sandbox.Node{ID: "n"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.client.Compact(ctx, s.Status().Revision); err != nil {
		t.Fatal(err)
	}
	err := s.nodes.follow(ctx, 1, Watcher[sandbox.Node]{Put: func(Record[sandbox.Node]) {}})
	if !errors.Is(err, errCompacted()) {
		t.Errorf("follow from a compacted revision: %v", err)
	}
}

func TestWatchEndsWithStore(t *testing.T) {
	s := open(t, t.TempDir())
	started, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- s.WatchNodes(context.Background(), Watcher[sandbox.Node]{
			Reset: func([]Record[sandbox.Node], int64) { close(started) },
		})
	}()
	<-started
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("watch of a closed store: %v, want ErrUnavailable", err)
	}
}
