package identity

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Files names the PEM files of an identity.
type Files struct {
	Cert  string `yaml:"cert" json:"cert"`   // certificate, then its intermediates if any
	Key   string `yaml:"key" json:"key"`     // private key, PKCS#8; readable by the process alone
	Trust string `yaml:"trust" json:"trust"` // infrastructure CA certificates that peers may chain to; two during a change of CA
}

// Identity is a process's own certificate and the trust it checks peers against. It is safe for concurrent use. The configurations it
// makes follow a Reload: new handshakes use the new state, open connections live on.
type Identity struct {
	files  Files
	now    func() time.Time
	reload sync.Mutex // one Reload at a time, so that the newest files win
	state  atomic.Pointer[state]
}

// state is immutable once stored.
type state struct {
	cert      tls.Certificate
	principal Principal
	roots     *x509.CertPool
	digest    [32]byte // of the three files
	conveyed  *conveyed
}

// Load reads and checks an identity: the key matches the certificate, which is valid now, chains to the trust and names exactly one principal.
func Load(f Files) (*Identity, error) { return load(f, time.Now) }

func load(f Files, now func() time.Time) (*Identity, error) {
	i := &Identity{files: f, now: now}
	s, err := i.read()
	if err != nil {
		return nil, err
	}
	i.state.Store(s)
	return i, nil
}

// Principal returns who this process is. It never changes while the process lives.
func (i *Identity) Principal() Principal { return i.state.Load().principal }

// NotAfter returns when the certificate in use expires.
func (i *Identity) NotAfter() time.Time { return i.state.Load().cert.Leaf.NotAfter }

// Certificate returns the certificate in use with its key.
func (i *Identity) Certificate() tls.Certificate { return i.state.Load().cert }

// Reload reads the files again. On failure the old state is kept and the error says why; the principal must not change, since peers and
// records know this process by it.
func (i *Identity) Reload() error {
	i.reload.Lock()
	defer i.reload.Unlock()
	s, err := i.read()
	if err != nil {
		return fmt.Errorf("reloading the identity, the old one stays in use: %w", err)
	}
	if old := i.state.Load().principal; s.principal != old {
		return fmt.Errorf("reloading the identity, the old one stays in use: certificate %s names %s, this process is %s", i.files.Cert, s.principal, old)
	}
	i.state.Store(s)
	return nil
}

// Watch reloads whenever the files' contents change, looking every so often, until ctx ends; then it returns nil. A failed reload is
// logged once per content. It compares contents, not times, since renewal replaces several files one by one.
func (i *Identity) Watch(ctx context.Context, every time.Duration, log *slog.Logger) error {
	if every <= 0 {
		return errors.New("watching the identity: the interval must be positive")
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	var failed [32]byte
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		_, _, _, digest, err := i.files.read()
		if err == nil && digest == i.state.Load().digest {
			failed = [32]byte{}
			continue
		}
		if digest == failed && failed != ([32]byte{}) {
			continue
		}
		if err := i.Reload(); err != nil {
			failed = digest
			log.Warn("identity not reloaded", "err", err, "not_after", i.NotAfter())
			continue
		}
		failed = [32]byte{}
		log.Info("identity reloaded", "principal", i.Principal().String(), "not_after", i.NotAfter())
	}
}

// read returns the files' bytes and their digest. The digest is meaningful also with an error, to tell one failure from the next.
func (f Files) read() (cert, key, trust []byte, digest [32]byte, err error) {
	h := sha256.New()
	load := func(name, path string) []byte {
		b, e := os.ReadFile(path)
		if e != nil && err == nil {
			err = fmt.Errorf("reading the identity's %s: %w", name, e)
		}
		fmt.Fprintf(h, "%s %d %v\n", name, len(b), e)
		h.Write(b)
		return b
	}
	cert, key, trust = load("cert", f.Cert), load("key", f.Key), load("trust", f.Trust)
	h.Sum(digest[:0])
	return cert, key, trust, digest, err
}

func (i *Identity) read() (*state, error) {
	certPEM, keyPEM, trustPEM, digest, err := i.files.read()
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("reading certificate %s with key %s: %w", i.files.Cert, i.files.Key, err)
	}
	roots, err := parseTrust(trustPEM)
	if err != nil {
		return nil, fmt.Errorf("reading trust %s: %w", i.files.Trust, err)
	}
	p, err := FromCertificate(pair.Leaf)
	if err != nil {
		return nil, fmt.Errorf("reading certificate %s: %w", i.files.Cert, err)
	}
	now := i.now()
	if now.After(pair.Leaf.NotAfter) {
		return nil, fmt.Errorf("certificate %s of %s expired on %s: renew it", i.files.Cert, p, pair.Leaf.NotAfter.Format(time.RFC3339))
	}
	chain, err := parseChain(pair.Certificate)
	if err != nil {
		return nil, fmt.Errorf("reading certificate %s: %w", i.files.Cert, err)
	}
	if err := verifyChain(chain, roots, now, x509.ExtKeyUsageClientAuth); err != nil {
		return nil, fmt.Errorf("certificate %s of %s does not pass its own trust %s: %w", i.files.Cert, p, i.files.Trust, err)
	}
	return &state{cert: pair, principal: p, roots: roots, digest: digest, conveyed: &conveyed{}}, nil
}

// parseTrust reads CA certificates strictly: anything in the file that is not one is an error, since a trust read in part is a silent outage.
func parseTrust(data []byte) (*x509.CertPool, error) {
	pool, n := x509.NewCertPool(), 0
	for rest := bytes.TrimSpace(data); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return nil, errors.New("not PEM")
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %s, want certificates only", b.Type)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, err
		}
		if !c.IsCA {
			return nil, fmt.Errorf("certificate %q is not a CA's", c.Subject)
		}
		pool.AddCert(c)
		n++
	}
	if n == 0 {
		return nil, errors.New("holds no certificate")
	}
	return pool, nil
}

func parseChain(ders [][]byte) ([]*x509.Certificate, error) {
	chain := make([]*x509.Certificate, len(ders))
	for n, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain[n] = c
	}
	return chain, nil
}

func verifyChain(chain []*x509.Certificate, roots *x509.CertPool, at time.Time, usage x509.ExtKeyUsage) error {
	if len(chain) == 0 {
		return errors.New("no certificate")
	}
	if chain[0].IsCA {
		return errors.New("a CA certificate is nobody's identity")
	}
	inter := x509.NewCertPool()
	for _, c := range chain[1:] {
		inter.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage}})
	return err
}
