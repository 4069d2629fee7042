package engine

import (
	"errors"
	"strings"
	"testing"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

func TestSpecCheck(t *testing.T) {
	good := func() Spec {
		return Spec{
			ID: "abc", RootFS: "/r", ScratchDir: "/s", Args: []string{"/bin/true"}, Env: []string{"A=", "B=c=d"},
			Limits: sandbox.Resources{MilliCPU: 1, MemoryBytes: minMemoryBytes, DiskBytes: minDiskBytes},
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*Spec)
		want   string // part of the error; empty for none
	}{
		{"least", func(*Spec) {}, ""},
		{"all", func(s *Spec) { s.NetNS, s.Hostname = "/run/netns/x", "host-1.local" }, ""},
		{"no id", func(s *Spec) { s.ID = "" }, "sandbox id"},
		{"id that climbs", func(s *Spec) { s.ID = "../x" }, "sandbox id"},
		{"relative root", func(s *Spec) { s.RootFS = "r" }, "root file system"},
		{"no scratch", func(s *Spec) { s.ScratchDir = "" }, "scratch directory"},
		{"relative namespace", func(s *Spec) { s.NetNS = "x" }, "network namespace"},
		{"host name", func(s *Spec) { s.Hostname = "a b" }, "host name"},
		{"no program", func(s *Spec) { s.Args = nil }, "no program"},
		{"empty program", func(s *Spec) { s.Args = []string{""} }, "no program"},
		{"zero byte", func(s *Spec) { s.Args = append(s.Args, "a\x00b") }, "zero byte"},
		{"zero byte in environment", func(s *Spec) { s.Env = []string{"A=\x00"} }, "zero byte"},
		{"environment without key", func(s *Spec) { s.Env = []string{"=x"} }, "KEY=value"},
		{"environment without value", func(s *Spec) { s.Env = []string{"x"} }, "KEY=value"},
		{"too long", func(s *Spec) { s.Args = append(s.Args, strings.Repeat("x", maxArgBytes)) }, "at most"},
		{"no processor", func(s *Spec) { s.Limits.MilliCPU = 0 }, "processor"},
		{"too many processors", func(s *Spec) { s.Limits.MilliCPU = maxMilliCPU + 1 }, "processor"},
		{"little memory", func(s *Spec) { s.Limits.MemoryBytes-- }, "memory"},
		{"little disk", func(s *Spec) { s.Limits.DiskBytes-- }, "disk"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := good()
			tt.change(&s)
			err := s.Check()
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want an ErrInvalid about %q", err, tt.want)
			}
		})
	}
}
