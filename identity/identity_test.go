package identity_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/identity"
)

const hour = time.Hour

func authority(t *testing.T, cluster string) *identity.Authority {
	t.Helper()
	a, err := identity.CreateAuthority(filepath.Join(t.TempDir(), "infra"), cluster)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func principal(role identity.Role, name string) identity.Principal {
	return identity.Principal{Cluster: "test", Role: role, Name: name}
}

func issue(t *testing.T, a *identity.Authority, p identity.Principal, ips ...net.IP) identity.Files {
	t.Helper()
	f, err := a.IssueTo(filepath.Join(t.TempDir(), "id"), p, ips, nil, hour)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func load(t *testing.T, f identity.Files) *identity.Identity {
	t.Helper()
	i, err := identity.Load(f)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestPrincipalHasOneSpelling(t *testing.T) {
	p := principal(identity.RoleCAOperator, "alice.b_c-1")
	if got, err := identity.ParsePrincipal(p.String()); err != nil || got != p {
		t.Fatal(got, err)
	}
	for _, bad := range []string{
		"", "trivet://", "trivet:///ca/ca1", "trivet://test/ca", "trivet://test/ca/", "trivet://test//ca1", "trivet://test/ca/ca1/", "trivet://test/ca/ca1/x",
		"trivet://Test/ca/ca1", "trivet://test/CA/ca1", "trivet://test/ca/CA1", "TRIVET://test/ca/ca1", "trivet://test/root/x", "trivet://test:1/ca/ca1",
		"trivet://u@test/ca/ca1", "trivet://test/ca/ca1?x", "trivet://test/ca/ca1#x", "trivet://test/ca/%63a1", "trivet://test/ca/ca1\n", " trivet://test/ca/ca1",
		"trivet://test/ca/é", "trivet://-test/ca/ca1", "trivet://test/ca/.", "trivet://test/ca/..", "spiffe://test/ca/ca1", "trivet://test/ca/" + strings.Repeat("a", 64),
	} {
		if got, err := identity.ParsePrincipal(bad); err == nil {
			t.Errorf("%q was read as %v", bad, got)
		}
	}
}

func TestCertificateWithNotExactlyOneURIIsNobody(t *testing.T) {
	u := func(s string) *url.URL { v, _ := url.Parse(s); return v }
	one := u("trivet://test/ca/ca1")
	for name, uris := range map[string][]*url.URL{
		"none": nil, "two": {one, u("trivet://test/admin/x")}, "the same twice": {one, one}, "another scheme beside it": {one, u("https://example.org")},
		"another scheme": {u("https://test/ca/ca1")}, "query": {u("trivet://test/ca/ca1?")}, "escaped": {u("trivet://test/ca/%63a1")},
	} {
		if p, err := identity.FromCertificate(&x509.Certificate{URIs: uris}); err == nil {
			t.Errorf("%s: %v", name, p)
		}
	}
	if p, err := identity.FromCertificate(&x509.Certificate{URIs: []*url.URL{one}}); err != nil || p.Name != "ca1" {
		t.Error(p, err)
	}
	if _, err := identity.FromCertificate(nil); err == nil {
		t.Error("nil is somebody")
	}
}

func TestAuthorityRefusesWhatItMustNotCertify(t *testing.T) {
	a := authority(t, "test")
	for name, f := range map[string]func() error{
		"other cluster": func() error {
			_, _, err := a.Issue(identity.Principal{Cluster: "other", Role: identity.RoleCA, Name: "x"}, nil, nil, hour)
			return err
		},
		"unknown role":          func() error { _, _, err := a.Issue(principal("root", "x"), nil, nil, hour); return err },
		"beyond its own life":   func() error { _, _, err := a.Issue(principal("ca", "x"), nil, nil, 20*365*24*hour); return err },
		"no life":               func() error { _, _, err := a.Issue(principal("ca", "x"), nil, nil, 0); return err },
		"a second in its place": func() error { _, err := identity.CreateAuthority(filepath.Dir(a.TrustFile()), "test"); return err },
		"mistyped path":         func() error { _, err := identity.CreateAuthority("/nonexistent/a/b", "test"); return err },
	} {
		if f() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	b, err := identity.OpenAuthority(filepath.Dir(a.TrustFile()))
	if err != nil || b.Cluster() != "test" {
		t.Fatal(b, err)
	}
	st, err := os.Stat(filepath.Join(filepath.Dir(a.TrustFile()), "infra-ca.key"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st.Mode(), err)
	}
}

func TestLoadRefuses(t *testing.T) {
	a := authority(t, "test")
	good := issue(t, a, principal("ca", "ca1"))
	other := issue(t, a, principal("ca", "ca2"))
	foreign := authority(t, "test")
	junk := filepath.Join(t.TempDir(), "junk")
	os.WriteFile(junk, []byte("junk"), 0o600)
	for name, c := range map[string]struct {
		f    identity.Files
		want string
	}{
		"key of another":     {identity.Files{Cert: good.Cert, Key: other.Key, Trust: good.Trust}, "does not match"},
		"trust of another":   {identity.Files{Cert: good.Cert, Key: good.Key, Trust: foreign.TrustFile()}, "does not pass its own trust"},
		"leaf as trust":      {identity.Files{Cert: good.Cert, Key: good.Key, Trust: good.Cert}, "not a CA's"},
		"junk as trust":      {identity.Files{Cert: good.Cert, Key: good.Key, Trust: junk}, "not PEM"},
		"missing file":       {identity.Files{Cert: good.Cert, Key: good.Key + "x", Trust: good.Trust}, "no such file"},
		"the CA as identity": {identity.Files{Cert: a.TrustFile(), Key: filepath.Join(filepath.Dir(a.TrustFile()), "infra-ca.key"), Trust: a.TrustFile()}, "URI names"},
	} {
		if _, err := identity.Load(c.f); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, err := identity.LoadAt(good, func() time.Time { return time.Now().Add(2 * hour) }); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("expired: %v", err)
	}
}

// serve starts a TLS server with config that answers with the peer's URI.
func serve(t *testing.T, config *tls.Config) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, ok := identity.Peer(r)
		if !ok {
			io.WriteString(w, "nobody")
			return
		}
		io.WriteString(w, p.String())
	}))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	s.TLS = config
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func get(t *testing.T, url string, config *tls.Config) (string, error) {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: config}
	defer tr.CloseIdleConnections()
	r, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

// selfMade makes a client certificate that claims to be uri, signed by nobody's trust.
func selfMade(t *testing.T, uri string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	u, _ := url.Parse(uri)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-hour), NotAfter: time.Now().Add(hour), URIs: []*url.URL{u},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// insist sends the certificate even though the server names other CAs.
func insist(c tls.Certificate) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }}
}

