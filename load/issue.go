package load

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"slices"
	"time"

	"trivet/load/history"
)

// Issuer requests certificates, one per Op, each for a DNS name that nobody asked for before, and checks what it gets.
// It is safe for concurrent use; its fields are not changed once it is in use.
type Issuer struct {
	// URL is the base of the API, such as https://127.77.5.1:8443.
	URL string
	// Client sends the requests; NewClient with the requester's identity makes one.
	Client *http.Client
	// Profile and CA go into the request as they are; an empty CA is left out.
	Profile, CA string
	// Domain is what the names end in.
	Domain string
	// Roots, if set, must verify the certificate with the chain that comes with it.
	Roots *x509.CertPool
	// Recorder, if set, is told every certificate before Op returns.
	Recorder *Recorder
	// History, if set, is told of every operation, before it is sent and when it has returned. Principal is whom Client's identity names.
	History   *history.Log
	Principal string

	run string // makes the names of this Issuer its own
}

// NewIssuer makes an Issuer. Every request has a key of its own, as certificates mostly do: what is kept of each key is not contended then.
func NewIssuer(url string, client *http.Client) *Issuer {
	var run [6]byte
	_, _ = rand.Read(run[:]) // documented never to fail
	return &Issuer{URL: url, Client: client, Profile: "tls-server", Domain: "load.example.org", run: hex.EncodeToString(run[:])}
}

// Request is one request for a certificate.
type Request struct {
	Key string // Idempotency-Key; empty: none is sent
	DNS string
	CSR []byte // DER
}

// Request makes the i-th request, with Idempotency-Key.
func (s *Issuer) Request(i int) (Request, error) {
	name := fmt.Sprintf("r%d.%s.%s", i, s.run, s.Domain)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Request{}, fmt.Errorf("making a key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{name}}, key)
	if err != nil {
		return Request{}, fmt.Errorf("making a CSR: %w", err)
	}
	return Request{Key: fmt.Sprintf("%s-%d", s.run, i), DNS: name, CSR: csr}, nil
}

// Op makes the i-th request and sends it once.
func (s *Issuer) Op(ctx context.Context, i int) error {
	r, err := s.Request(i)
	if err != nil {
		return err
	}
	_, err = s.Send(ctx, r)
	return err
}

// Prepare makes n requests beforehand and returns an Op that sends each once, for benchmarks in which the client must
// not cost. From the n-th on the Op fails.
func (s *Issuer) Prepare(n int) (Op, error) {
	requests := make([]Request, n)
	for i := range requests {
		var err error
		if requests[i], err = s.Request(i); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context, i int) error {
		if i >= n {
			return fmt.Errorf("only %d requests were prepared", n)
		}
		_, err := s.Send(ctx, requests[i])
		return err
	}, nil
}

// Send sends r once and returns what was acknowledged: a certificate that carries the CSR's key and exactly the name
// asked for. A status other than 201 is a *StatusError.
func (s *Issuer) Send(ctx context.Context, r Request) (Acknowledged, error) {
	body, err := json.Marshal(struct {
		Profile string `json:"profile"`
		CA      string `json:"ca,omitempty"`
		CSR     string `json:"csr"`
	}{s.Profile, s.CA, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: r.CSR}))})
	if err != nil {
		return Acknowledged{}, err
	}
	req, err := http.NewRequest(http.MethodPost, s.URL+"/v1/certificates", bytes.NewReader(body))
	if err != nil {
		return Acknowledged{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	if r.Key != "" {
		req.Header.Set("Idempotency-Key", r.Key)
	}
	req.GetBody = nil // or net/http repeats what has an Idempotency-Key by itself, and hides a lost answer
	begun := s.History.Begin(history.Event{Kind: history.Issue, Client: s.Principal, Node: s.URL, Key: r.Key, Name: r.DNS})
	a, err := s.send(ctx, r, req)
	if err != nil {
		begun.End(failed(err))
		return Acknowledged{}, err
	}
	begun.End(history.Event{Outcome: history.OK, Status: http.StatusCreated, Object: a.ID, Replayed: a.Replayed, Bytes: a.DER})
	if s.Recorder != nil {
		s.Recorder.Add(a)
	}
	return a, nil
}

func (s *Issuer) send(ctx context.Context, r Request, req *http.Request) (Acknowledged, error) {
	resp, answer, err := do(ctx, s.Client, req)
	if err != nil {
		return Acknowledged{}, err
	}
	if resp.StatusCode != http.StatusCreated {
		return Acknowledged{}, statusError(resp, answer)
	}
	a, err := s.read(r, answer)
	if err != nil {
		return Acknowledged{}, fmt.Errorf("status 201, but %w", err)
	}
	a.Replayed = resp.Header.Get("Idempotency-Replayed") == "true"
	return a, nil
}

// read checks an acknowledgement against its request.
func (s *Issuer) read(r Request, answer []byte) (Acknowledged, error) {
	var got issued
	if err := json.Unmarshal(answer, &got); err != nil {
		return Acknowledged{}, fmt.Errorf("the body is not JSON: %w", err)
	}
	return s.check(r, got)
}

// issued is what an answer says of a certificate.
type issued struct {
	ID, CA, Serial, Certificate string
	Generation                  int
	Chain                       []string
}

func (s *Issuer) check(r Request, got issued) (Acknowledged, error) {
	cert, err := parsePEM(got.Certificate)
	if err != nil {
		return Acknowledged{}, fmt.Errorf("the certificate is unreadable: %w", err)
	}
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err != nil {
		return Acknowledged{}, fmt.Errorf("its CSR is unreadable: %w", err)
	}
	serial := fmt.Sprintf("%x", cert.SerialNumber.Bytes())
	switch {
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, csr.RawSubjectPublicKeyInfo):
		return Acknowledged{}, fmt.Errorf("certificate %s is for another public key", serial)
	case !slices.Equal(cert.DNSNames, []string{r.DNS}):
		return Acknowledged{}, fmt.Errorf("certificate %s is for %q instead of %q", serial, cert.DNSNames, r.DNS)
	case got.Serial != "" && got.Serial != serial:
		return Acknowledged{}, fmt.Errorf("certificate has serial %s, the answer says %s", serial, got.Serial)
	}
	if s.Roots != nil {
		between := x509.NewCertPool()
		for _, c := range got.Chain {
			between.AppendCertsFromPEM([]byte(c))
		}
		if _, err := cert.Verify(x509.VerifyOptions{Roots: s.Roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			return Acknowledged{}, fmt.Errorf("certificate %s does not verify: %w", serial, err)
		}
	}
	return Acknowledged{Request: r, ID: got.ID, Serial: serial, Issuer: cert.Issuer.String(), DER: cert.Raw, At: time.Now()}, nil
}

func parsePEM(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("not a PEM certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}
