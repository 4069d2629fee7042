package scheduler

import (
	"slices"
	"strconv"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxTerms bounds the parts of a selector, of preferences and of tolerations: each is looked at for every node.
const maxTerms = 16

type operator uint8

const (
	isIn operator = iota
	isNotIn
	exists
	doesNotExist
)

// Requirement is one condition on a node's labels.
type Requirement struct {
	key    string
	op     operator
	values []string
	// text is the requirement as it was written, for explanations.
	text string
}

func (q *Requirement) matches(labels map[string]string) bool {
	value, there := labels[q.key]
	switch q.op {
	case isIn:
		return there && slices.Contains(q.values, value)
	case isNotIn:
		return !there || !slices.Contains(q.values, value)
	case exists:
		return there
	case doesNotExist:
		return !there
	}
	return false
}

// Selector is conditions that must all hold; none is met by every node.
type Selector []Requirement

// missing returns the first condition that the labels do not meet, as it was written.
func (s Selector) missing(labels map[string]string) (string, bool) {
	for i := range s {
		if !s[i].matches(labels) {
			return s[i].text, true
		}
	}
	return "", false
}

// String writes the selector as ParseSelector reads it.
func (s Selector) String() string {
	out := make([]string, len(s))
	for i := range s {
		out[i] = s[i].text
	}
	return strings.Join(out, ",")
}

// ParseSelector reads conditions separated by commas, in the form that Kubernetes uses: zone=eu, zone!=eu,
// disk in (ssd,nvme), disk notin (hdd), gpu, !spot. Errors: ErrInvalid.
func ParseSelector(text string) (Selector, error) {
	var out Selector
	for _, term := range splitTerms(text, ',') {
		q, err := parseRequirement(term)
		if err != nil {
			return nil, err
		}
		if out = append(out, q); len(out) > maxTerms {
			return nil, sandbox.Invalidf("selector %.80q: want at most %d conditions", text, maxTerms)
		}
	}
	return out, nil
}

// splitTerms splits at a separator outside parentheses; an empty text has no terms.
func splitTerms(text string, at byte) []string {
	if strings.TrimSpace(text) == "" {
		return nil
	}
	var out []string
	depth, from := 0, 0
	for i := range len(text) {
		switch c := text[i]; {
		case c == '(':
			depth++
		case c == ')':
			depth--
		case c == at && depth == 0:
			out = append(out, strings.TrimSpace(text[from:i]))
			from = i + 1
		}
	}
	return append(out, strings.TrimSpace(text[from:]))
}

func parseRequirement(term string) (Requirement, error) {
	q := Requirement{key: term, op: exists, text: term}
	switch {
	case strings.HasSuffix(term, ")"):
		q = parseSet(term)
	case strings.HasPrefix(term, "!"):
		q.key, q.op = strings.TrimSpace(term[1:]), doesNotExist
	case strings.Contains(term, "="):
		q = parseEquals(term)
	}
	if err := q.check(); err != nil {
		return Requirement{}, sandbox.Invalidf("selector condition %.80q: %v; write zone=eu, zone!=eu, disk in (ssd,nvme), gpu or !spot", term, err)
	}
	return q, nil
}

func parseEquals(term string) Requirement {
	key, value, _ := strings.Cut(term, "=")
	op := isIn
	if before, not := strings.CutSuffix(key, "!"); not {
		key, op = before, isNotIn
	} else {
		value = strings.TrimPrefix(value, "=")
	}
	return Requirement{key: strings.TrimSpace(key), op: op, values: []string{strings.TrimSpace(value)}, text: term}
}

func parseSet(term string) Requirement {
	head, list, _ := strings.Cut(strings.TrimSuffix(term, ")"), "(")
	key, word, _ := strings.Cut(strings.TrimSpace(head), " ")
	q := Requirement{key: key, text: term}
	switch strings.TrimSpace(word) {
	case "in":
	case "notin":
		q.op = isNotIn
	default:
		q.key = head // which is no key, so that the term is refused
	}
	for value := range strings.SplitSeq(list, ",") {
		q.values = append(q.values, strings.TrimSpace(value))
	}
	return q
}

func (q *Requirement) check() error {
	if err := sandbox.CheckLabelKey(q.key); err != nil {
		return err
	}
	if len(q.values) > maxTerms {
		return sandbox.Invalidf("%d values: want at most %d", len(q.values), maxTerms)
	}
	for _, v := range q.values {
		if err := sandbox.CheckLabelValue(v); err != nil {
			return err
		}
	}
	return nil
}

// Preference makes nodes that meet a selector better, or worse where its weight is below 0.
type Preference struct {
	Selector Selector
	// Weight is -100 to 100.
	Weight int
}

const maxPreference = 100

// ParsePreferences reads SELECTOR*WEIGHT separated by semicolons, as in "zone=eu*50;spot*-20": affinity where the
// weight is above 0, anti-affinity below. A missing weight is 1. Errors: ErrInvalid.
func ParsePreferences(text string) ([]Preference, error) {
	var out []Preference
	for _, term := range splitTerms(text, ';') {
		p := Preference{Weight: 1}
		head, weight, weighted := strings.Cut(term, "*")
		if weighted {
			n, err := strconv.Atoi(strings.TrimSpace(weight))
			if err != nil || n < -maxPreference || n > maxPreference || n == 0 {
				return nil, sandbox.Invalidf("weight %.40q in %.80q: want a whole number from -%d to %d, not 0", weight, term, maxPreference, maxPreference)
			}
			p.Weight = n
		}
		selector, err := ParseSelector(head)
		if err != nil {
			return nil, err
		}
		if len(selector) == 0 {
			return nil, sandbox.Invalidf("affinity %.80q: want SELECTOR*WEIGHT, as in zone=eu*50", text)
		}
		p.Selector = selector
		if out = append(out, p); len(out) > maxTerms {
			return nil, sandbox.Invalidf("affinity %.80q: want at most %d terms", text, maxTerms)
		}
	}
	return out, nil
}

// Toleration lets a sandbox go to nodes with certain taints.
type Toleration struct {
	// Key is the taint's; empty means every taint.
	Key string
	// Value is the taint's, unless AnyValue.
	Value    string
	AnyValue bool
	// Effect is the taint's; empty means every effect.
	Effect sandbox.TaintEffect
}

func (t *Toleration) covers(taint *sandbox.Taint) bool {
	return (t.Key == "" || t.Key == taint.Key) && (t.AnyValue || t.Value == taint.Value) && (t.Effect == "" || t.Effect == taint.Effect)
}

// ParseTolerations reads KEY=VALUE:EFFECT, KEY=VALUE, KEY:EFFECT, KEY (any value) or * (every taint), separated by
// commas. Errors: ErrInvalid.
func ParseTolerations(text string) ([]Toleration, error) {
	var out []Toleration
	for _, term := range splitTerms(text, ',') {
		t, err := parseToleration(term)
		if err != nil {
			return nil, sandbox.Invalidf("toleration %.80q: %v; write gpu=only:%s, gpu=only, gpu or *", term, err, sandbox.NoSchedule)
		}
		if out = append(out, t); len(out) > maxTerms {
			return nil, sandbox.Invalidf("tolerations %.80q: want at most %d", text, maxTerms)
		}
	}
	return out, nil
}

func parseToleration(term string) (Toleration, error) {
	if term == "*" {
		return Toleration{AnyValue: true}, nil
	}
	rest, effect, limited := strings.Cut(term, ":")
	key, value, valued := strings.Cut(rest, "=")
	t := Toleration{Key: key, Value: value, AnyValue: !valued, Effect: sandbox.TaintEffect(effect)}
	check := sandbox.Taint{Key: key, Value: value, Effect: t.Effect}
	if !limited {
		check.Effect = sandbox.NoSchedule
	}
	return t, check.Check()
}

// untolerated returns the first taint that keeps the request away, and how many others speak against the node.
func untolerated(taints []sandbox.Taint, tolerations []Toleration) (forbids *sandbox.Taint, against int) {
	for i := range taints {
		taint := &taints[i]
		if slices.ContainsFunc(tolerations, func(t Toleration) bool { return t.covers(taint) }) {
			continue
		}
		if taint.Effect == sandbox.NoSchedule {
			return taint, against
		}
		against++
	}
	return nil, against
}
