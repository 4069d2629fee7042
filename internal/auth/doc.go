// Package auth says who may talk to the cluster: API keys, and certificates of the cluster's own authority.
//
// It makes and recognises secrets and owns their form. It must not decide what a caller may do, store keys (that is the
// store's) or read settings. Its values are safe for concurrent use; it starts no goroutines and keeps no state but the
// certificate authority's files.
package auth
