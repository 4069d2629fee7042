// Package auth says who may talk to the cluster: API keys, join tokens, and certificates. Those are of two kinds: a CA signs
// for the names under which users reach API and sandboxes; an Authority signs for members, which talk to each other alone.
//
// It makes and recognises secrets and owns their form. It must not decide what a caller may do, store keys, tokens or members
// (that is the store's) or read settings. Its values are safe for concurrent use; it starts no goroutines and keeps no state but the
// files of a CA and of an Identity.
package auth
