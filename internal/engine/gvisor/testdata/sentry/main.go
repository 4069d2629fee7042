// Command sentry is the engine's other half alone, for tests whose own binary cannot be one.
package main

import "github.com/cloister-dev/cloister/internal/engine/gvisor"

func main() { gvisor.Maybe() }
