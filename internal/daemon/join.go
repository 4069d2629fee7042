package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/auth"
	"github.com/cloister-dev/cloister/internal/config"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/gen/cluster/v1/clusterv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// JoinOptions say which cluster a machine joins, and as what.
type JoinOptions struct {
	// Server is the HOST or HOST:PORT of a server's cluster port; the port is 3003 where it has none.
	Server, Token string
	// Role is node or proxy; empty takes node.
	Role string
	// Name and Address go before the settings node-name and node-address; Labels, KEY=VALUE each, beside node-labels.
	Name, Address string
	Labels        []string
	Version       string
	// Notify is told what is under way.
	Notify func(message string)
}

// Joined is what a machine has become.
type Joined struct {
	Role      string    `json:"role"`
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	ClusterID string    `json:"cluster_id"`
	Servers   []string  `json:"servers"`
	ExpiresAt time.Time `json:"expires_at"`
	// Running means that its role runs already; Again that it had joined before.
	Running bool `json:"running"`
	Again   bool `json:"again"`
}

// defaultClusterPort is what a server's address without a port means.
const defaultClusterPort = "3003"

// joinTimeout bounds a join's one call.
const joinTimeout = 30 * time.Second

// Join makes the machine a member of a cluster and keeps its identity in the data directory. Repeated, it goes on where it
// was: the same machine is the same member. Errors: ErrConflict where the data directory belongs to a server, another
// cluster or another role; ErrDenied for a token that is no good, or a server that is not the token's; ErrUnavailable
// where nobody answers; ErrUnsupported for the role of a server.
func Join(ctx context.Context, cfg *config.Config, o JoinOptions) (Joined, error) {
	j, err := newJoin(cfg, o)
	if err != nil {
		return Joined{}, err
	}
	held, err := acquire(ctx, cfg.DataDir, o.Version)
	if err != nil {
		return j.running(err)
	}
	defer held.release()
	if isServer(cfg.DataDir) {
		return Joined{}, serverHere(cfg.DataDir)
	}
	if err := j.open(ctx, held.holder.Node); err != nil {
		return Joined{}, err
	}
	if j.identity.Joined() && time.Now().Before(j.identity.Expires()) {
		return j.joined(true), j.choices.write(cfg.DataDir)
	}
	if o.Notify != nil {
		o.Notify("joining by way of " + j.server)
	}
	if err := j.ask(ctx, o.Version); err != nil {
		return Joined{}, err
	}
	return j.joined(false), nil
}

// join is one attempt to become a member.
type join struct {
	dataDir  string
	server   string
	role     sandbox.Role
	token    auth.JoinToken
	choices  choices
	identity *auth.Identity
}

func newJoin(cfg *config.Config, o JoinOptions) (*join, error) {
	token, err := auth.ParseJoinToken(o.Token)
	if err != nil {
		return nil, err
	}
	j := &join{dataDir: cfg.DataDir, role: sandbox.RoleNode, token: token}
	if o.Role != "" {
		j.role = sandbox.Role(o.Role)
	}
	switch {
	case !j.role.Valid():
		return nil, sandbox.Invalidf("role %.40q: want node or proxy", o.Role)
	case j.role == sandbox.RoleServer:
		return nil, sandbox.Unsupportedf("a cluster has one server yet: want --role node or --role proxy")
	}
	if j.server, err = clusterAddress(o.Server); err != nil {
		return nil, err
	}
	all := *cfg
	all.NodeLabels = append(append([]string(nil), cfg.NodeLabels...), o.Labels...)
	labels, err := all.Labels()
	if err != nil {
		return nil, err
	}
	j.choices = choices{Name: cfg.NodeName, Labels: labels, Address: cfg.NodeAddress, Fingerprint: token.Fingerprint, Server: j.server}
	if o.Name != "" {
		j.choices.Name = o.Name
	}
	if o.Address != "" {
		j.choices.Address = o.Address
	}
	return j, nil
}

// clusterAddress completes the address of a server's cluster port. Errors: ErrInvalid.
func clusterAddress(text string) (string, error) {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		host, port = strings.Trim(text, "[]"), defaultClusterPort
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" || strings.ContainsAny(host, "/ @") {
		return "", sandbox.Invalidf("server %.80q: want HOST or HOST:PORT, such as 192.0.2.1:3003", text)
	}
	return net.JoinHostPort(host, port), nil
}

// running tells of a machine whose data directory is in use: by the same membership that is asked for, or by something else.
func (j *join) running(busy error) (Joined, error) {
	if !errors.Is(busy, sandbox.ErrConflict) {
		return Joined{}, busy
	}
	id, err := openIdentity(j.dataDir)
	if err != nil {
		if isServer(j.dataDir) {
			return Joined{}, serverHere(j.dataDir)
		}
		return Joined{}, busy
	}
	kept, err := readChoices(j.dataDir)
	if err != nil {
		return Joined{}, err
	}
	if err := j.same(id, kept); err != nil {
		return Joined{}, err
	}
	j.identity, j.choices = id, kept
	done := j.joined(true)
	done.Running = true
	return done, nil
}

