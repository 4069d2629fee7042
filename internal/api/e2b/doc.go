// Package e2b serves the REST API that the official E2B SDKs and CLI speak.
//
// It owns that contract's paths, fields, defaults and encodings, in both generations that clients use, and nothing else:
// what an operation does is control's. What this version cannot do is answered with 501 and says so; nothing is
// accepted and then left undone. Handlers keep no state and are safe for concurrent use.
package e2b
