package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/cloister-dev/cloister/internal/gen/agent/v1"
	"github.com/cloister-dev/cloister/internal/sandbox"
	"github.com/cloister-dev/cloister/internal/snapshot"
)

// tlsPeer dials one node over TLS on loopback.
type tlsPeer struct {
	address string
	config  *tls.Config
}

func (p tlsPeer) DialPeer(ctx context.Context, _ sandbox.NodeID, _ string) (net.Conn, error) {
	d := tls.Dialer{Config: p.config}
	return d.DialContext(ctx, "tcp", p.address)
}

// serveTLS serves a node's artifacts over TLS on loopback.
func serveTLS(b *testing.B, n *node) tlsPeer {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	n.m.check(err)
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"node"}, NotAfter: time.Now().Add(time.Hour)}
	raw, err := x509.CreateCertificate(crand.Reader, cert, cert, key.Public(), key)
	n.m.check(err)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{raw}, PrivateKey: key}}, MinVersion: tls.VersionTLS13,
	})
	n.m.check(err)
	srv := &http.Server{Handler: n.Artifacts()}
	go func() { _ = srv.Serve(l) }() // ends with the server
	b.Cleanup(func() { _ = srv.Close() })
	leaf, err := x509.ParseCertificate(raw)
	n.m.check(err)
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tlsPeer{l.Addr().String(), &tls.Config{RootCAs: roots, ServerName: "node", MinVersion: tls.VersionTLS13}}
}

// heap makes a checkpoint of 64 MiB, in runs with holes between them, 1 GiB in all, and a few small files.
func (n *node) heap(id string) {
	n.m.t.Helper()
	st, err := n.saves.Begin(id)
	n.m.check(err)
	noise := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(noise)
	f, err := os.Create(filepath.Join(st.Dir(), "pages.img"))
	n.m.check(err)
	n.m.check(f.Truncate(1 << 30))
	for i := range int64(16) {
		_, err := f.WriteAt(noise, i*(60<<20))
		n.m.check(err)
	}
	n.m.check(f.Sync())
	n.m.check(f.Close())
	for _, name := range []string{"checkpoint.img", "pages_meta.img"} {
		n.m.check(os.WriteFile(filepath.Join(st.Dir(), name), noise[:200<<10], 0o600))
	}
	_, err = n.saves.Commit(st, snapshot.Manifest{Kind: sandbox.CheckpointMemory, ImageDigest: digestOf("one"), CreatedAt: now()})
	n.m.check(err)
}

// BenchmarkFetch moves a checkpoint of 64 MiB between two nodes in one process over TLS on loopback, onto the disk. Best-ms is the fastest, which says most on
// a machine that is busy; cpu-ms/op is the processor time of both nodes.
func BenchmarkFetch(b *testing.B) {
	m, other := newMachine(b), newMachine(b)
	n := m.boot()
	n.heap("heap")
	other.peers = serveTLS(b, n)
	to := other.boot()
	b.SetBytes(64 << 20)
	best, used := time.Hour, processTime(b)
	for b.Loop() {
		began := time.Now()
		resp, err := to.fetch("heap", false, &agentv1.Peer{NodeId: string(n.node)})
		m.check(err)
		if resp.GetMovedBytes() < 64<<20 {
			b.Fatal(resp)
		}
		best = min(best, time.Since(began))
		b.StopTimer()
		m.check(to.saves.Remove("heap"))
		b.StartTimer()
	}
	b.ReportMetric(float64(best.Milliseconds()), "best-ms")
	b.ReportMetric(float64((processTime(b)-used).Milliseconds())/float64(b.N), "cpu-ms/op")
}

// processTime returns the processor time that the process has used.
func processTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
