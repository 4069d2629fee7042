// Package apitest is a server for tests: a real control.Control over records in memory and a node that only pretends to
// run sandboxes.
//
// It owns these fakes, for the tests of control, of the API and of its clients; nothing else may use it. The fakes are
// safe for concurrent use.
package apitest
