package proxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// certificateCheck is how often the files of a certificate are looked at, at most.
const certificateCheck = 10 * time.Second

// Certificate is a TLS certificate from files. It takes up new files by itself, within 10 s of the next handshake, or at
// once by Reload; files that do not fit together leave the earlier ones in use.
type Certificate struct {
	certFile, keyFile string
	logger            *slog.Logger

	loaded    atomic.Pointer[loadedCertificate]
	nextCheck atomic.Int64 // Unix nanoseconds
}

type loadedCertificate struct {
	pair  tls.Certificate
	stamp fileStamp
}

// fileStamp tells versions of the two files apart.
type fileStamp struct {
	certTime, keyTime time.Time
	certSize, keySize int64
}

// LoadCertificate reads a PEM certificate chain and its key. The logger may be nil.
func LoadCertificate(certFile, keyFile string, logger *slog.Logger) (*Certificate, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	c := &Certificate{certFile: certFile, keyFile: keyFile, logger: logger}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files again.
func (c *Certificate) Reload() error {
	stamp, err := c.stamp()
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("load certificate %s with key %s: %w", c.certFile, c.keyFile, err)
	}
	c.loaded.Store(&loadedCertificate{pair: pair, stamp: stamp})
	c.nextCheck.Store(time.Now().Add(certificateCheck).UnixNano())
	return nil
}

func (c *Certificate) stamp() (fileStamp, error) {
	cert, err := os.Stat(c.certFile)
	if err != nil {
		return fileStamp{}, fmt.Errorf("certificate: %w", err)
	}
	key, err := os.Stat(c.keyFile)
	if err != nil {
		return fileStamp{}, fmt.Errorf("certificate's key: %w", err)
	}
	return fileStamp{cert.ModTime(), key.ModTime(), cert.Size(), key.Size()}, nil
}

// TLSConfig returns a server's configuration with this certificate: TLS 1.2 and later, HTTP/2 and HTTP/1.1.
func (c *Certificate) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			c.refresh(hello.Context(), time.Now())
			return &c.loaded.Load().pair, nil
		},
	}
}

// refresh reloads files that have changed. Of several handshakes at a time one does the work.
func (c *Certificate) refresh(ctx context.Context, now time.Time) {
	next := c.nextCheck.Load()
	if now.UnixNano() < next || !c.nextCheck.CompareAndSwap(next, now.Add(certificateCheck).UnixNano()) {
		return
	}
	stamp, err := c.stamp()
	if err == nil && stamp == c.loaded.Load().stamp {
		return
	}
	if err == nil {
		err = c.Reload()
	}
	if err != nil {
		c.logger.WarnContext(ctx, "keep the earlier certificate", slog.Any("err", err))
		return
	}
	c.logger.InfoContext(ctx, "certificate reloaded", slog.String("file", c.certFile))
}
