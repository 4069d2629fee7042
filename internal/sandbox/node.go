package sandbox

import (
	"maps"
	"slices"
	"time"
)

// TaintEffect is what a taint does to sandboxes that do not tolerate it.
type TaintEffect string

// The effects of taints.
const (
	// NoSchedule keeps new sandboxes off the node.
	NoSchedule TaintEffect = "NoSchedule"
	// PreferNoSchedule counts against the node as much as the strongest wish of a request can.
	PreferNoSchedule TaintEffect = "PreferNoSchedule"
)

// Valid reports whether e is one of the effects.
func (e TaintEffect) Valid() bool { return e == NoSchedule || e == PreferNoSchedule }

// Taint keeps sandboxes off a node that do not tolerate it. A node has one for each key and effect.
type Taint struct {
	Key    string      `json:"key"`
	Value  string      `json:"value,omitempty"`
	Effect TaintEffect `json:"effect"`
}

// String writes the taint as KEY=VALUE:EFFECT or KEY:EFFECT.
func (t Taint) String() string {
	if t.Value == "" {
		return t.Key + ":" + string(t.Effect)
	}
	return t.Key + "=" + t.Value + ":" + string(t.Effect)
}

// Check refuses what is no taint. Errors: ErrInvalid.
func (t Taint) Check() error {
	if err := CheckLabelKey(t.Key); err != nil {
		return err
	}
	if err := CheckLabelValue(t.Value); err != nil {
		return err
	}
	if !t.Effect.Valid() {
		return Invalidf("effect %.40q: want %s or %s, as in gpu=only:%s", t.Effect, NoSchedule, PreferNoSchedule, NoSchedule)
	}
	return nil
}

// Bounds of what an administrator may set on one node.
const (
	MaxNodeLabels = 64
	MaxNodeTaints = 32
)

// OwnLabels begins the keys of labels that Cloister sets itself.
const OwnLabels = "cloister.dev/"

// NodeSettings is what the administrator wants of a node. It is kept apart from what the node says of itself, so that it
// survives the node's registering again.
type NodeSettings struct {
	// Labels are set beside the node's own and replace those of the same key.
	Labels   map[string]string `json:"labels,omitempty"`
	Taints   []Taint           `json:"taints,omitempty"`
	Cordoned bool              `json:"cordoned,omitempty"`
	// Reason says why it is cordoned, CordonedAt since when it is or, uncordoned, is no more.
	Reason     string    `json:"reason,omitempty"`
	CordonedAt time.Time `json:"cordoned_at,omitzero"`
	// Drain is set once the node was told to give its sandboxes to others, until it is uncordoned. It is replaced, never
	// changed.
	Drain *NodeDrain `json:"drain,omitempty"`
}

// Clone returns settings that share nothing with s.
func (s *NodeSettings) Clone() NodeSettings {
	out := *s
	out.Labels, out.Taints = maps.Clone(s.Labels), slices.Clone(s.Taints)
	return out
}

// AddTaint sets a taint, in place of one with the same key and effect.
func (s *NodeSettings) AddTaint(t Taint) {
	s.RemoveTaint(t.Key, t.Effect)
	s.Taints = append(s.Taints, t)
}

// RemoveTaint takes away the taints with the key and, unless it is empty, the effect. It reports whether there were any.
func (s *NodeSettings) RemoveTaint(key string, effect TaintEffect) bool {
	before := len(s.Taints)
	s.Taints = slices.DeleteFunc(s.Taints, func(t Taint) bool { return t.Key == key && (effect == "" || t.Effect == effect) })
	return len(s.Taints) < before
}

const (
	maxLabelKey   = 128
	maxLabelValue = 63
)

// CheckLabelKey refuses what cannot be a label's or a taint's key. Errors: ErrInvalid.
func CheckLabelKey(key string) error {
	if key == "" || len(key) > maxLabelKey || !labelText(key, true) {
		return Invalidf("key %.40q: want 1 to %d characters of a-z, A-Z, 0-9, '-', '_', '.' and '/', the first and last a letter or digit",
			key, maxLabelKey)
	}
	return nil
}

// CheckLabelValue refuses what cannot be a label's or a taint's value. Errors: ErrInvalid.
func CheckLabelValue(value string) error {
	if len(value) > maxLabelValue || !labelText(value, false) {
		return Invalidf("value %.40q: want at most %d characters of a-z, A-Z, 0-9, '-', '_' and '.', the first and last a letter or digit",
			value, maxLabelValue)
	}
	return nil
}

func labelText(text string, slash bool) bool {
	for i := range len(text) {
		c := text[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i == 0 || i == len(text)-1:
			return false
		case c == '-', c == '_', c == '.', c == '/' && slash:
		default:
			return false
		}
	}
	return true
}
