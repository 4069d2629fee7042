// Package install finds out whether a machine can run Cloister, and what to do where it cannot.
//
// Each check gathers facts by trying the thing itself where that is harmless, such as making a namespace or cloning a
// file, and a pure function judges them. A check changes nothing that outlives it. The package must not
// import other packages of ours but the vocabulary: what needs them comes in as functions of Settings. Preflight may be
// called from any goroutine.
package install