func TestPeersAreVerifiedByChainAndRole(t *testing.T) {
	a := authority(t, "test")
	ca, ocsp := load(t, issue(t, a, principal("ca", "ca1"))), load(t, issue(t, a, principal("ocsp", "ocsp1")))
	alice := load(t, issue(t, a, principal("requester", "alice")))
	strangers := authority(t, "test")
	stranger := load(t, issue(t, strangers, principal("ocsp", "ocsp1")))
	s := serve(t, ca.ServerTLS())

	if got, err := get(t, s.URL, ocsp.ClientTLS(identity.RoleHSMD, identity.RoleCA)); err != nil || got != "trivet://test/ocsp/ocsp1" {
		t.Errorf("right role: %q %v", got, err)
	}
	for name, c := range map[string]*tls.Config{
		"server of another role":            ocsp.ClientTLS(identity.RoleHSMD),
		"no role named":                     ocsp.ClientTLS(),
		"client of another CA":              stranger.ClientTLS(identity.RoleCA),
		"client of another CA, unwary":      insist(stranger.Certificate()),
		"client with a certificate it made": insist(selfMade(t, "trivet://test/ca/ca1")),
		"no certificate":                    {InsecureSkipVerify: true},
		"TLS 1.2":                           {InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{alice.Certificate()}},
	} {
		if got, err := get(t, s.URL, c); err == nil {
			t.Errorf("%s: got %q", name, got)
		}
	}
	// A person's certificate does not make a server, even where its role is named.
	if got, err := get(t, serve(t, alice.ServerTLS()).URL, ocsp.ClientTLS(identity.RoleRequester)); err == nil {
		t.Errorf("a person's server: %q", got)
	}
	// A server of another CA, though it names the right role.
	if got, err := get(t, serve(t, load(t, issue(t, strangers, principal("ca", "ca1"))).ServerTLS()).URL, ocsp.ClientTLS(identity.RoleCA)); err == nil {
		t.Errorf("another CA's server: %q", got)
	}
}

