package e2e_test

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"trivet/ca"
	"trivet/identity"
	"trivet/load"
)

// Both CA nodes get full batches and single requests at once that all hold the same Idempotency-Key, and another subject key that all ask for under keys of their
// own: what only one of them can insert. No neighbour fails, and whoever shares a request shares its certificate.
func TestContestedKeysInsideFullBatchesFailNobody(t *testing.T) {
	const size, each = 64, 6
	s := up(t)
	recorder := &load.Recorder{}
	nodes := []*load.Issuer{s.directly(t, "ca1", recorder), s.directly(t, "ca2", recorder)}
	shared, err := nodes[0].Request(0)
	if err != nil {
		t.Fatal(err)
	}
	sameKey, err := nodes[0].Request(1)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	var failures []error
	fail := func(err error) {
		mu.Lock()
		defer mu.Unlock()
		failures = append(failures, err)
	}
	neighbours := 0
	for n, node := range nodes {
		for b := range each {
			batch := []load.Request{shared, {Key: fmt.Sprintf("%s-%d-%d", sameKey.Key, n, b), DNS: sameKey.DNS, CSR: sameKey.CSR}}
			for i := range size - len(batch) {
				r, err := node.Request(1000 + b*size + i)
				if err != nil {
					t.Fatal(err)
				}
				batch = append(batch, r)
				neighbours++
			}
			all.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				if err := persist(ctx, func() error { return node.SendBulk(ctx, batch) }); err != nil {
					fail(err)
				}
			})
			all.Go(func() { // alone
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				if err := persist(ctx, func() error { _, err := node.Send(ctx, shared); return err }); err != nil {
					fail(err)
				}
			})
		}
	}
	all.Wait()
	for _, err := range failures {
		t.Errorf("%v", err)
	}
	if got, want := recorder.Len(), neighbours+1+len(nodes)*each; got != want {
		t.Errorf("%d certificates, want %d", got, want)
	}
	if d := recorder.Duplicates(); len(d) > 0 {
		t.Errorf("duplicates: %v", d)
	}
	s.fsck(t)
}

// A key is asked to be certified at one CA node and blocked at the other, at the same moment, a thousand times: either the request is refused, or whoever
// blocks the key is shown its certificate. Nobody is left with a certificate for a blocked key that nobody knows of.
func TestBlockingAKeyWhileItIsCertifiedMissesNoCertificate(t *testing.T) {
	const pairs, atOnce = 1000, 48
	s := up(t)
	st := s.status(t)
	recorder := &load.Recorder{}
	issuers := []*load.Issuer{s.directly(t, "ca1", recorder), s.directly(t, "ca2", recorder)}
	people := make([]*identity.Identity, 2)
	for i := range people {
		var err error
		o := st.Credentials.Operators[i]
		if people[i], err = identity.Load(identity.Files{Cert: o.Cert, Key: o.Key, Trust: st.Credentials.Trust}); err != nil {
			t.Fatal(err)
		}
	}
	operator := s.client(t, st.Credentials.Operators[0], atOnce)
	var admin []string
	for _, name := range []string{"ca2", "ca1"} { // the other node than the one that issues
		admin = append(admin, "https://"+s.process(t, name).Addresses["admin"])
	}
	operator.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify = true // nodes are known by role, not by host name

	var mu sync.Mutex
	issued, refused := 0, 0
	pair := func(ctx context.Context, i int) error {
		r, err := issuers[i%2].Request(i)
		if err != nil {
			return err
		}
		body, err := blockBody(people, r)
		if err != nil {
			return err
		}
		var got load.Acknowledged
		var issuing error
		var issue sync.WaitGroup
		issue.Go(func() {
			issuing = persist(ctx, func() (err error) { got, err = issuers[i%2].Send(ctx, r); return err })
		})
		var shown []string
		err = persist(ctx, func() (err error) {
			shown, err = block(ctx, operator, admin[i%2], body)
			var lost *url.Error
			if errors.As(err, &lost) { // no answer: blocking a key twice is blocking it once
				t.Logf("pair %d: %v", i, err)
				shown, err = block(ctx, operator, admin[i%2], body)
			}
			return err
		})
		issue.Wait()
		if err != nil {
			return fmt.Errorf("blocking: %w", err)
		}
		mu.Lock()
		defer mu.Unlock()
		var status *load.StatusError
		switch {
		case issuing == nil:
			issued++
			if len(shown) != 1 || shown[0] != got.ID {
				return fmt.Errorf("%s was issued, and whoever blocked its key was shown %v", got.ID, shown)
			}
		case errors.As(issuing, &status) && status.Type == "urn:trivet:problem:blocked-key":
			refused++
			if len(shown) > 0 {
				return fmt.Errorf("whoever blocked the key was shown %v, which was refused", shown)
			}
		default:
			return fmt.Errorf("issuing: %w", issuing)
		}
		return nil
	}
	next := make(chan int)
	var workers sync.WaitGroup
	for range atOnce {
		workers.Go(func() {
			for i := range next {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				if err := pair(ctx, i); err != nil {
					t.Errorf("pair %d: %v", i, err)
				}
				cancel()
			}
		})
	}
	for i := range pairs {
		next <- i
	}
	close(next)
	workers.Wait()
	t.Logf("%d issued, %d refused", issued, refused)
	if issued+refused != pairs || issued == 0 || refused == 0 {
		t.Errorf("%d issued and %d refused of %d: want some of both", issued, refused, pairs)
	}
	s.fsck(t)
}

// blockBody is what an operator sends to block the key of r, agreed to by another.
func blockBody(people []*identity.Identity, r load.Request) (string, error) {
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err != nil {
		return "", err
	}
	spki := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	q := ca.BlockRequest{SPKI: spki[:], Reason: ca.BlockKeyCompromise, Actor: people[0].Principal()}
	action, object, detail := q.Approval()
	g := identity.Grant{Request: identity.NewRequest(q.Actor, action, object, detail, time.Now(), time.Hour)}
	a, err := people[1].Approve(g.Request, time.Now())
	if err != nil {
		return "", err
	}
	g.Approvals = []identity.Approval{a}
	text, err := json.Marshal(map[string]any{"spki_sha256": hex.EncodeToString(spki[:]), "reason": q.Reason, "comment": "", "revoke": false, "grant": g})
	return string(text), err
}

// block blocks a key and returns the certificates that it has.
func block(ctx context.Context, client *http.Client, admin, body string) (ids []string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, admin+"/v1/blocked-keys", strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	var got struct{ Certificates []struct{ ID string } }
	if err := json.Unmarshal(text, &got); err != nil || resp.StatusCode != http.StatusOK {
		return nil, &load.StatusError{Status: resp.StatusCode, Detail: string(text), RetryAfter: resp.Header.Get("Retry-After")}
	}
	for _, c := range got.Certificates {
		ids = append(ids, c.ID)
	}
	return ids, nil
}
