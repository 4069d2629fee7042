// Package sandbox is Cloister's vocabulary: sandboxes, nodes, templates, their identities, states and error kinds.
//
// It owns the meaning of these words and the table of allowed state changes. It performs no I/O, starts no goroutines
// and imports nothing of ours, so that every other package can share it.
package sandbox
