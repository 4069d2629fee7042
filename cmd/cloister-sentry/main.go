// Command cloister-sentry is the gVisor sentry of one sandbox. cloister carries it and starts it; it has no use by itself.
package main

import (
	"fmt"
	"os"

	"github.com/cloister-dev/cloister/internal/engine/gvisor"
)

func main() {
	gvisor.Maybe() // does not return in a sentry
	fmt.Fprintln(os.Stderr, "cloister-sentry is started by cloister, not by hand")
	os.Exit(2)
}
