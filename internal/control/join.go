package control

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/gen/cluster/v1/clusterv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/store"
)

var (
	_ clusterv1connect.JoinServiceHandler   = (*Control)(nil)
	_ clusterv1connect.MemberServiceHandler = (*Control)(nil)
)

// authority is what all members trust: it signs certificates, and mints and reads join tokens.
type authority interface {
	signer
	MintToken() (text string, err error)
	ReadToken(text string) (id, hash string, err error)
	// ReadPast says whose a certificate is that ended at most grace ago, by a request with its key.
	ReadPast(certPEM, request []byte, grace time.Duration, now time.Time) (sandbox.PastCertificate, error)
}

// signer makes a member of whoever has the key of a request. Its CertPEM is what members trust.
type signer interface {
	Sign(request []byte, m sandbox.Member, life time.Duration) (chain []byte, expires time.Time, err error)
	CertPEM() []byte
	ClusterID() string
}

// members keeps who belongs to the cluster. Admit uses a join token up in the same transaction.
type members interface {
	Admit(ctx context.Context, a store.Admission, now time.Time) (store.Member, error)
	// CheckToken uses nothing up.
	CheckToken(ctx context.Context, a store.Admission, now time.Time) (store.Token, error)
	Member(ctx context.Context, m sandbox.Member) (store.Member, error)
	roster
}

// roster is members without how they come.
type roster interface {
	Members(ctx context.Context) ([]store.Member, error)
	RenewMember(ctx context.Context, m sandbox.Member, keyFingerprint string, c store.Certificate, now time.Time) (store.Member, error)
	RemoveMember(ctx context.Context, m sandbox.Member, now time.Time) (store.Member, error)
	// Denied reports whether one left, from memory; an empty serial asks about no certificate.
	Denied(m sandbox.Member, serial string) bool
	// Refused returns all whom Denied is true for, and a version that changes with them.
	Refused() (version string, all []sandbox.Refusal)
}

// gate is the port by which members come in. Servers are the HOST:PORT of each server; Drop ends a member's connections.
type gate interface {
	Open(ctx context.Context) error
	Servers() []string
	Drop(m sandbox.Member)
}

// defaultLife is how long a member's certificate is good where nothing else is set.
const defaultLife = 24 * time.Hour

// defaultGrace is how long after the end of its certificate a member comes back without a token where nothing else is set.
const defaultGrace = 7 * 24 * time.Hour

// joining is what a server needs to have members. Without it, it is a cluster of one machine.
type joining struct {
	authority authority
	members   members
	tokens    tokens
	gate      gate
	life      time.Duration
	grace     time.Duration
	// leavers hands those who left to Run, which ends their connections when they had time to read the answer.
	leavers chan sandbox.Member
}

// maxLeavers bounds how many wait to be dropped; beyond it they are dropped at once.
const maxLeavers = 64

func newJoining(cfg *Config) *joining {
	j := &joining{
		authority: cfg.Authority, members: cfg.Members, tokens: cfg.Tokens, gate: cfg.Gate, life: cfg.CertificateLife, grace: cfg.CertificateGrace,
		leavers: make(chan sandbox.Member, maxLeavers),
	}
	setDefault(&j.life, defaultLife)
	setDefault(&j.grace, defaultGrace)
	return j
}

// on reports whether machines can join.
func (j *joining) on() bool {
	return j.authority != nil && j.members != nil && j.tokens != nil && j.gate != nil
}

// check returns ErrUnsupported where nobody can join.
func (j *joining) check() error {
	if !j.on() {
		return sandbox.Unsupportedf("this server has no port for other machines: nobody can join it")
	}
	return nil
}

// roleOfWire is the one table of roles on the wire.
//
//nolint:gochecknoglobals // a table, never written
var roleOfWire = map[clusterv1.Role]sandbox.Role{
	clusterv1.Role_ROLE_NODE: sandbox.RoleNode, clusterv1.Role_ROLE_PROXY: sandbox.RoleProxy, clusterv1.Role_ROLE_SERVER: sandbox.RoleServer,
}

// errOneServer is the answer to a server that wants to join.
func errOneServer() error {
	return sandbox.Unsupportedf("servers cannot join yet: a cluster has one server; join as a node or as a proxy")
}

// Join makes a machine a member, for a token.
func (c *Control) Join(ctx context.Context, req *clusterv1.JoinRequest) (*clusterv1.JoinResponse, error) {
	resp, err := c.join(ctx, req)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "join refused", slog.String("id", fmt.Sprintf("%.40s", req.GetId())),
			slog.String("name", fmt.Sprintf("%.80s", req.GetName())), errAttr(err))
		return nil, toNode(err)
	}
	return resp, nil
}

