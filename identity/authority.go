package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// Names of the authority's files in its directory.
const (
	authorityCert = "infra-ca.pem"
	authorityKey  = "infra-ca.key"
)

const (
	authorityLifetime = 10 * 365 * 24 * time.Hour
	backdate          = 5 * time.Minute // clocks of peers may be behind
)

// Authority is the infrastructure CA: it certifies the stack's own processes and people, and nothing else. Its key is the operator's,
// offline: no process of the stack needs it to run.
type Authority struct {
	dir     string
	cluster string
	cert    *x509.Certificate
	key     crypto.Signer
	now     func() time.Time
}

// CreateAuthority makes a new authority, ECDSA P-256, for cluster in dir, which is created if its parent exists. It refuses to replace one.
func CreateAuthority(dir, cluster string) (*Authority, error) {
	if !clusterForm.MatchString(cluster) {
		return nil, fmt.Errorf("creating the infrastructure CA: cluster %q: want 1 to 63 lower-case letters, digits and inner hyphens", cluster)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("creating the infrastructure CA: %w", err)
	}
	for _, name := range []string{authorityCert, authorityKey} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("creating the infrastructure CA: %s is there already: use it, or choose another directory", filepath.Join(dir, name))
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("creating the infrastructure CA: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{cluster}, CommonName: "Trivet infrastructure CA"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("creating the infrastructure CA: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, fmt.Errorf("creating the infrastructure CA: %w", err)
	}
	// The key first: a certificate without its key would look like an authority.
	if err := replaceFile(filepath.Join(dir, authorityKey), keyPEM, 0o600); err != nil {
		return nil, fmt.Errorf("creating the infrastructure CA: %w", err)
	}
	if err := replaceFile(filepath.Join(dir, authorityCert), encodeCert(der), 0o644); err != nil {
		return nil, fmt.Errorf("creating the infrastructure CA: %w", err)
	}
	return OpenAuthority(dir)
}

// OpenAuthority opens the authority that CreateAuthority made in dir.
func OpenAuthority(dir string) (*Authority, error) {
	fail := func(err error) (*Authority, error) {
		return nil, fmt.Errorf("opening the infrastructure CA in %s: %w", dir, err)
	}
	certPEM, err := os.ReadFile(filepath.Join(dir, authorityCert))
	if err != nil {
		return fail(err)
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, authorityKey))
	if err != nil {
		return fail(err)
	}
	cb, _ := pem.Decode(certPEM)
	kb, _ := pem.Decode(keyPEM)
	if cb == nil || kb == nil {
		return fail(errors.New("certificate or key is not PEM"))
	}
	cert, err := x509.ParseCertificate(cb.Bytes)
	if err != nil {
		return fail(err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(kb.Bytes)
	if err != nil {
		return fail(err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return fail(errors.New("the key does not match the certificate"))
	}
	if !cert.IsCA || len(cert.Subject.Organization) != 1 {
		return fail(errors.New("the certificate is not an infrastructure CA's"))
	}
	return &Authority{dir: dir, cluster: cert.Subject.Organization[0], cert: cert, key: key, now: time.Now}, nil
}

// Cluster returns the cluster whose principals it certifies.
func (a *Authority) Cluster() string { return a.cluster }

// TrustFile returns the path of its certificate, to be used as Files.Trust.
func (a *Authority) TrustFile() string { return filepath.Join(a.dir, authorityCert) }

// CertificatePEM returns its certificate.
func (a *Authority) CertificatePEM() []byte { return encodeCert(a.cert.Raw) }

// Issue makes a P-256 key and a certificate for p. Machines get server and client use, people client use alone. ips and dns go into the
// certificate beside the principal, for clients that check host names; processes of the cluster do not.
func (a *Authority) Issue(p Principal, ips []net.IP, dns []string, lifetime time.Duration) (certPEM, keyPEM []byte, err error) {
	if err := p.check(); err != nil {
		return nil, nil, fmt.Errorf("issuing an identity: %w", err)
	}
	if p.Cluster != a.cluster {
		return nil, nil, fmt.Errorf("issuing an identity: %s is not of cluster %s", p, a.cluster)
	}
	now := a.now()
	if lifetime <= 0 || now.Add(lifetime).After(a.cert.NotAfter) {
		return nil, nil, fmt.Errorf("issuing an identity: lifetime %s must be positive and end before the CA on %s", lifetime, a.cert.NotAfter.Format(time.RFC3339))
	}
	uri, err := url.Parse(p.String())
	if err != nil {
		return nil, nil, fmt.Errorf("issuing an identity: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("issuing an identity: %w", err)
	}
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if p.Role.Machine() {
		usage = append(usage, x509.ExtKeyUsageServerAuth)
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{p.Cluster}, OrganizationalUnit: []string{string(p.Role)}, CommonName: p.Name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           usage,
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{uri},
		IPAddresses:           ips,
		DNSNames:              dns,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("issuing an identity: %w", err)
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("issuing an identity: %w", err)
	}
	return encodeCert(der), keyPEM, nil
}

// IssueTo issues into dir as cert.pem, key.pem (mode 0600) and trust.pem. dir is created if its parent exists. Each file is replaced
// atomically, the certificate last; a process that reads between key and certificate sees a pair that does not match, keeps what it has and looks again.
func (a *Authority) IssueTo(dir string, p Principal, ips []net.IP, dns []string, lifetime time.Duration) (Files, error) {
	certPEM, keyPEM, err := a.Issue(p, ips, dns, lifetime)
	if err != nil {
		return Files{}, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return Files{}, fmt.Errorf("writing the identity of %s: %w", p, err)
	}
	f := Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), Trust: filepath.Join(dir, "trust.pem")}
	for _, w := range []struct {
		path string
		data []byte
		mode os.FileMode
	}{{f.Trust, a.CertificatePEM(), 0o644}, {f.Key, keyPEM, 0o600}, {f.Cert, certPEM, 0o644}} {
		if old, err := os.ReadFile(w.path); err == nil && bytes.Equal(old, w.data) {
			continue
		}
		if err := replaceFile(w.path, w.data, w.mode); err != nil {
			return Files{}, fmt.Errorf("writing the identity of %s: %w", p, err)
		}
	}
	return f, nil
}

func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("drawing a serial number: %w", err)
	}
	b[0] = b[0]&0x7f | 0x40 // positive, and always 16 octets
	return new(big.Int).SetBytes(b), nil
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// replaceFile writes path so that a reader, and a crash at any point, sees the old bytes or the new ones, never a mixture.
func replaceFile(path string, data []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // does nothing once it is renamed
	if _, err = tmp.Write(data); err == nil {
		if err = tmp.Chmod(mode); err == nil {
			err = tmp.Sync()
		}
	}
	if e := tmp.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
