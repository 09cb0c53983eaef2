package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"trivet/problem"
)

// ServerTLS returns the configuration of a listener that only principals of this cluster may use: TLS 1.3, client certificate required
// and verified. It says who the peer is; Allow says what it may do.
func (i *Identity) ServerTLS() *tls.Config { return i.server(tls.RequireAndVerifyClientCert) }

// ServerTLSOptionalClient is ServerTLS for a listener that also answers clients without a certificate; one that is given must verify.
func (i *Identity) ServerTLSOptionalClient() *tls.Config {
	return i.server(tls.VerifyClientCertIfGiven)
}

// Session tickets are off: a resumed session carries the verification of another day. Connections here are kept alive instead.
func (i *Identity) server(auth tls.ClientAuthType) *tls.Config {
	config := func() *tls.Config {
		s := i.state.Load()
		return &tls.Config{
			MinVersion:             tls.VersionTLS13,
			Certificates:           []tls.Certificate{s.cert},
			ClientAuth:             auth,
			ClientCAs:              s.roots,
			SessionTicketsDisabled: true,
			NextProtos:             []string{"http/1.1"},
			VerifyConnection: func(cs tls.ConnectionState) error {
				if len(cs.PeerCertificates) == 0 && auth == tls.VerifyClientCertIfGiven {
					return nil
				}
				_, err := i.verify(cs.PeerCertificates, i.now(), x509.ExtKeyUsageClientAuth)
				return err
			},
		}
	}
	c := config()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return config(), nil }
	return c
}

// ClientTLS returns the configuration for calling a process whose role is one of server. The peer is verified by chain and role, at every
// handshake (nothing is resumed); its host name and address do not matter, since processes move. With no role given every call fails.
func (i *Identity) ClientTLS(server ...Role) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // leaves out the host-name check; VerifyConnection does all the rest
		NextProtos:         []string{"http/1.1"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			c := i.state.Load().cert
			return &c, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			p, err := i.verify(cs.PeerCertificates, i.now(), x509.ExtKeyUsageServerAuth)
			if err != nil {
				return err
			}
			if !slices.Contains(server, p.Role) {
				return fmt.Errorf("peer is %s, want role %q", p, server)
			}
			return nil
		},
	}
}

// Verify checks a client certificate that somebody else received (leaf first, then intermediates) as ServerTLS would have at time at,
// and returns whose it is: chain to the trust, validity, use for client authentication, one principal of this cluster. A leaf that verified is
// not verified again for a minute, its own validity excepted: the same client asks many times.
func (i *Identity) Verify(chain []*x509.Certificate, at time.Time) (Principal, error) {
	known := i.state.Load().conveyed
	if len(chain) == 1 && !at.IsZero() {
		if p, ok := known.get(chain[0], at); ok {
			return p, nil
		}
	}
	p, err := i.verify(chain, at, x509.ExtKeyUsageClientAuth)
	if err == nil && len(chain) == 1 {
		known.put(chain[0], at, p)
	}
	return p, err
}

func (i *Identity) verify(chain []*x509.Certificate, at time.Time, usage x509.ExtKeyUsage) (Principal, error) {
	if at.IsZero() { // x509 would silently take its own clock
		return Principal{}, errors.New("verifying a peer: no time given")
	}
	s := i.state.Load()
	if err := verifyChain(chain, s.roots, at, usage); err != nil {
		return Principal{}, fmt.Errorf("verifying a peer: %w", err)
	}
	p, err := FromCertificate(chain[0])
	if err != nil {
		return Principal{}, fmt.Errorf("verifying a peer: %w", err)
	}
	if p.Cluster != s.principal.Cluster {
		return Principal{}, fmt.Errorf("verifying a peer: %s is not of cluster %s", p, s.principal.Cluster)
	}
	return p, nil
}

// Peer returns who sent r, by its verified client certificate. A certificate that expired since the handshake is nobody's.
func Peer(r *http.Request) (Principal, bool) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.PeerCertificates) == 0 {
		return Principal{}, false
	}
	leaf := r.TLS.PeerCertificates[0]
	if time.Now().After(leaf.NotAfter) {
		return Principal{}, false
	}
	p, err := FromCertificate(leaf)
	return p, err == nil
}

// Allow lets only principals of the given roles through to next; without a role, nobody. Others get 401 (no certificate) or 403.
func Allow(next http.Handler, roles ...Role) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, ok := Peer(r)
		switch {
		case !ok:
			problem.Write(w, problem.New(http.StatusUnauthorized, "unauthenticated", "a client certificate of this cluster is needed"))
		case !slices.Contains(roles, p.Role):
			problem.Write(w, problem.New(http.StatusForbidden, "forbidden", fmt.Sprintf("role %s may not do this", p.Role)))
		default:
			next.ServeHTTP(w, r)
		}
	})
}
