package control

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// leaverGrace is how long one who left has to read the answer before its connections end.
const leaverGrace = time.Second

// memberKey is the context's key of who calls.
type memberKey struct{}

// WithMember says who calls over a connection whose certificate was verified. Calls without it are made in this process.
func WithMember(ctx context.Context, m sandbox.Member) context.Context {
	return context.WithValue(ctx, memberKey{}, m)
}

func memberFrom(ctx context.Context) (sandbox.Member, bool) {
	m, ok := ctx.Value(memberKey{}).(sandbox.Member)
	return m, ok
}

// checkNode refuses a member that speaks for a node that it is not, or that left. Calls in this process are not looked at.
func (c *Control) checkNode(ctx context.Context, node string) error {
	m, ok := memberFrom(ctx)
	switch {
	case !ok:
		return nil
	case m.Role != sandbox.RoleNode || m.ID != node:
		return sandbox.Deniedf("%s speaks for node %.40q: a node speaks for itself", m, node)
	case c.joining.members != nil && c.joining.members.Denied(m, ""):
		return sandbox.Deniedf("%s is no member of the cluster any more: it can join again with a new token", m)
	}
	return nil
}

// ClusterMember is a machine that joined the cluster.
type ClusterMember struct {
	sandbox.Member
	Name     string
	Version  string
	JoinedAt time.Time
	// ExpiresAt is the end of its newest certificate, unless that is renewed.
	ExpiresAt time.Time
	// KeyFingerprint is the hex SHA-256 of its public key.
	KeyFingerprint string
}

// ListMembers returns the machines that joined, by role and name. This server and its own node are none of them.
func (c *Control) ListMembers(ctx context.Context) ([]ClusterMember, error) {
	if !c.joining.on() {
		return []ClusterMember{}, nil
	}
	all, err := c.joining.members.Members(ctx)
	if err != nil {
		return nil, fmt.Errorf("list members: %w", err)
	}
	out := make([]ClusterMember, 0, len(all))
	for _, m := range all {
		out = append(out, ClusterMember{
			Member: m.Member(), Name: m.Name, Version: m.Version, JoinedAt: m.JoinedAt, ExpiresAt: m.ExpiresAt(), KeyFingerprint: m.KeyFingerprint,
		})
	}
	slices.SortFunc(out, func(a, b ClusterMember) int {
		return cmp.Or(cmp.Compare(a.Role, b.Role), cmp.Compare(a.Name, b.Name))
	})
	return out, nil
}

// caller returns the member that calls.
func (c *Control) caller(ctx context.Context) (sandbox.Member, error) {
	if err := c.joining.check(); err != nil {
		return sandbox.Member{}, err
	}
	m, ok := memberFrom(ctx)
	if !ok {
		return m, sandbox.Deniedf("no certificate of a member: join the cluster first")
	}
	return m, nil
}

// Renew answers a certificate with a new life. Errors: ErrDenied for one that was removed.
func (c *Control) Renew(ctx context.Context, req *clusterv1.RenewRequest) (*clusterv1.RenewResponse, error) {
	m, err := c.caller(ctx)
	if err != nil {
		return nil, toNode(err)
	}
	chain, cert, err := c.joining.sign(req.GetCertificateRequest(), m)
	if err != nil {
		return nil, toNode(err)
	}
	if _, err := c.joining.members.RenewMember(ctx, m, cert.key, cert.record(), time.Now().UTC()); err != nil {
		return nil, toNode(fmt.Errorf("renew certificate of %s: %w", m, err))
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "certificate renewed", slog.String("member", m.String()), slog.Time("expires", cert.expires))
	return &clusterv1.RenewResponse{
		Certificate: chain, Authority: c.joining.authority.CertPEM(), Servers: c.joining.gate.Servers(), ExpiresAt: timestamppb.New(cert.expires),
	}, nil
}

// stayMargin is how much a certificate may be older than the record of the stay that it is of: its time is in whole seconds, and it
// is signed before that is written.
const stayMargin = 5 * time.Second

// Readmit answers the certificate of a member that ended, not too long ago, with a new one for the same key. Errors: ErrDenied.
func (c *Control) Readmit(ctx context.Context, req *clusterv1.ReadmitRequest) (*clusterv1.ReadmitResponse, error) {
	resp, err := c.readmit(ctx, req)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelWarn, "member not readmitted", errAttr(err))
		return nil, toNode(err)
	}
	return resp, nil
}

func (c *Control) readmit(ctx context.Context, req *clusterv1.ReadmitRequest) (*clusterv1.ReadmitResponse, error) {
	if err := c.joining.check(); err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	past, err := c.joining.authority.ReadPast(req.GetCertificate(), req.GetCertificateRequest(), c.joining.grace, now)
	if err != nil {
		return nil, err
	}
	m := past.Member
	kept, err := c.joining.members.Member(ctx, m)
	switch {
	case err != nil && !errors.Is(err, sandbox.ErrNotFound):
		return nil, err
	case err != nil, c.joining.members.Denied(m, past.Serial), past.IssuedAt.Add(stayMargin).Before(kept.JoinedAt):
		return nil, sandbox.Deniedf("%s is no member of the cluster any more: it can join again with a new token", m)
	}
	chain, cert, err := c.joining.sign(req.GetCertificateRequest(), m)
	if err != nil {
		return nil, err
	}
	if _, err := c.joining.members.RenewMember(ctx, m, cert.key, cert.record(), now); err != nil {
		return nil, err
	}
	c.log.LogAttrs(ctx, slog.LevelInfo, "member readmitted", slog.String("member", m.String()), slog.Time("expires", cert.expires))
	return &clusterv1.ReadmitResponse{
		Certificate: chain, Authority: c.joining.authority.CertPEM(), Servers: c.joining.gate.Servers(), ExpiresAt: timestamppb.New(cert.expires),
	}, nil
}

