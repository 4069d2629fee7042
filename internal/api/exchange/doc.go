// Package exchange is how every request is read and every answer looks, whichever API it belongs to.
//
// It owns the reading of bodies and queries, the form of errors, and the one table from kinds of error to HTTP. It knows
// no operation. Its functions keep no state.
package exchange
