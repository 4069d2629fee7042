package daemon

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/cloister-dev/cloister/internal/auth"
	clusterv1 "github.com/cloister-dev/cloister/internal/gen/cluster/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Readmit lets a member back in, for a day after the end of its certificate.
func (d *doorman) Readmit(_ context.Context, req *clusterv1.ReadmitRequest) (*clusterv1.ReadmitResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return nil, d.fail
	}
	past, err := d.authority.ReadPast(req.GetCertificate(), req.GetCertificateRequest(), 24*time.Hour, time.Now())
	if err != nil {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	chain, _, err := d.authority.Sign(req.GetCertificateRequest(), past.Member, time.Hour)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return &clusterv1.ReadmitResponse{Certificate: chain, Authority: d.authority.CertPEM(), Servers: []string{d.address}}, nil
}

// TestComeBack has a member whose certificate has ended get another, once a server is there that takes it.
func TestComeBack(t *testing.T) {
	d := newDoorman(t)
	identity, err := d.authority.Issue(sandbox.Member{Role: sandbox.RoleNode, ID: "bbbbbb"}, time.Nanosecond, []string{"127.0.0.1:1", d.address})
	if err != nil {
		t.Fatal(err)
	}
	m := &memberRole{identity: identity, log: slog.New(slog.DiscardHandler)}
	d.failWith(connect.NewError(connect.CodePermissionDenied, errors.New("removed")))
	if err := m.comeBack(t.Context()); !errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("removed: %v", err)
	}
	d.failWith(nil)
	if err := m.comeBack(t.Context()); err != nil || !time.Now().Before(identity.Expires()) {
		t.Errorf("%v, until %s", err, identity.Expires())
	}
	strange, err := newDoorman(t).authority.Issue(identity.Member(), time.Nanosecond, []string{d.address})
	if err != nil {
		t.Fatal(err)
	}
	m = &memberRole{identity: strange, log: slog.New(slog.DiscardHandler)}
	if err := m.comeBack(t.Context()); err == nil || errors.Is(err, sandbox.ErrDenied) {
		t.Errorf("of another cluster, so it does not trust this server: %v", err)
	}
	m.identity, err = auth.NewIdentity("", identity.Member())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.comeBack(t.Context()); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("before it joined: %v", err)
	}
}
