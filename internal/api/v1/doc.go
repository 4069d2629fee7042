// Package v1 serves Cloister's own API, below /v1.
//
// It owns the paths, the reading of what they are given, and the OpenAPI document that describes them; the wire types are
// those of the client package, and what an operation does is control's. Handlers keep no state and are safe for
// concurrent use.
package v1
