package agent

import (
	"bytes"
	"context"
	"log/slog"

	nodev1 "github.com/cloister-dev/cloister/internal/gen/node/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

// register says who the node is, and takes what it needs to run sandboxes.
func (a *reporter) register(ctx context.Context) (*registration, error) {
	ims, err := a.journal.Images(ctx)
	if err != nil {
		return nil, err
	}
	caps, c := a.engine.Caps(), &a.cfg
	req := &nodev1.RegisterRequest{
		NodeId: string(a.node), Name: c.Name, Version: c.Version, Architecture: c.Architecture, Kernel: c.Kernel,
		Engines:  []*nodev1.Engine{{Name: caps.Name, Version: caps.Version, Capabilities: caps.Capabilities}},
		Capacity: toWireResources(a.journal.Ledger().Capacity), Labels: c.Labels,
		Address: c.Address, CpuFeatures: c.CPUFeatures, Machine: toWireResources(c.Machine),
	}
	for _, im := range ims {
		req.ImageDigests = append(req.ImageDigests, im.Digest)
	}
	for _, m := range a.saves.List() {
		if !m.Pause {
			req.CheckpointIds = append(req.CheckpointIds, m.ID)
		}
	}
	req.ReplicaIds = a.replicas()
	ctx, cancel := context.WithTimeout(ctx, serverTimeout)
	defer cancel()
	resp, err := a.server.Register(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := a.takeSecret(ctx, resp.GetTokenSecret()); err != nil {
		return nil, err
	}
	reg := &registration{epoch: resp.GetEpoch(), acked: resp.GetAcknowledgedSequence()}
	reg.full = reg.acked == 0
	if reg.acked > 0 {
		if err := a.acknowledge(ctx, reg.acked); err != nil {
			return nil, err
		}
	}
	a.log.InfoContext(ctx, "registered", slog.Int64("epoch", reg.epoch), slog.Int64("acknowledged", reg.acked))
	return reg, nil
}

// takeSecret takes the cluster's token secret over, and has it remembered where it is new.
func (a *reporter) takeSecret(ctx context.Context, secret []byte) error {
	if !a.counts {
		return nil
	}
	if len(secret) < 16 {
		return sandbox.Unavailablef("the server sent a token secret of %d bytes: want 16 or more", len(secret))
	}
	a.secret.Store(&secret)
	if bytes.Equal(a.kept, secret) {
		return nil
	}
	if err := a.remember(bytes.Clone(secret)); err != nil {
		a.log.WarnContext(ctx, "token secret not kept: until a server is reached, the node's next life creates no sandboxes", slog.Any("err", err))
		return nil
	}
	a.kept = secret
	return nil
}
