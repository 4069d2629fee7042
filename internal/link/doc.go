// Package link carries everything that members of a cluster say to each other.
//
// Nodes and proxies dial a server: a Link at their end, the Hub at the server's. A member that cannot waits for the server to dial
// it (Link.Await, Hub.Dial); from then on nothing differs. A link is two TLS connections, each with
// yamux streams in both directions: one for control, where calls go, and one for bulk, where guests' bytes and artifacts
// go, so that no download delays a call. A node that can be dialed has a Listener too, where each stream is a TLS
// connection of its own; Reach tries that first and the way through a server next.
//
// Each stream begins with a Head, which says what it is for, and is answered with nothing or the kind and text of an error.
// Calls are HTTP/2 on a stream, artifacts HTTP/1.1, guest streams are bytes. The end of a guest stream and its being
// cut are told apart on every way: a stream that merely stops was cut, one that ends says so.
//
// The package knows no messages and decides nothing but who may open which kind of stream. It keeps no state on disk.
// Its values are safe for concurrent use; goroutines run below Hub.Serve, Hub.Dial, Link.Run, Link.Await and Listener.Serve, which return when
// all of them have ended. Lock order: Hub.mu or Link.mu before pair.mu; none is held during I/O.
package link