// Leave takes the caller out of the cluster, and with a node everything that is kept of it; its paused sandboxes are brought back
// from their replicas. Errors: ErrConflict for a node that has others, unless it is forced.
func (c *Control) Leave(ctx context.Context, req *clusterv1.LeaveRequest) (*clusterv1.LeaveResponse, error) {
	m, err := c.caller(ctx)
	if err != nil {
		return nil, toNode(err)
	}
	if err := c.leave(ctx, m, req.GetForce()); err != nil {
		return nil, toNode(err)
	}
	return &clusterv1.LeaveResponse{}, nil
}

func (c *Control) leave(ctx context.Context, m sandbox.Member, force bool) error {
	if m.Role == sandbox.RoleNode && c.fleet.has(sandbox.NodeID(m.ID)) {
		return c.leaveNode(ctx, sandbox.NodeID(m.ID), force)
	}
	return c.expel(ctx, m)
}

// expel takes a member out of the cluster and ends its connections. One that is no member, as the node of `cloister up` is none,
// is left alone.
func (c *Control) expel(ctx context.Context, m sandbox.Member) error {
	if err := c.removeMember(ctx, m); errors.Is(err, sandbox.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	if caller, ok := memberFrom(ctx); ok && caller == m {
		c.joining.dropLater(m) // it is to read the answer
	} else if c.joining.gate != nil {
		c.joining.gate.Drop(m)
	}
	return nil
}

// removeMember makes a member's certificates worthless and its name free.
func (c *Control) removeMember(ctx context.Context, m sandbox.Member) error {
	if c.joining.members == nil {
		return nil
	}
	gone, err := c.joining.members.RemoveMember(ctx, m, time.Now().UTC())
	if err != nil {
		return fmt.Errorf("remove %s: %w", m, err)
	}
	c.dismiss(ctx, m)
	c.log.LogAttrs(ctx, slog.LevelInfo, "member left", slog.String("member", m.String()), slog.String("name", gone.Name))
	c.note(ctx, memberEvent("member_left", gone, fmt.Sprintf("%s %s left", gone.Role, gone.Name), nil))
	return nil
}

// dropLater ends a leaver's connections soon.
func (j *joining) dropLater(m sandbox.Member) {
	select {
	case j.leavers <- m:
	default:
		j.gate.Drop(m)
	}
}

// runLeavers ends the connections of those who left, until ctx ends.
func (c *Control) runLeavers(ctx context.Context) {
	for {
		var m sandbox.Member
		select {
		case <-ctx.Done():
			return
		case m = <-c.joining.leavers:
		}
		grace := time.NewTimer(leaverGrace)
		select {
		case <-ctx.Done():
			grace.Stop()
			return
		case <-grace.C:
			c.joining.gate.Drop(m)
		}
	}
}

// Templates returns what the calling node could start sandboxes from by itself.
func (c *Control) Templates(ctx context.Context, req *clusterv1.TemplatesRequest) (*clusterv1.TemplatesResponse, error) {
	m, err := c.caller(ctx)
	if err != nil {
		return nil, toNode(err)
	}
	if m.Role != sandbox.RoleNode {
		return nil, toNode(sandbox.Deniedf("templates are for nodes: %s is none", m))
	}
	all, err := c.templates.Templates(ctx)
	if err != nil {
		return nil, toNode(fmt.Errorf("list templates for %s: %w", m, err))
	}
	resp := &clusterv1.TemplatesResponse{}
	sum := sha256.New()
	for _, t := range startable(all, c.fleet.images(sandbox.NodeID(m.ID))) {
		text, err := json.Marshal(t)
		if err != nil {
			return nil, toNode(fmt.Errorf("encode template %s: %w", t.ID, err))
		}
		_, _ = sum.Write(append(text, '\n')) // never fails
		resp.Templates = append(resp.Templates, text)
	}
	resp.Version = hex.EncodeToString(sum.Sum(nil))
	if resp.GetVersion() == req.GetVersion() {
		return &clusterv1.TemplatesResponse{Version: resp.GetVersion(), Same: true}, nil
	}
	return resp, nil
}

// startable returns the templates of which a node with these images and checkpoints has a tagged build, with such builds and
// their tags alone, in order of id.
func startable(all []sandbox.Template, has map[string]struct{}) []sandbox.Template {
	var out []sandbox.Template
	for _, t := range all {
		t.Builds = slices.DeleteFunc(slices.Clone(t.Builds), func(b sandbox.Build) bool {
			_, image := has[b.ImageDigest]
			_, checkpoint := has[b.ID]
			return b.State != sandbox.BuildReady || !image || (b.Checkpoint != "" && !checkpoint)
		})
		t.Tags = maps.Clone(t.Tags)
		maps.DeleteFunc(t.Tags, func(_ string, at sandbox.Tag) bool { _, ok := t.Build(at.BuildID); return !ok })
		t.Builds = slices.DeleteFunc(t.Builds, func(b sandbox.Build) bool {
			return !slices.ContainsFunc(slices.Collect(maps.Values(t.Tags)), func(at sandbox.Tag) bool { return at.BuildID == b.ID })
		})
		if len(t.Tags) > 0 {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b sandbox.Template) int { return cmp.Compare(a.ID, b.ID) })
	return out
}
