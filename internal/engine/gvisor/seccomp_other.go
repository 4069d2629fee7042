//go:build !amd64

package gvisor

import "gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"

// filterVersion is empty: on this architecture each sentry compiles its filter. To change that, run seccompgen on such a
// machine and commit the result.
const filterVersion = ""

func filters() []precompiledseccomp.Program { return nil }