func (c *Control) join(ctx context.Context, req *clusterv1.JoinRequest) (*clusterv1.JoinResponse, error) {
	ask, err := c.readJoin(req)
	if err != nil {
		return nil, err
	}
	m := ask.Member.Member()
	chain, cert, err := c.joining.sign(req.GetCertificateRequest(), m)
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	ask.Member.KeyFingerprint, ask.Member.Certificates, ask.Member.JoinedAt = cert.key, []store.Certificate{cert.record()}, now
	if err := c.makeRoom(ctx, ask, now); err != nil {
		return nil, err
	}
	kept, err := c.joining.members.Admit(ctx, ask, now)
	if err != nil {
		return nil, err
	}
	if kept.JoinedAt.Equal(now) {
		c.log.LogAttrs(ctx, slog.LevelInfo, "member joined", slog.String("member", m.String()), slog.String("name", kept.Name),
			slog.String("token_id", ask.TokenID), slog.String("version", kept.Version))
		c.note(ctx, memberEvent("member_joined", kept, fmt.Sprintf("%s %s joined", kept.Role, kept.Name), map[string]string{
			"token_id": ask.TokenID, "version": kept.Version,
		}))
	}
	return &clusterv1.JoinResponse{
		Certificate: chain, Authority: c.joining.authority.CertPEM(), ClusterId: c.joining.authority.ClusterID(),
		Servers: c.joining.gate.Servers(), ExpiresAt: timestamppb.New(cert.expires),
	}, nil
}

// maxVersion bounds what a member says it runs, in bytes.
const maxVersion = 64

// readJoin checks what can be checked before the store is asked.
func (c *Control) readJoin(req *clusterv1.JoinRequest) (store.Admission, error) {
	if err := c.joining.check(); err != nil {
		return store.Admission{}, err
	}
	role, ok := roleOfWire[req.GetRole()]
	if !ok {
		return store.Admission{}, sandbox.Invalidf("role %d: want node or proxy", req.GetRole())
	}
	if role == sandbox.RoleServer {
		return store.Admission{}, errOneServer()
	}
	m := sandbox.Member{Role: role, ID: req.GetId()}
	if err := sandbox.CheckMember(m); err != nil {
		return store.Admission{}, err
	}
	if len(req.GetVersion()) > maxVersion {
		return store.Admission{}, sandbox.Invalidf("version of %d bytes: want at most %d", len(req.GetVersion()), maxVersion)
	}
	id, hash, err := c.joining.authority.ReadToken(req.GetToken())
	if err != nil {
		return store.Admission{}, err
	}
	name := req.GetName()
	setDefault(&name, m.ID)
	return store.Admission{
		TokenID: id, TokenHash: hash, Member: store.Member{Role: role, ID: m.ID, Name: name, Version: req.GetVersion()},
	}, nil
}

// makeRoom refuses, to who has a good token, the name of another node, and the name and id of one that is here without having
// joined, as that of `cloister up` is. Of a node that is down it makes the name free where the token allows that.
func (c *Control) makeRoom(ctx context.Context, ask store.Admission, now time.Time) error {
	m, name := ask.Member.Member(), ask.Member.Name
	token, err := c.joining.members.CheckToken(ctx, ask, now)
	if err != nil || m.Role != sandbox.RoleNode {
		return err
	}
	for _, n := range c.fleet.list(now) {
		if n.Name != name || string(n.ID) == m.ID {
			continue
		}
		if !token.Replace || !c.fleet.isDown(n.ID) {
			return c.nameTaken(n)
		}
		if err := c.takeOut(ctx, n, false, true); err != nil {
			return fmt.Errorf("take the place of node %s: %w", n.Name, err)
		}
	}
	if !c.fleet.has(sandbox.NodeID(m.ID)) {
		return nil
	}
	_, err = c.joining.members.Member(ctx, m)
	if errors.Is(err, sandbox.ErrNotFound) {
		return sandbox.Conflictf("node %s is here already, and did not join: join with an empty data directory, which makes a new id", m.ID)
	}
	return err
}

// nameTaken says whose a name is, and what can be done where that node is down.
func (c *Control) nameTaken(n Node) error {
	if !c.fleet.isDown(n.ID) {
		return sandbox.Conflictf("the name %q is that of node %s already, which is %s: choose another with --name", n.Name, n.ID, n.State)
	}
	return sandbox.Conflictf("the name %q is that of node %s, which is down since %s: choose another with --name or, where this machine takes that one's place, "+
		"`cloister node rm %s` on the server first; a token made with `cloister token create --replace` does that by itself",
		n.Name, n.ID, n.StateAt.UTC().Format(time.DateTime), n.Name)
}

// signed is what was given to a member.
type signed struct {
	// key is the hex SHA-256 of the public key, serial the certificate's number in hex.
	key     string
	serial  string
	expires time.Time
}

func (s signed) record() store.Certificate {
	return store.Certificate{Serial: s.serial, ExpiresAt: s.expires}
}

func (j *joining) sign(request []byte, m sandbox.Member) (chain []byte, made signed, err error) {
	chain, expires, err := j.authority.Sign(request, m, j.life)
	if err != nil {
		return nil, signed{}, err
	}
	block, _ := pem.Decode(chain)
	if block == nil {
		return nil, signed{}, fmt.Errorf("sign certificate of %s: the chain is empty", m)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, signed{}, fmt.Errorf("sign certificate of %s: %w", m, err)
	}
	sum := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	return chain, signed{key: hex.EncodeToString(sum[:]), serial: leaf.SerialNumber.Text(16), expires: expires.UTC()}, nil
}

func memberEvent(kind string, m store.Member, message string, fields map[string]string) Event {
	e := Event{Type: kind, Message: message, Fields: map[string]string{"member": m.Member().String(), "name": m.Name}}
	for k, v := range fields {
		if v != "" {
			e.Fields[k] = v
		}
	}
	if m.Role == sandbox.RoleNode {
		e.NodeID = sandbox.NodeID(m.ID)
	}
	return e
}