func TestOptionalClientCertificateMustVerifyWhenGiven(t *testing.T) {
	a := authority(t, "test")
	lb := load(t, issue(t, a, principal("lb", "lb1")))
	s := serve(t, lb.ServerTLSOptionalClient())
	if got, err := get(t, s.URL, &tls.Config{InsecureSkipVerify: true}); err != nil || got != "nobody" {
		t.Errorf("without: %q %v", got, err)
	}
	if got, err := get(t, s.URL, insist(selfMade(t, "trivet://test/admin/x"))); err == nil {
		t.Errorf("with a certificate it made: %q", got)
	}
	alice := load(t, issue(t, a, principal("requester", "alice")))
	if got, err := get(t, s.URL, alice.ClientTLS(identity.RoleLB)); err != nil || got != "trivet://test/requester/alice" {
		t.Errorf("with: %q %v", got, err)
	}
}

// Both clusters' CAs in one trust file must not make the other cluster's roles ours.
func TestAnotherClustersPrincipalIsRefused(t *testing.T) {
	a, b := authority(t, "test"), authority(t, "other")
	f := issue(t, a, principal("ca", "ca1"))
	os.WriteFile(f.Trust, append(a.CertificatePEM(), b.CertificatePEM()...), 0o600)
	ca := load(t, f)
	cert, key, err := b.Issue(identity.Principal{Cluster: "other", Role: identity.RoleAdmin, Name: "x"}, nil, nil, hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, _ := tls.X509KeyPair(cert, key)
	if got, err := get(t, serve(t, ca.ServerTLS()).URL, insist(pair)); err == nil {
		t.Fatalf("got %q", got)
	}
	if _, err := ca.Verify([]*x509.Certificate{pair.Leaf}, time.Now()); err == nil || !strings.Contains(err.Error(), "not of cluster") {
		t.Fatal(err)
	}
}

func TestVerifyConveyedCertificate(t *testing.T) {
	a := authority(t, "test")
	ca := load(t, issue(t, a, principal("ca", "ca1")))
	alice := load(t, issue(t, a, principal("requester", "alice"))).Certificate().Leaf
	chain := []*x509.Certificate{alice}
	if p, err := ca.Verify(chain, time.Now()); err != nil || p.Name != "alice" {
		t.Fatal(p, err)
	}
	for name, f := range map[string]func() error{
		"expired": func() error { _, err := ca.Verify(chain, time.Now().Add(2*hour)); return err },
		"not yet": func() error { _, err := ca.Verify(chain, time.Now().Add(-hour)); return err },
		"no time": func() error { _, err := ca.Verify(chain, time.Time{}); return err },
		"empty":   func() error { _, err := ca.Verify(nil, time.Now()); return err },
		"nil":     func() error { _, err := ca.Verify([]*x509.Certificate{}, time.Now()); return err },
		"self made": func() error {
			c, _ := x509.ParseCertificate(selfMade(t, "trivet://test/admin/x").Certificate[0])
			_, err := ca.Verify([]*x509.Certificate{c}, time.Now())
			return err
		},
	} {
		if f() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestReloadKeepsTheOldStateOnFailure(t *testing.T) {
	a := authority(t, "test")
	f := issue(t, a, principal("ca", "ca1"))
	i := load(t, f)
	before := i.Certificate().Leaf
	good, _ := os.ReadFile(f.Cert)
	goodKey, _ := os.ReadFile(f.Key)
	otherCert, otherKey, _ := a.Issue(principal("ca", "ca2"), nil, nil, hour)
	a.SetClock(func() time.Time { return time.Now().Add(-2 * hour) })
	oldCert, oldKey, _ := a.Issue(principal("ca", "ca1"), nil, nil, hour)
	for name, c := range map[string]struct {
		cert, key []byte
		want      string
	}{
		"key does not match":     {good, otherKey, "does not match"},
		"principal changed":      {otherCert, otherKey, "this process is trivet://test/ca/ca1"},
		"expired":                {oldCert, oldKey, "expired"},
		"certificate torn":       {good[:len(good)/2], goodKey, "reading certificate"},
		"certificate file empty": {nil, goodKey, "reading certificate"},
	} {
		os.WriteFile(f.Cert, c.cert, 0o600)
		os.WriteFile(f.Key, c.key, 0o600)
		if err := i.Reload(); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "the old one stays in use") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if !i.Certificate().Leaf.Equal(before) {
			t.Errorf("%s: the state changed", name)
		}
	}
}

func TestWatchTakesUpRenewalForNewHandshakes(t *testing.T) {
	a := authority(t, "test")
	dir := filepath.Join(t.TempDir(), "id")
	f, err := a.IssueTo(dir, principal("ca", "ca1"), nil, nil, hour)
	if err != nil {
		t.Fatal(err)
	}
	i := load(t, f)
	server, client := i.ServerTLS(), i.ClientTLS(identity.RoleCA) // made before the renewal
	s := serve(t, server)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	var log lockedBuffer
	go func() { done <- i.Watch(ctx, time.Millisecond, slog.New(slog.NewTextHandler(&log, nil))) }()

	os.WriteFile(f.Key, []byte("half a renewal"), 0o600)
	for !strings.Contains(log.String(), "not reloaded") {
		time.Sleep(time.Millisecond)
	}
	if _, err := a.IssueTo(dir, principal("ca", "ca1"), nil, nil, 2*hour); err != nil {
		t.Fatal(err)
	}
	for time.Until(i.NotAfter()) < hour {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(log.String(), "not reloaded"); n > 3 {
		t.Errorf("one failure logged %d times", n)
	}
	var seen []byte
	client.VerifyPeerCertificate = func(raw [][]byte, _ [][]*x509.Certificate) error { seen = raw[0]; return nil }
	if _, err := get(t, s.URL, client); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(seen, i.Certificate().Certificate[0]) {
		t.Error("the server still shows the old certificate")
	}
}

func TestAllowIsDefaultDeny(t *testing.T) {
	a := authority(t, "test")
	i := load(t, issue(t, a, principal("sre", "sam")))
	leaf := i.Certificate().Leaf
	r := httptest.NewRequest("GET", "/", nil)
	asSam := r.Clone(t.Context())
	asSam.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}, VerifiedChains: [][]*x509.Certificate{{leaf}}}
	unverified := r.Clone(t.Context())
	unverified.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
	old := *leaf
	old.NotAfter = time.Now().Add(-time.Second)
	expired := r.Clone(t.Context())
	expired.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{&old}, VerifiedChains: [][]*x509.Certificate{{&old}}}
	for name, c := range map[string]struct {
		r     *http.Request
		roles []identity.Role
		want  int
	}{
		"no role": {asSam, nil, 403}, "other role": {asSam, []identity.Role{"admin"}, 403}, "its role": {asSam, []identity.Role{"admin", "sre"}, 200},
		"plain http": {r, identity.Roles(), 401}, "not verified": {unverified, identity.Roles(), 401}, "expired since": {expired, identity.Roles(), 401},
	} {
		w := httptest.NewRecorder()
		identity.Allow(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(200) }), c.roles...).ServeHTTP(w, c.r)
		if w.Code != c.want {
			t.Errorf("%s: %d, want %d", name, w.Code, c.want)
		}
		if w.Code != 200 && w.Header().Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %s", name, w.Header().Get("Content-Type"))
		}
	}
}

