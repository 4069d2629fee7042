package v1

import (
	"github.com/cloister-dev/cloister/internal/client"
	"github.com/cloister-dev/cloister/internal/control"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func each[A, B any](in []A, f func(A) B) []B {
	out := make([]B, 0, len(in))
	for _, v := range in {
		out = append(out, f(v))
	}
	return out
}

func resourcesToWire(r sandbox.Resources) client.Resources { return client.Resources(r) }

func statusToWire(s control.Status) client.Status {
	w := client.Status{
		Version: s.Version, StartedAt: s.StartedAt.UTC(), Ready: s.Ready, APIURL: s.APIURL, ProxyURL: s.ProxyURL,
		Nodes: make(map[string]int, len(s.Nodes)), Sandboxes: make(map[string]int, len(s.Sandboxes)), Templates: s.Templates,
		Capacity: resourcesToWire(s.Capacity), Allocated: resourcesToWire(s.Allocated),
	}
	for state, n := range s.Nodes {
		w.Nodes[string(state)] = n
	}
	for state, n := range s.Sandboxes {
		w.Sandboxes[string(state)] = n
	}
	if s.Member != nil {
		m := s.Member()
		w.Member = &client.Member{
			Role: string(m.Role), ID: m.ID, Name: m.Name, ClusterID: m.ClusterID, Servers: m.Servers, Connected: m.Connected,
			CertificateExpiresAt: m.ExpiresAt.UTC(),
		}
	}
	return w
}

func sandboxToWire(b sandbox.Sandbox) client.Sandbox {
	w := client.Sandbox{
		ID: string(b.ID), NodeID: string(b.NodeID), TemplateID: string(b.TemplateID), Template: b.TemplateName,
		State: string(b.State), Reason: b.Reason, Generation: b.Generation, Resources: resourcesToWire(b.Resources),
		Metadata: b.Metadata, StartedAt: b.StartedAt, EndAt: b.EndAt, EndedAt: b.EndedAt, Secure: b.Secure,
		AllowInternet: b.AllowInternet, AutoPause: b.AutoPause, AutoResume: b.AutoResume, IdleTimeout: b.IdleTimeout,
		PausedAt: b.PausedAt, PausedKind: string(b.PausedKind), PausedBytes: b.PausedBytes,
	}
	if b.AutoPause {
		w.AutoPauseKind = string(b.AutoPauseKind)
	}
	return w
}

func logToWire(e control.LogEntry) client.LogEntry {
	return client.LogEntry{Time: e.Time, Level: e.Level, Logger: e.Logger, Message: e.Message, Fields: e.Fields}
}

func metricToWire(s control.Sample) client.Metric {
	return client.Metric{
		Time: s.Time, CPUCount: s.CPUCount, CPUUsedPercent: s.CPUUsedPercent, MemoryUsedBytes: s.MemoryUsedBytes,
		MemoryTotalBytes: s.MemoryTotalBytes, MemoryCacheBytes: s.MemoryCacheBytes, DiskUsedBytes: s.DiskUsedBytes,
		DiskTotalBytes: s.DiskTotalBytes,
	}
}

func keyToWire(k control.Key) client.Key {
	return client.Key{ID: k.ID, Name: k.Name, Hint: k.Hint, CreatedAt: k.CreatedAt, LastUsedAt: k.LastUsedAt}
}

func eventToWire(e control.Event) client.Event {
	return client.Event{
		ID: e.ID, Time: e.Time, Type: e.Type, NodeID: string(e.NodeID), SandboxID: string(e.SandboxID), Message: e.Message,
		Fields: e.Fields,
	}
}
