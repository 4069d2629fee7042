// Package api is the HTTP edge of the server: it decodes, asks who is calling, hands on to control, and encodes.
//
// It owns what all requests share: keys, request ids, logging, metrics, the answer to a panic, and the list of routes.
// The two APIs are below it: e2b serves the official E2B clients, v1 Cloister's own; exchange is how both read and
// answer. It decides nothing about sandboxes. The handler is safe for concurrent use and starts no goroutine.
package api
