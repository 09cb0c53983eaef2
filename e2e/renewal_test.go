package e2e_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"trivet/identity"
	"trivet/load"
)

// Identities are renewed while everything runs: new files, no restart, no failed request, and new connections see the new certificate.
func TestIdentitiesAreRenewedWithoutRestart(t *testing.T) {
	s := up(t)
	st := s.status(t)
	authority, err := identity.OpenAuthority(filepath.Join(s.dir, "infra"))
	if err != nil {
		t.Fatal(err)
	}
	recorder := &load.Recorder{}
	issuer := s.issuer(t, recorder)
	loaded := make(chan load.Result)
	go func() {
		loaded <- load.Run(t.Context(), load.Config{Rate: 20, Duration: 10 * time.Second, Timeout: 15 * time.Second}, issuer.Op)
	}()
	pids := map[string]int{}
	old := map[string]*x509.Certificate{} // by address
	for _, p := range st.Processes {
		pids[p.Name] = p.PID
		address := map[string]string{"ca": p.Addresses["admin"], "ocsp": p.Addresses["internal"], "hsmd": p.Addresses["agent"], "lb": p.Addresses["status"]}[p.Role]
		if address == "" {
			continue
		}
		old[address] = s.served(t, address)
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			t.Fatal(err)
		}
		who := identity.Principal{Cluster: "demo", Role: identity.Role(p.Role), Name: p.Name}
		if _, err := authority.IssueTo(filepath.Join(s.dir, "identity", p.Name), who, []net.IP{net.ParseIP(host)}, nil, 24*time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	for address, before := range old {
		eventually(t, 30*time.Second, func() error {
			if s.served(t, address).Equal(before) {
				return fmt.Errorf("%s still shows its old certificate", address)
			}
			return nil
		})
	}
	if r := <-loaded; r.Failed > 0 || len(recorder.Duplicates()) > 0 {
		t.Errorf("meanwhile: %v, duplicates %v", r, recorder.Duplicates())
	}
	for _, p := range s.status(t).Processes {
		if p.PID != pids[p.Name] {
			t.Errorf("%s was restarted", p.Name)
		}
	}
	s.fsck(t)
}

// served returns the certificate that a process shows on a new connection.
func (s *site) served(t *testing.T, address string) *x509.Certificate {
	t.Helper()
	sre := s.status(t).Credentials.SRE
	cert, err := tls.LoadX509KeyPair(sre.Cert, sre.Key)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := tls.Dial("tcp", address, &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}) //nolint:gosec // the test looks at the certificate itself
	if err != nil {
		t.Fatalf("connecting to %s: %v", address, err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0]
}
