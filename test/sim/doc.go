// Package sim runs the placement of a large cluster in one process: nodes that admit as real ones do, and servers that
// decide on what they were last told.
//
// It owns no rule of its own: where a sandbox goes is scheduler.Place's, whether it is admitted is the node's sum. Its
// clock is a number of placements, so that a run is repeated exactly by its seed. A Cluster is for one goroutine.
package sim