// same refuses an identity of another cluster or role. Errors: ErrConflict.
func (j *join) same(id *auth.Identity, kept choices) error {
	if kept.Fingerprint != j.token.Fingerprint {
		return sandbox.Conflictf("this machine is %s of another cluster (authority %.8s…, the token is for %.8s…): `cloister leave` takes it out of that one, "+
			"or --data-dir names a directory for a second member", id.Member(), kept.Fingerprint, j.token.Fingerprint)
	}
	if id.Member().Role != j.role {
		return sandbox.Conflictf("this machine is a %s of the cluster already (%s): `cloister leave` ends that, or --data-dir names a directory for a second member",
			id.Member().Role, id.Member().ID)
	}
	return nil
}

// open takes up the identity that an earlier attempt began with, or begins with one. Key and id are on the disk before
// the server is asked: an answer that is lost then means nothing.
func (j *join) open(ctx context.Context, known sandbox.NodeID) error {
	id, err := openIdentity(j.dataDir)
	if err == nil {
		kept, err := readChoices(j.dataDir)
		if err != nil {
			return err
		}
		other := j.same(id, kept)
		if other == nil || id.Joined() {
			j.identity = id
			return other
		}
		// An attempt elsewhere, or as something else, that came to nothing.
		if err := auth.Remove(filepath.Join(j.dataDir, identityDir)); err != nil {
			return err
		}
	} else if !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	member := sandbox.Member{Role: j.role, ID: string(sandbox.NewNodeID())}
	if j.role == sandbox.RoleNode {
		// What an earlier node of this directory left on the machine carries its id.
		if left, err := nodeToPurge(ctx, j.dataDir, known); err == nil && left != "" {
			member.ID = string(left)
		}
	}
	if err := j.choices.write(j.dataDir); err != nil {
		return err
	}
	j.identity, err = auth.NewIdentity(filepath.Join(j.dataDir, identityDir), member)
	return err
}

// ask has the server make the machine a member.
func (j *join) ask(ctx context.Context, version string) error {
	if err := j.choices.write(j.dataDir); err != nil {
		return err
	}
	request, err := j.identity.NewRequest()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	transport := &http.Transport{TLSClientConfig: auth.PinnedTLS(j.token.Fingerprint), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	client := clusterv1connect.NewJoinServiceClient(&http.Client{Transport: transport}, "https://"+j.server)
	resp, err := client.Join(ctx, &clusterv1.JoinRequest{
		Token: j.token.Text, Role: roleToWire(j.role), Id: j.identity.Member().ID, Name: j.choices.Name,
		CertificateRequest: request.DER, Version: version,
	})
	if err != nil {
		return fmt.Errorf("join by way of %s: %w", j.server, joinError(err))
	}
	return j.identity.Save(request, auth.Grant{CertPEM: resp.GetCertificate(), AuthorityPEM: resp.GetAuthority(), Servers: resp.GetServers()})
}

func (j *join) joined(again bool) Joined {
	id := j.identity
	return Joined{
		Role: string(id.Member().Role), ID: id.Member().ID, Name: j.choices.Name, ClusterID: id.ClusterID(), Servers: id.Servers(),
		ExpiresAt: id.Expires(), Again: again,
	}
}

func roleToWire(r sandbox.Role) clusterv1.Role {
	switch r {
	case sandbox.RoleNode:
		return clusterv1.Role_ROLE_NODE
	case sandbox.RoleProxy:
		return clusterv1.Role_ROLE_PROXY
	case sandbox.RoleServer:
		return clusterv1.Role_ROLE_SERVER
	}
	return clusterv1.Role_ROLE_UNSPECIFIED
}

// joinError says which it was: nobody there, the wrong server, or what the right one answered.
func joinError(err error) error {
	if errors.Is(err, sandbox.ErrDenied) {
		return denied(err)
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return sandbox.Unavailablef("nobody answers there (%v): is the address right, does the server run, and is its cluster port open to this machine?", rootCause(err))
	}
	if errors.Is(err, http.ErrSchemeMismatch) {
		return sandbox.Unavailablef("what answers there does not speak TLS: want the server's cluster port, which is %s by default", defaultClusterPort)
	}
	answer, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return err
	}
	return kindOf(answer)
}

// denied is the reason why the handshake was refused, without what net/http puts around it.
func denied(err error) error {
	why := err
	for e := err; e != nil && e != sandbox.ErrDenied; e = errors.Unwrap(e) { //nolint:errorlint // the end of the chain is the kind itself
		if errors.Is(e, sandbox.ErrDenied) {
			why = e
		}
	}
	return why
}

// rootCause is the innermost error.
func rootCause(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// kindOf gives what a server answered its kind.
func kindOf(answer *connect.Error) error {
	text := answer.Message()
	switch answer.Code() { //nolint:exhaustive // the rest has no kind
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		return sandbox.Deniedf("%s", text)
	case connect.CodeFailedPrecondition, connect.CodeAlreadyExists:
		return sandbox.Conflictf("%s", text)
	case connect.CodeInvalidArgument:
		return sandbox.Invalidf("%s", text)
	case connect.CodeUnimplemented:
		return sandbox.Unsupportedf("%s", text)
	case connect.CodeNotFound:
		return sandbox.NotFoundf("%s", text)
	case connect.CodeResourceExhausted:
		return sandbox.Exhaustedf("%s", text)
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return sandbox.Unavailablef("%s", text)
	}
	return answer
}
