package control

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	proxyv1 "github.com/cloister-dev/cloister/internal/gen/proxy/v1"
	"github.com/cloister-dev/cloister/internal/gen/proxy/v1/proxyv1connect"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// routeService answers proxies.
type routeService struct {
	control *Control
	caller  func(context.Context) (sandbox.Member, bool)
}

// RouteService returns what proxies that have joined the cluster call. caller says who is at the other end of the
// connection that a call came over; only proxies are answered.
func (c *Control) RouteService(caller func(context.Context) (sandbox.Member, bool)) proxyv1connect.RouteServiceHandler {
	return &routeService{control: c, caller: caller}
}

// proxy returns the id of the proxy that calls. Errors: ErrDenied.
func (s *routeService) proxy(ctx context.Context) (string, error) {
	who, ok := s.caller(ctx)
	if !ok || who.Role != sandbox.RoleProxy {
		return "", toNode(sandbox.Deniedf("routes are for proxies: the caller is %q", who))
	}
	if m := s.control.joining.members; m != nil && m.Denied(who, "") {
		return "", toNode(sandbox.Deniedf("%s is no member of the cluster any more: it can join again with a new token", who))
	}
	return who.ID, nil
}

// Watch sends the routing table, and what changes in it.
func (s *routeService) Watch(ctx context.Context, req *proxyv1.WatchRequest, stream *connect.ServerStream[proxyv1.WatchResponse]) error {
	id, err := s.proxy(ctx)
	if err != nil {
		return err
	}
	return fmt.Errorf("send routes to proxy %s: %w", id, s.control.watchRoutes(ctx, req, stream.Send))
}

// Lookup finds one sandbox.
func (s *routeService) Lookup(ctx context.Context, req *proxyv1.LookupRequest) (*proxyv1.LookupResponse, error) {
	if _, err := s.proxy(ctx); err != nil {
		return nil, err
	}
	id, err := sandbox.ParseID(req.GetId())
	if err != nil {
		return nil, toNode(err)
	}
	r, err := s.control.Route(ctx, id)
	if err != nil {
		return nil, toNode(err)
	}
	resp := &proxyv1.LookupResponse{Route: routeToWire(r)}
	if n, ok := s.control.routes.node(r.Node); ok {
		resp.Node = nodeRouteToWire(n)
	}
	return resp, nil
}

// Wake makes a paused sandbox run.
func (s *routeService) Wake(ctx context.Context, req *proxyv1.WakeRequest) (*proxyv1.WakeResponse, error) {
	if _, err := s.proxy(ctx); err != nil {
		return nil, err
	}
	id, err := sandbox.ParseID(req.GetId())
	if err != nil {
		return nil, toNode(err)
	}
	r, err := s.control.Wake(ctx, id)
	if err != nil {
		return nil, toNode(err)
	}
	return &proxyv1.WakeResponse{Route: routeToWire(r)}, nil
}

// Sign finds the sandbox whose token made a signature.
func (s *routeService) Sign(ctx context.Context, req *proxyv1.SignRequest) (*proxyv1.SignResponse, error) {
	if _, err := s.proxy(ctx); err != nil {
		return nil, err
	}
	id, err := s.control.SandboxBySignature(ctx, Signed{
		Path: req.GetPath(), Operation: req.GetOperation(), User: req.GetUser(), Signature: req.GetSignature(), Expiration: req.GetExpiration(),
	})
	if err != nil {
		return nil, toNode(err)
	}
	return &proxyv1.SignResponse{Id: string(id)}, nil
}

// Report takes what sandboxes were used for, and what the proxy says of itself.
func (s *routeService) Report(ctx context.Context, req *proxyv1.ReportRequest) (*proxyv1.ReportResponse, error) {
	proxy, err := s.proxy(ctx)
	if err != nil {
		return nil, err
	}
	all, behind := make([]sandbox.Activity, 0, len(req.GetActivities())), behind(timeFromWire(req.GetTime()), time.Now())
	for _, w := range req.GetActivities() {
		id, err := sandbox.ParseID(w.GetId())
		if err != nil {
			return nil, toNode(err)
		}
		all = append(all, sandbox.Activity{ID: id, Open: int(w.GetOpen()), Last: moved(timeFromWire(w.GetLast()), behind)})
	}
	acknowledged := s.control.activity.report(proxy, time.Time{}, req.GetSequence(), req.GetFull(), all)
	if err := s.control.noteProxy(ctx, proxy, req); err != nil {
		return nil, toNode(err)
	}
	return &proxyv1.ReportResponse{AcknowledgedSequence: acknowledged, Within: durationpb.New(reportWithin)}, nil
}

//nolint:gochecknoglobals // a table, never written
var wireOfState = func() map[sandbox.State]agentv1.State {
	out := make(map[sandbox.State]agentv1.State, len(stateOfWire))
	for w, s := range stateOfWire {
		out[s] = w
	}
	return out
}()

func routeToWire(r sandbox.Route) *proxyv1.Route {
	return &proxyv1.Route{
		Id: string(r.ID), NodeId: string(r.Node), State: wireOfState[r.State], Reason: r.Reason, Generation: r.Generation,
		Secure: r.Secure, AutoResume: r.AutoResume,
	}
}

func nodeRouteToWire(n sandbox.NodeRoute) *proxyv1.Node {
	return &proxyv1.Node{Id: string(n.ID), Address: n.Address, Down: n.Down, Unheard: n.Unheard}
}
