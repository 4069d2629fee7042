// Package routes is a proxy's copy of the servers' routing table.
//
// It owns the table, its following of a server (watch, resume by version, reconnect), the questions about what the table
// lacks (Lookup, Wake, Sign) and the reports of what sandboxes are used for. It decides nothing: a server says where a
// sandbox is, and who may wake it. It must not carry traffic.
//
// A Table is safe for concurrent use. Run owns its goroutines; Route, Wake and the others work on the caller's. Table.mu
// guards everything that is read and written, and nothing is sent or received while it is held. Config.Changed and
// Config.NodeDown are called without it, by one goroutine at a time.
package routes
