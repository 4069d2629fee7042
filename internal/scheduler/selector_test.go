package scheduler

import (
	"errors"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestSelector(t *testing.T) {
	labels := map[string]string{"zone": "eu", "disk": "nvme", "team/name": "a", "empty": ""}
	for text, want := range map[string]bool{
		"": true, "zone=eu": true, "zone==eu": true, "zone = eu": true, "zone=us": false, "zone!=us": true, "zone!=eu": false, "none!=x": true,
		"zone in (us, eu)": true, "zone in (us)": false, "zone notin (us)": true, "zone notin (us,eu)": false, "none notin (a)": true,
		"disk": true, "none": false, "!none": true, "!disk": false, "zone=eu,disk in (nvme,ssd),!spot": true, "zone=eu,gpu": false,
		"team/name=a": true, "empty=": true, "empty": true, "none=": false,
	} {
		s, err := ParseSelector(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if _, lacks := s.missing(labels); lacks == want {
			t.Errorf("%q matches: %v", text, !lacks)
		}
	}
	for _, text := range []string{
		"=eu", "zone=e u", "zone in eu", "zone in (", "zone in (a))", "zone on (a)", "!", ",", "zone=eu,", "a b", "zone=(a", "-a", "a-",
		"é", strings.Repeat("a", 200), "a=" + strings.Repeat("b", 64), strings.Repeat("a,", 20) + "a",
	} {
		if s, err := ParseSelector(text); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q was read as %v, %v", text, s, err)
		}
	}
}

func TestPreferences(t *testing.T) {
	labels := map[string]string{"zone": "eu", "spot": "yes"}
	for text, want := range map[string]float64{
		"": 0.5, "zone=eu": 1, "zone=us": 0.5, "zone=eu*50": 1, "spot*-50": 0, "zone=eu*50;spot*-50": 0.5, "zone=eu*75;spot*-25": 0.75,
		"zone in (eu,us)*10; !spot * 10": 0.75,
	} {
		p, err := ParsePreferences(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if got := preferred(labels, p, 0); got != want {
			t.Errorf("%q gives %v, want %v", text, got, want)
		}
	}
	for _, text := range []string{"zone=eu*0", "zone=eu*101", "zone=eu*x", "*5", "zone=eu;", "zone=e u*5", ";"} {
		if p, err := ParsePreferences(text); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q was read as %v, %v", text, p, err)
		}
	}
}

func TestTolerations(t *testing.T) {
	taint := sandbox.Taint{Key: "gpu", Value: "only", Effect: sandbox.NoSchedule}
	for text, want := range map[string]bool{
		"": false, "*": true, "gpu": true, "gpu=only": true, "gpu=other": false, "gpu:NoSchedule": true, "gpu:PreferNoSchedule": false,
		"gpu=only:NoSchedule": true, "old, gpu": true, "old": false, "gpu=": false,
	} {
		all, err := ParseTolerations(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if forbids, _ := untolerated([]sandbox.Taint{taint}, all); (forbids == nil) != want {
			t.Errorf("%q tolerates %s: %v", text, taint, forbids == nil)
		}
	}
	for _, text := range []string{"gpu:Never", "=a", "gpu:", ",", "a b"} {
		if all, err := ParseTolerations(text); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q was read as %v, %v", text, all, err)
		}
	}
	if _, against := untolerated([]sandbox.Taint{{Key: "old", Effect: sandbox.PreferNoSchedule}}, nil); against != 1 {
		t.Errorf("%d taints speak against the node", against)
	}
}

// What is read and written again means the same.
func FuzzSelector(f *testing.F) {
	for _, text := range []string{"zone=eu", "a!=b,c in (d,e),!f", "a notin (b)", "((", "a in (b),c", "=", "!=x", "a==b"} {
		f.Add(text, "zone", "eu")
	}
	f.Fuzz(func(t *testing.T, text, key, value string) {
		s, err := ParseSelector(text)
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := ParseSelector(s.String())
		if err != nil {
			t.Fatalf("%q was written as %q: %v", text, s, err)
		}
		labels := map[string]string{key: value}
		_, a := s.missing(labels)
		_, b := again.missing(labels)
		if a != b || len(s) != len(again) {
			t.Fatalf("%q and %q differ", text, s)
		}
	})
}

func FuzzWishes(f *testing.F) {
	f.Add("zone=eu*50;spot*-20", "gpu=only:NoSchedule,*", "gpu", "only")
	f.Add("a in (b,c)*1", "x:PreferNoSchedule", "x", "")
	f.Fuzz(func(t *testing.T, affinity, tolerations, key, value string) {
		p, err := ParsePreferences(affinity)
		if err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Fatal(err)
		}
		if got := preferred(map[string]string{key: value}, p, 1); got < 0 || got > 1 {
			t.Fatalf("%q gives %v", affinity, got)
		}
		all, err := ParseTolerations(tolerations)
		if err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Fatal(err)
		}
		untolerated([]sandbox.Taint{{Key: key, Value: value, Effect: sandbox.NoSchedule}}, all)
	})
}

// A toleration that is written as a taint is tolerates just that taint.
func FuzzTaint(f *testing.F) {
	f.Add("gpu", "only", "NoSchedule")
	f.Add("a/b", "", "PreferNoSchedule")
	f.Add("=", ":", "")
	f.Fuzz(func(t *testing.T, key, value, effect string) {
		taint := sandbox.Taint{Key: key, Value: value, Effect: sandbox.TaintEffect(effect)}
		if err := taint.Check(); err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		all, err := ParseTolerations(taint.String())
		if err != nil || len(all) != 1 || !all[0].covers(&taint) {
			t.Fatalf("%s: %+v, %v", taint, all, err)
		}
		other := taint
		other.Key += "x"
		if all[0].covers(&other) {
			t.Fatalf("%s tolerates %s", taint, other)
		}
	})
}