func TestOrdinaryClientsVerifyTheServerByAddress(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("curl is needed:", err)
		}
		t.Skip("curl is not installed")
	}
	a := authority(t, "test")
	f := issue(t, a, principal("lb", "lb1"), net.IPv4(127, 0, 0, 1))
	s := serve(t, load(t, f).ServerTLS())
	alice := issue(t, a, principal("requester", "alice"))
	out, err := exec.Command(curl, "-sS", "--cacert", alice.Trust, "--cert", alice.Cert, "--key", alice.Key, s.URL).CombinedOutput()
	if err != nil || string(out) != "trivet://test/requester/alice" {
		t.Fatalf("%s %v", out, err)
	}
}

func TestKeyFileIsPrivate(t *testing.T) {
	f := issue(t, authority(t, "test"), principal("ca", "ca1"))
	st, err := os.Stat(f.Key)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st.Mode(), err)
	}
	b, _ := os.ReadFile(f.Key)
	if p, _ := pem.Decode(b); p == nil || p.Type != "PRIVATE KEY" {
		t.Fatal("not PKCS#8")
	}
}

func FuzzParsePrincipal(f *testing.F) {
	f.Add("trivet://test/ca/ca1")
	f.Add("trivet://test/ca/%63a1?")
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := identity.ParsePrincipal(s); err == nil && p.String() != s {
			t.Fatalf("%q is also spelled %q", p, s)
		}
	})
}
