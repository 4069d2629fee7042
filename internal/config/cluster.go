package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// Bounds of CertificateLife: a shorter one would be renewed all the time, a longer one outlives what it stands for.
const (
	leastCertificate = 10 * time.Second
	mostCertificate  = 90 * 24 * time.Hour
)

// maxReplicas bounds SnapshotReplicas.
const maxReplicas = 9

func (c *Config) validateCluster() error {
	errs := []error{validatePort("cluster-addr", c.ClusterAddr)}
	if c.NodeAddr != "" {
		errs = append(errs, validatePort("node-addr", c.NodeAddr))
	}
	if c.ClusterAdvertise != "" && !dialable(c.ClusterAdvertise) {
		errs = append(errs, fmt.Errorf("cluster-advertise %q: want HOST:PORT that other machines reach, such as 192.0.2.1:3003", c.ClusterAdvertise))
	}
	if c.LinkAddr != "" {
		errs = append(errs, validatePort("link-addr", c.LinkAddr))
	}
	_, err := c.ProxyAddresses()
	errs = append(errs, err, c.validateNodeAddress())
	if _, err := c.Labels(); err != nil {
		errs = append(errs, err)
	}
	if c.CertificateLife < leastCertificate || c.CertificateLife > mostCertificate {
		errs = append(errs, fmt.Errorf("certificate-life %s: want %s to %s", c.CertificateLife, leastCertificate, mostCertificate))
	}
	if c.CertificateGrace < 0 || c.CertificateGrace > mostCertificate {
		errs = append(errs, fmt.Errorf("certificate-grace %s: want 0s, which lets nobody back, to %s", c.CertificateGrace, mostCertificate))
	}
	if c.SnapshotReplicas < 1 || c.SnapshotReplicas > maxReplicas {
		errs = append(errs, fmt.Errorf("snapshot-replicas %d: want 1 to %d", c.SnapshotReplicas, maxReplicas))
	}
	if c.PlacementCount() == 0 && c.TemplatePlacement != PlaceOnDemand {
		errs = append(errs, fmt.Errorf("template-placement %q: want on_demand, all, or a number of nodes from 1 on", c.TemplatePlacement))
	}
	return errors.Join(errs...)
}

func (c *Config) validateNodeAddress() error {
	switch {
	case c.NodeAddress == "":
		return nil
	case c.NodeAddr == "":
		return fmt.Errorf("node-address %q with an empty node-addr: a node that does not listen has no address; set node-addr or leave node-address out", c.NodeAddress)
	case !dialable(c.NodeAddress) && !dialable(net.JoinHostPort(c.NodeAddress, "1")):
		return fmt.Errorf("node-address %q: want HOST or HOST:PORT that other machines reach, such as 192.0.2.7", c.NodeAddress)
	}
	return nil
}

// validatePort checks an address to listen on whose connections always are mutual TLS.
func validatePort(name, addr string) error {
	if _, port, err := net.SplitHostPort(addr); err != nil || !number(port, 0, 65535) {
		return fmt.Errorf("%s %q: want HOST:PORT or :PORT, such as :3003", name, addr)
	}
	return nil
}

// dialable reports whether addr is HOST:PORT with both.
func dialable(addr string) bool {
	host, port, err := net.SplitHostPort(addr)
	return err == nil && host != "" && number(port, 1, 65535) && !strings.ContainsAny(host, "/ @")
}

func number(text string, least, most int) bool {
	n, err := strconv.Atoi(text)
	return err == nil && n >= least && n <= most
}

// PlacementCount is how many nodes get a template before it is asked for there: 0 for none, -1 for all.
func (c *Config) PlacementCount() int {
	if c.TemplatePlacement == PlaceAll {
		return -1
	}
	n, err := strconv.Atoi(c.TemplatePlacement)
	if err != nil || n < 1 {
		return 0
	}
	return n
}

// Labels returns NodeLabels as a map. Errors: ErrInvalid.
func (c *Config) Labels() (map[string]string, error) {
	out := make(map[string]string, len(c.NodeLabels))
	for _, pair := range c.NodeLabels {
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, sandbox.Invalidf("node-labels: %.80q: want KEY=VALUE", pair)
		}
		if strings.HasPrefix(k, sandbox.OwnLabels) {
			return nil, sandbox.Invalidf("node-labels: %.80q: keys that begin with %s are Cloister's own; choose another", pair, sandbox.OwnLabels)
		}
		if err := errors.Join(sandbox.CheckLabelKey(k), sandbox.CheckLabelValue(v)); err != nil {
			return nil, fmt.Errorf("node-labels: %.80q: %w", pair, err)
		}
		out[k] = v
	}
	return out, nil
}

func (c *Config) validateBucket() error {
	if c.S3Bucket == "" {
		if c.S3Endpoint != "" || c.S3AccessKey != "" || c.S3SecretKey != "" || c.S3Prefix != "" {
			return errors.New("s3-endpoint, s3-access-key, s3-secret-key or s3-prefix is set and s3-bucket is not: set it, or none of them")
		}
		return nil
	}
	var errs []error
	if u, err := url.Parse(c.S3Endpoint); err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		errs = append(errs, fmt.Errorf("s3-endpoint %q: want http://HOST or https://HOST of the service that has bucket %s", c.S3Endpoint, c.S3Bucket))
	}
	if (c.S3AccessKey == "") != (c.S3SecretKey == "") {
		errs = append(errs, errors.New("one of s3-access-key and s3-secret-key is set: want both, or neither for a bucket that is open to everybody"))
	}
	return errors.Join(errs...)
}
