package hosts_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/test/harness"
)

// TestClusterBucket brings a paused sandbox back from a bucket, its node being lost with the only copy on a disk.
func TestClusterBucket(t *testing.T) {
	const at = "10.99.0.13:9000" // of the machine that is added fourth
	c := harness.NewCluster(t, harness.Shape{Nodes: 2, Programs: []string{workloadDir}, Flags: hasty(
		"--snapshot-replicas", "1", "--s3-endpoint", "http://"+at, "--s3-bucket", "kept", "--s3-access-key", "key", "--s3-secret-key", "secret",
	)})
	backend := s3mem.New()
	if err := backend.CreateBucket("kept"); err != nil {
		t.Fatal(err)
	}
	l, err := c.Lab.Machine("s3").Listen(t.Context(), at)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: gofakes3.New(backend, gofakes3.WithLogger(gofakes3.DiscardLog())).Server(), ReadHeaderTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-served })

	victim := c.Nodes[0]
	s := sandboxOn(t, c, victim)
	work(t, c, c.Server, s.ID)
	if _, err := c.Client().PauseSandbox(t.Context(), s.ID, ""); err != nil {
		t.Fatal(err)
	}
	c.Wait("a copy in the bucket", func(context.Context) bool { return guarded(t, c, s.ID) })
	if got := checkpointsIn(t, backend); got == 0 {
		t.Error("nothing is in the bucket")
	}
	victim.Kill()
	c.Wait("the sandbox on the other node", func(ctx context.Context) bool {
		got, err := c.Client().GetSandbox(ctx, s.ID)
		return err == nil && got.State == "paused" && c.Machine(got.NodeID) == c.Nodes[1]
	})
	if _, err := c.Client().ResumeSandbox(t.Context(), s.ID, client.ResumeSandbox{}); err != nil {
		t.Fatal(err)
	}
	checkWork(t, c, c.Server, s.ID)
	c.Wait("the bucket to be empty of what nobody needs", func(context.Context) bool { return checkpointsIn(t, backend) == 0 })
}

// checkpointsIn counts the objects of checkpoints in the bucket.
func checkpointsIn(t *testing.T, b gofakes3.Backend) int {
	t.Helper()
	list, err := b.ListBucket("kept", nil, gofakes3.ListBucketPage{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, o := range list.Contents {
		if strings.Contains(o.Key, "checkpoints/") {
			n++
		}
	}
	return n
}
