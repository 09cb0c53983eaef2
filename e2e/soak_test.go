package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/cluster"
	"trivet/load"
)

var (
	soakSize = flag.Int("soak", 400, "certificates to be issued by the soak")
	soakSeed = flag.Uint64("soak-seed", 0, "seed of the soak's faults; 0: one of its own, which is printed")
)

// soak is clients of every kind, and what they have seen.
type soak struct {
	s       *site
	issuers []*load.Issuer // by way: the balancer first, then each CA node directly
	status  []*load.Responder
	lists   []*load.Lists
	size    int64

	next  atomic.Int64 // requests begun
	acked atomic.Int64
	tally struct {
		sync.Mutex
		known   []*x509.Certificate // some of those acknowledged
		ids     []string            // of known
		open    []load.Request      // of which nobody knows what became
		errors  map[string]int
		revoked int
	}
}

// Every part dies, freezes and loses its connections, one after another and at once, while clients of every kind go on. Requests may fail; but whatever
// anybody was told is true, and what nobody knows is settled by asking again.
func TestEveryPartFailsAtRandomUnderLoad(t *testing.T) {
	s := up(t)
	seed := *soakSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d: go test ./e2e -run TestEveryPart -args -soak %d -soak-seed %d", seed, *soakSize, seed)
	k := s.soak(t, int64(*soakSize))

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var clients, lookers sync.WaitGroup
	for i := range 8 {
		clients.Go(func() { k.issue(ctx, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	lookers.Go(func() { k.look(ctx, rand.New(rand.NewPCG(seed, 100))) })
	lookers.Go(func() { k.look(ctx, rand.New(rand.NewPCG(seed, 101))) })
	lookers.Go(func() { k.fetch(ctx) })
	done := make(chan struct{})
	go func() { clients.Wait(); close(done) }()

	began := time.Now()
	faults := s.strikes(t, rand.New(rand.NewPCG(seed, 1000)), done)
	t.Logf("%d acknowledged in %s; faults: %s", k.acked.Load(), time.Since(began).Round(time.Second), count(faults))
	s.allWell(t)
	k.settle(t)
	stop()
	lookers.Wait()
	k.report(t)
	s.fsckAsking(t, 0) // everything
}

func (s *site) soak(t *testing.T, size int64) *soak {
	t.Helper()
	st := s.status(t)
	ca, _ := s.authority(t)
	k := &soak{s: s, size: size}
	k.tally.errors = map[string]int{}
	first := s.issuer(t, nil)
	k.issuers = append(k.issuers, first)
	for _, p := range st.Processes {
		if p.Role == cluster.RoleCA {
			i := *first
			i.URL, i.Client = "https://"+p.Addresses["api"], s.straight(t, st)
			k.issuers = append(k.issuers, &i)
		}
	}
	path := func(url string) string {
		return url[strings.Index(url, "//")+2:][strings.Index(url[strings.Index(url, "//")+2:], "/"):]
	}
	plain := load.NewClient(nil, 16)
	k.status = append(k.status, &load.Responder{URL: st.CAs[0].OCSP, Client: plain, Issuer: ca, History: s.history, Generation: s.generation(t)})
	for _, p := range st.Processes {
		if p.Role != cluster.RoleOCSP {
			continue
		}
		base := "http://" + p.Addresses["public"]
		k.status = append(k.status, &load.Responder{URL: base + path(st.CAs[0].OCSP), Client: plain, Issuer: ca, History: s.history, Generation: s.generation(t)})
		k.lists = append(k.lists, &load.Lists{URL: base + path(st.CAs[0].CRL), Client: plain, Issuer: ca, History: s.history, Generation: s.generation(t)})
	}
	return k
}

// straight is a client that asks CA nodes as a balancer does, in the requester's name: so a repeat gets to the node that the scenario chooses.
func (s *site) straight(t *testing.T, st cluster.Status) *http.Client {
	t.Helper()
	lb := filepath.Join(s.dir, "identity", "lb1")
	client := s.client(t, cluster.KeyPair{Cert: filepath.Join(lb, "cert.pem"), Key: filepath.Join(lb, "key.pem")}, 16)
	caller, err := tls.LoadX509KeyPair(st.Credentials.Requester.Cert, st.Credentials.Requester.Key)
	if err != nil {
		t.Fatal(err)
	}
	transport := client.Transport.(*http.Transport)
	transport.TLSClientConfig.InsecureSkipVerify = true // peers are known by role, not by host name; what is told is verified by itself
	client.Transport = conveying{transport, ":" + base64.StdEncoding.EncodeToString(caller.Certificate[0]) + ":"}
	return client
}

// conveying adds the certificate of whom a request is for (RFC 9440).
type conveying struct {
	next http.RoundTripper
	cert string
}

func (c conveying) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Client-Cert", c.cert)
	return c.next.RoundTrip(r)
}

// issue is one client: most requests are single, some are batches; what got no answer is asked again under the same key, by another way; now and then a
// certificate is asked for once more, shown, or revoked.
func (k *soak) issue(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil && k.acked.Load() < k.size {
		switch n := r.IntN(100); {
		case n < 12:
			k.bulk(ctx, r)
		case n < 16:
			if id := k.some(r); id != "" {
				_, err := k.issuers[r.IntN(len(k.issuers))].Show(bounded(ctx, 5*time.Second), id)
				k.note("get", err)
			}
		case n < 19:
			if id := k.some(r); id != "" {
				_, err := k.issuers[0].Revoke(bounded(ctx, 15*time.Second), id, "superseded")
				k.note("revoke", err)
				if err == nil {
					k.tally.Lock()
					k.tally.revoked++
					k.tally.Unlock()
				}
			}
		default:
			q, err := k.issuers[0].Request(int(k.next.Add(1)))
			if err != nil {
				k.note("request", err)
				return
			}
			k.one(ctx, r, q, 3)
			if r.IntN(20) == 0 {
				k.one(ctx, r, q, 1) // what was answered is answered the same
			}
		}
	}
}

// one sends a request until it is answered, at most tries times, each time another way.
func (k *soak) one(ctx context.Context, r *rand.Rand, q load.Request, tries int) {
	var err error
	for i := range tries {
		way := 0
		if i > 0 || r.IntN(10) == 0 {
			way = r.IntN(len(k.issuers))
		}
		var a load.Acknowledged
		if a, err = k.issuers[way].Send(bounded(ctx, 8*time.Second), q); err == nil {
			k.took(a)
			return
		}
		k.note("issue", err)
	}
	k.leave(q)
}

func (k *soak) bulk(ctx context.Context, r *rand.Rand) {
	requests := make([]load.Request, 8)
	for i := range requests {
		var err error
		if requests[i], err = k.issuers[0].Request(int(k.next.Add(1))); err != nil {
			k.note("request", err)
			return
		}
	}
	err := k.issuers[0].SendBulk(bounded(ctx, 10*time.Second), requests)
	k.note("batch", err)
	if err == nil {
		k.acked.Add(int64(len(requests)))
		return
	}
	for _, q := range requests { // each again, alone: it may be there or not
		k.one(ctx, r, q, 1)
	}
}

// reservoir bounds what is asked about.
const reservoir = 2000

func (k *soak) took(a load.Acknowledged) {
	n := k.acked.Add(1)
	cert, err := x509.ParseCertificate(a.DER)
	if err != nil {
		k.note("certificate", err)
		return
	}
	k.tally.Lock()
	defer k.tally.Unlock()
	if len(k.tally.known) < reservoir {
		k.tally.known, k.tally.ids = append(k.tally.known, cert), append(k.tally.ids, a.ID)
		return
	}
	i := int(n) % reservoir
	k.tally.known[i], k.tally.ids[i] = cert, a.ID
}

func (k *soak) leave(q load.Request) {
	k.tally.Lock()
	defer k.tally.Unlock()
	k.tally.open = append(k.tally.open, q)
}

func (k *soak) some(r *rand.Rand) string {
	k.tally.Lock()
	defer k.tally.Unlock()
	if len(k.tally.ids) == 0 {
		return ""
	}
	return k.tally.ids[r.IntN(len(k.tally.ids))]
}

func (k *soak) note(what string, err error) {
	if err == nil {
		return
	}
	text := err.Error()
	if i := strings.LastIndex(text, ": "); i > 0 && !strings.Contains(text, "urn:") {
		text = text[i+2:]
	}
	if len(text) > 90 {
		text = text[:90]
	}
	k.tally.Lock()
	defer k.tally.Unlock()
	if len(k.tally.errors) < 60 {
		k.tally.errors[what+": "+text]++
	}
}

// look asks for status, now of a certificate just issued or revoked, now of an older one, now through the balancer, now not. The checker judges the answers.
func (k *soak) look(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil {
		k.tally.Lock()
		var cert *x509.Certificate
		if n := len(k.tally.known); n > 0 {
			cert = k.tally.known[r.IntN(n)]
		}
		k.tally.Unlock()
		if cert == nil {
			pause(ctx, 50*time.Millisecond)
			continue
		}
		_, err := k.status[r.IntN(len(k.status))].Ask(bounded(ctx, 3*time.Second), cert)
		var responder ocsp.ResponseError
		if !errors.As(err, &responder) { // tryLater is an answer
			k.note("status", err)
		}
		pause(ctx, 3*time.Millisecond)
	}
}

func (k *soak) fetch(ctx context.Context) {
	for ctx.Err() == nil {
		for _, l := range k.lists {
			k.note("crl", l.Op(bounded(ctx, 3*time.Second), 0))
		}
		pause(ctx, time.Second)
	}
}

// settle asks again for everything of which nobody knows what became: on a cluster that is well each is answered.
func (k *soak) settle(t *testing.T) {
	t.Helper()
	k.tally.Lock()
	open := k.tally.open
	k.tally.Unlock()
	for _, q := range open {
		eventually(t, 60*time.Second, func() error {
			_, err := k.issuers[0].Send(bounded(t.Context(), 10*time.Second), q)
			return err
		})
	}
	t.Logf("%d requests were left open, and are answered now", len(open))
}

func (k *soak) report(t *testing.T) {
	k.tally.Lock()
	defer k.tally.Unlock()
	var lines []string
	for text, n := range k.tally.errors {
		lines = append(lines, fmt.Sprintf("%6d × %s", n, text))
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(b, a) })
	t.Logf("%d revoked; what failed for clients meanwhile:\n%s", k.tally.revoked, strings.Join(lines, "\n"))
}

// bounded is ctx with a time-out. Its timer goes with the time-out.
func bounded(ctx context.Context, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	context.AfterFunc(ctx, cancel)
	return ctx
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// strikes does one thing after another to one part after another, drawn from r, until done is closed. At most one database node is ill at a time: two
// are an outage that an operator ends. It returns what it did.
func (s *site) strikes(t *testing.T, r *rand.Rand, done <-chan struct{}) []string {
	t.Helper()
	var struck []string
	ill := "" // database node last struck
	timer := time.NewTimer(0)
	for {
		timer.Reset(500*time.Millisecond + time.Duration(r.IntN(1500))*time.Millisecond)
		select {
		case <-done:
			return struck
		case <-timer.C:
		}
		parts := s.status(t).Processes
		p := parts[r.IntN(len(parts))]
		form := []string{"kill", "freeze", "cut"}[r.IntN(3)]
		lasting := 300*time.Millisecond + time.Duration(r.IntN(3500))*time.Millisecond
		if p.PID <= 1 || p.State != cluster.Running {
			continue
		}
		if p.Role == cluster.RoleDB {
			if ill != "" && !s.databasesWell(t) {
				continue
			}
			ill = p.Name
		}
		switch form {
		case "kill":
			if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
				continue
			}
		case "freeze":
			if err := syscall.Kill(p.PID, syscall.SIGSTOP); err != nil {
				continue
			}
			timer.Reset(lasting)
			<-timer.C // the fault itself
			_ = syscall.Kill(p.PID, syscall.SIGCONT)
		case "cut":
			if err := cut(p); err != nil {
				t.Logf("cutting %s: %v", p.Name, err)
				continue
			}
		}
		struck = append(struck, p.Role+" "+form)
	}
}

// databasesWell tells whether every database node is a full member.
func (s *site) databasesWell(t *testing.T) bool {
	t.Helper()
	for _, node := range s.status(t).Database.Nodes {
		if !s.synced(t, node) {
			return false
		}
	}
	return true
}

func (s *site) synced(t *testing.T, node string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	var name, state, size string
	db := s.databaseAt(t, node)
	defer db.Close()
	if err := db.QueryRowContext(ctx, "SHOW GLOBAL STATUS LIKE 'wsrep_local_state_comment'").Scan(&name, &state); err != nil {
		return false
	}
	if err := db.QueryRowContext(ctx, "SHOW GLOBAL STATUS LIKE 'wsrep_cluster_size'").Scan(&name, &size); err != nil {
		return false
	}
	return state == "Synced" && size == "3"
}

// cut ends every TCP connection of a part at once, on both sides, while all processes go on.
func cut(p cluster.Process) error {
	for _, address := range p.Addresses {
		host, _, ok := strings.Cut(address, ":")
		if !ok {
			continue
		}
		for _, side := range []string{"src", "dst"} {
			if out, err := exec.Command("ss", "--kill", "--tcp", "--numeric", side, host).CombinedOutput(); err != nil {
				return fmt.Errorf("ss --kill: %w: %s", err, out)
			}
		}
	}
	return nil
}

func count(what []string) string {
	n := map[string]int{}
	for _, w := range what {
		n[w]++
	}
	var out []string
	for w, c := range n {
		out = append(out, fmt.Sprintf("%s %d", w, c))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}
