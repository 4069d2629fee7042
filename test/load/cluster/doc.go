// Package cluster measures what a cluster's machines cost each other, on the real binary with each machine in a network
// namespace of this one: they share its processors, so the figures are bounds.
//
//	make load-cluster
//
// Each benchmark makes its samples once, whatever -benchtime says, and reports their percentiles as metrics. It needs root and
// a machine that does nothing else.
//
// It owns no state and leaves nothing behind.
package cluster
