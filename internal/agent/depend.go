package agent

import (
	"context"
	"io"
	"net"
	"os"

	"github.com/cloister-dev/cloister/internal/guestnet"
	"github.com/cloister-dev/cloister/internal/image"
	"github.com/cloister-dev/cloister/internal/journal"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// network gives each sandbox its network. It has more methods than our interfaces usually do, because one life of one
// thing is behind them.
type network interface {
	Acquire(ctx context.Context, id sandbox.ID, p guestnet.Policy) (guestnet.Attachment, error)
	SetPolicy(ctx context.Context, id sandbox.ID, p guestnet.Policy) error
	Adopt(ctx context.Context, a guestnet.Attachment, p guestnet.Policy) error
	Release(ctx context.Context, id sandbox.ID) error
	Sweep(ctx context.Context) error
}

// images makes and keeps root file system images.
type images interface {
	Build(ctx context.Context, r image.Request, progress func(image.Progress)) (image.Image, error)
	Path(digest string) (string, error)
	Remove(ctx context.Context, digest string) error
	List(ctx context.Context) ([]image.Image, error)
	Recover(ctx context.Context) error
	imageMover
	composer
}

// imageMover moves images from and to other nodes.
type imageMover interface {
	Open(ctx context.Context, digest string) (image.Image, *os.File, error)
	Import(ctx context.Context, digest string) (*image.Import, error)
	SweepPartial(ctx context.Context) error
}

// checkpoints keeps what sandboxes were saved as.
type checkpoints interface {
	Begin(id string) (*snapshot.Staging, error)
	Commit(st *snapshot.Staging, m snapshot.Manifest) (snapshot.Manifest, error)
	Get(id string) (snapshot.Manifest, error)
	List() []snapshot.Manifest
	Remove(id string) error
	Recover(ctx context.Context) error
	Bytes() int64
	checkpointMover
}

// checkpointMover hands checkpoints out, gets others from elsewhere, and has what came along with them.
type checkpointMover interface {
	Hold(id string) (*snapshot.Held, error)
	Import(id string) (*snapshot.Import, error)
	Parcel(id string) ([]byte, error)
	Sweep(ctx context.Context) error
}

// peers connects to other nodes. The connection carries HTTP to what Artifacts of that node serves.
type peers interface {
	DialPeer(ctx context.Context, node sandbox.NodeID, address string) (net.Conn, error)
}

// bucketStore keeps files by name. A size of -1 is one that is not known.
type bucketStore interface {
	Put(ctx context.Context, name string, r io.Reader, size int64) error
	Get(ctx context.Context, name string, from int64) (io.ReadCloser, error)
	List(ctx context.Context, prefix string) ([]string, error)
	Remove(ctx context.Context, name string) error
}

func fromAttachment(a *guestnet.Attachment) journal.Network {
	return journal.Network{NetNS: a.NetNS, Link: a.Link, GuestAddr: a.GuestAddr, Gateway: a.Gateway}
}

func toAttachment(id sandbox.ID, n *journal.Network) guestnet.Attachment {
	return guestnet.Attachment{SandboxID: id, NetNS: n.NetNS, Link: n.Link, GuestAddr: n.GuestAddr, Gateway: n.Gateway}
}

func policyOf(r *journal.Record) guestnet.Policy {
	return guestnet.Policy{AllowInternet: r.AllowInternet || r.Warm}
}
