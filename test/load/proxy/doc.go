// Package proxy measures what the proxy costs, against dialling the guest directly, on loopback.
//
//	go test -run '^$' -bench . -benchtime 5s -count 6 ./test/load/proxy | benchstat -col /via -
//
// Latency is one request at a time over a connection that is kept: the p50 and p99 are metrics of their own, since the
// time per operation is a mean. Transfer moves 100 MB each way. The guest, the proxy and the client share this machine's
// processors, so the figures are bounds: apart, each would have more.
//
// It owns no state and starts nothing that outlives a benchmark.
package proxy
