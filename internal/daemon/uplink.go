package daemon

import (
	"context"
	"sync"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/gen/node/v1/nodev1connect"
)

// uplink is the node's way to its server, in the same process or elsewhere. It notes when the server first knows everything
// that the node runs: before that, the API would answer that sandboxes of an earlier process do not exist.
type uplink struct {
	nodev1connect.NodeServiceClient
	// refused takes whom the server refuses; nil where the server is in the same process.
	refused *refused

	once   sync.Once
	synced chan struct{}
}

func newUplink(server nodev1connect.NodeServiceClient) *uplink {
	return &uplink{NodeServiceClient: server, synced: make(chan struct{})}
}

// Report passes a report on.
func (u *uplink) Report(ctx context.Context, req *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	if u.refused != nil {
		req.RefusalsVersion = u.refused.known()
	}
	resp, err := u.NodeServiceClient.Report(ctx, req)
	if err == nil && u.refused != nil {
		u.refused.take(resp)
	}
	if err == nil {
		u.once.Do(func() { close(u.synced) })
	}
	return resp, err
}

// wait blocks until the server knows what the node runs.
func (u *uplink) wait(ctx context.Context) error {
	select {
	case <-u.synced:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
