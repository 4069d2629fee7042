package gvisor

import (
	_ "unsafe" // for the linked name

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/runsc/boot/filter"
)

// Without a filter that was compiled beforehand each sentry spends some ten milliseconds of processor time on it. The
// module ships none, and no function to add one: the table is reached by its linked name. A filter whose options do not
// match the sentry's is not used, and the sentry compiles its own.
//
//go:generate env CGO_ENABLED=0 go run ./seccompgen seccomp_amd64.go

// filterTable is gVisor's table of filters by their options.
//
//go:linkname filterTable gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
//nolint:gochecknoglobals // gVisor's own variable
var filterTable map[string]precompiledseccomp.Program

// registerSeccomp adds our filters to gVisor's table.
func registerSeccomp() {
	filter.GetPrecompiled("") // makes the table
	if filterTable == nil {
		return
	}
	for _, p := range filters() {
		filterTable[p.Name] = p
	}
}
