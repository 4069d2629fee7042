package config_test

import (
	"errors"
	"testing"

	"github.com/cloister-dev/cloister/internal/config"
	"github.com/cloister-dev/cloister/internal/sandbox"
)

func FuzzPairs(f *testing.F) {
	f.Add("load=1", "memory=1GiB")
	f.Add("load=1e309", "cpu=-1")
	f.Add("=", "cpu=NaN")
	f.Fuzz(func(t *testing.T, number, amount string) {
		load := 0.0
		if err := config.ParseNumbers("weights", []string{number}, map[string]*float64{"load": &load}); err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Fatal(err)
		}
		got, err := config.ParseAmounts("reserved", []string{amount})
		if err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Fatal(err)
		}
		if err == nil && (got.MilliCPU < 0 || got.MemoryBytes < 0 || got.DiskBytes < 0) {
			t.Fatalf("%q gives %+v", amount, got)
		}
	})
}
