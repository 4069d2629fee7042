package auth

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"strings"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// ServerTLS returns the settings of a listener that talks to members alone. protocols are offered by ALPN; the settings must
// not be changed afterwards, for each handshake uses the certificates of its time.
func (i *Identity) ServerTLS(protocols ...string) *tls.Config {
	return i.serve(tls.RequireAndVerifyClientCert, protocols)
}

// JoinTLS is ServerTLS for a listener that machines also reach before they are members. MemberOf tells those apart.
func (i *Identity) JoinTLS(protocols ...string) *tls.Config {
	return i.serve(tls.VerifyClientCertIfGiven, protocols)
}

func (i *Identity) serve(client tls.ClientAuthType, protocols []string) *tls.Config {
	outer := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: slices.Clone(protocols), SessionTicketsDisabled: true}
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		h := i.now()
		if h.cert == nil {
			return nil, sandbox.Unavailablef("%s has no certificate yet", i.member)
		}
		return &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: outer.NextProtos, SessionTicketsDisabled: true,
			Certificates: []tls.Certificate{*h.cert}, ClientCAs: h.pool, ClientAuth: client,
			VerifyConnection: func(state tls.ConnectionState) error {
				if len(state.PeerCertificates) == 0 {
					return nil // ClientAuth has refused it where a certificate is needed
				}
				return i.admit(state)
			},
		}, nil
	}
	return outer
}

// ClientTLS returns the settings of one connection to the expected member, or to any of its role where its ID is empty. Before
// the machine has joined, every handshake with them fails.
func (i *Identity) ClientTLS(expect sandbox.Member) *tls.Config {
	h := i.now()
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: serverName(expect), SessionTicketsDisabled: true, RootCAs: h.pool}
	if h.cert == nil {
		cfg.RootCAs = x509.NewCertPool() // nil would be those of the system
		return cfg
	}
	cfg.Certificates = []tls.Certificate{*h.cert}
	cfg.VerifyConnection = i.admit
	return cfg
}

// admit refuses whose certificate is good and who is no member of this cluster, or none any more.
func (i *Identity) admit(state tls.ConnectionState) error {
	cluster, m, err := memberOf(state.PeerCertificates[0])
	if err != nil {
		return err
	}
	if own := i.ClusterID(); cluster != own {
		return sandbox.Deniedf("%s is of cluster %.40s, this is cluster %s", m, cluster, own)
	}
	if i.Denied != nil && i.Denied(m, SerialText(state.PeerCertificates[0].SerialNumber)) {
		return sandbox.Deniedf("%s was removed from the cluster; it can join again with a new token", m)
	}
	return nil
}

// MemberOf returns who is at the other end of a connection. Errors: ErrDenied where no certificate was verified.
func MemberOf(state tls.ConnectionState) (sandbox.Member, error) {
	if len(state.VerifiedChains) == 0 || len(state.VerifiedChains[0]) == 0 {
		return sandbox.Member{}, sandbox.Deniedf("no certificate of a member: join the cluster first")
	}
	_, m, err := memberOf(state.VerifiedChains[0][0])
	return m, err
}

// memberOf reads the one URI of a member's certificate, spiffe://CLUSTER/ROLE/ID.
func memberOf(leaf *x509.Certificate) (cluster string, m sandbox.Member, err error) {
	if len(leaf.URIs) != 1 || leaf.URIs[0].Scheme != spiffeScheme {
		return "", sandbox.Member{}, sandbox.Deniedf("a certificate that is not a member's: want one URI spiffe://CLUSTER/ROLE/ID")
	}
	u := leaf.URIs[0]
	role, id, _ := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	m = sandbox.Member{Role: sandbox.Role(role), ID: id}
	if err := sandbox.CheckMember(m); err != nil {
		return "", sandbox.Member{}, sandbox.Deniedf("a certificate for %.80q: %v", u.String(), err)
	}
	return u.Host, m, nil
}
