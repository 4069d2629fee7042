package sandbox

import (
	"fmt"
	"slices"
)

// Origin is what saved processes depend on: they go on only where all of it is the same or there is more of it. What is empty is
// not known, and not compared. It is replaced, never changed.
type Origin struct {
	Architecture  string `json:"architecture,omitempty"`
	Engine        string `json:"engine,omitempty"`
	EngineVersion string `json:"engine_version,omitempty"`
	// CPUFeatures are the processor's, in the kernel's words, in order.
	CPUFeatures []string `json:"cpu_features,omitempty"`
}

// Origin returns what processes that are saved on the node depend on.
func (n *Node) Origin() *Origin {
	m := &Origin{Architecture: n.Architecture, CPUFeatures: slices.Sorted(slices.Values(n.CPUFeatures))}
	if len(n.Engines) > 0 {
		m.Engine, m.EngineVersion = n.Engines[0], n.EngineVersions[n.Engines[0]]
	}
	return m
}

// Takes reports whether processes that were saved on another machine can go on here. nil stands for one that is not known.
func (m *Origin) Takes(made *Origin) bool {
	if m == nil || made == nil || m == made {
		return true
	}
	return same(m.Architecture, made.Architecture) && same(m.Engine, made.Engine) && same(m.EngineVersion, made.EngineVersion) &&
		m.lacks(made) == ""
}

// Refusal says, for people, why Takes is false.
func (m *Origin) Refusal(made *Origin) string {
	switch {
	case m.Takes(made):
		return ""
	case !same(m.Architecture, made.Architecture):
		return fmt.Sprintf("is of the architecture %s, the checkpoint was made on %s", m.Architecture, made.Architecture)
	case !same(m.Engine, made.Engine):
		return fmt.Sprintf("has the engine %s, the checkpoint was made by %s", m.Engine, made.Engine)
	case !same(m.EngineVersion, made.EngineVersion):
		return fmt.Sprintf("does not fit the checkpoint: its %s is %s, the checkpoint was made by %s", m.Engine, m.EngineVersion, made.EngineVersion)
	}
	return fmt.Sprintf("does not fit the checkpoint: its processor lacks %s, which what was saved may use", m.lacks(made))
}

func same(a, b string) bool { return a == "" || b == "" || a == b }

// lacks returns a feature of the other's processor that this one's has not, or "".
func (m *Origin) lacks(made *Origin) string {
	if len(m.CPUFeatures) == 0 || len(made.CPUFeatures) == 0 {
		return ""
	}
	has := m.CPUFeatures
	for _, want := range made.CPUFeatures { // both are in order
		for len(has) > 0 && has[0] < want {
			has = has[1:]
		}
		if len(has) == 0 || has[0] != want {
			return want
		}
	}
	return ""
}
