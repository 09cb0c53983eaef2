package e2e_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/load"
)

// databases are the nodes of the record, in the order of the demo.
var databases = []string{"db1", "db2", "db3"}

// stopDatabases ends every database node, hard.
func (s *site) stopDatabases(t *testing.T) {
	t.Helper()
	for _, name := range databases {
		s.run(t, "demo", "kill", name)
	}
}

// startDatabases starts them together: which of them is the most advanced is found out once all can be looked at.
func (s *site) startDatabases(t *testing.T) {
	t.Helper()
	var starting sync.WaitGroup
	for _, name := range databases {
		starting.Go(func() {
			if _, stderr, err := s.try("demo", "start", name); err != nil {
				t.Errorf("starting %s: %v\n%s", name, err, stderr)
			}
		})
	}
	starting.Wait()
}

// recovery reads the newest recovery rounds. Exit code 1 says that one is under way.
func (s *site) recovery(t *testing.T) (r struct {
	Open   bool `json:"open"`
	Rounds []struct {
		Round  uint64 `json:"round"`
		Proved bool   `json:"proved"`
		Nodes  []struct {
			Node   string `json:"node"`
			State  string `json:"state"`
			Detail struct {
				Certificates int `json:"certificates"`
				Revocations  int `json:"revocations"`
				Conflicts    int `json:"conflicts"`
			} `json:"detail"`
		} `json:"nodes"`
	} `json:"rounds"`
}) {
	t.Helper()
	out, stderr, err := s.try("recovery", "status", "--output", "json")
	if jerr := json.Unmarshal(out, &r); jerr != nil {
		t.Fatalf("recovery status: %v, %v\n%s%s", err, jerr, stderr, out)
	}
	return r
}

// All database nodes are put back to an older copy of their data, as after restoring a backup. Whatever was released since comes back by itself: the
// same certificates to the same requests, revoked what was revoked, and no responder ever says otherwise.
func TestADatabaseThatWentBackIsHealed(t *testing.T) {
	s := up(t)
	issuer := s.issuer(t, &load.Recorder{})
	ca, _ := s.authority(t)
	var earlier uint64
	for _, r := range s.recovery(t).Rounds {
		earlier = max(earlier, r.Round)
	}
	old := t.TempDir()
	s.stopDatabases(t)
	data := map[string]string{}
	for _, name := range databases {
		data[name] = s.process(t, name).Dir
		if out, err := exec.Command("cp", "-a", data[name], filepath.Join(old, name)).CombinedOutput(); err != nil {
			t.Fatalf("copying %s: %v\n%s", data[name], err, out)
		}
	}
	s.startDatabases(t)
	s.allWell(t)

	type released struct {
		request load.Request
		der     []byte
		id      string
	}
	var all []released
	for i := range 40 {
		r, err := issuer.Request(2_000_000 + i)
		if err != nil {
			t.Fatal(err)
		}
		a, err := issuer.Send(t.Context(), r)
		if err != nil {
			t.Fatalf("issuing: %v", err)
		}
		all = append(all, released{r, a.DER, a.ID})
	}
	revoked := all[7]
	s.run(t, "cert", "revoke", revoked.id, "--reason", "keyCompromise")

	s.stopDatabases(t)
	for _, name := range databases {
		if err := os.RemoveAll(data[name]); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cp", "-a", filepath.Join(old, name), data[name]).CombinedOutput(); err != nil {
			t.Fatalf("restoring %s: %v\n%s", data[name], err, out)
		}
	}
	s.startDatabases(t)
	began := time.Now()
	eventually(t, 60*time.Second, func() error {
		r := s.recovery(t)
		for _, round := range r.Rounds { // not only the newest: nodes that come back one after another may look suspicious once more
			if !r.Open && round.Round > earlier && round.Proved {
				return nil
			}
		}
		return fmt.Errorf("recovery is %+v", r)
	})
	s.allWell(t)
	t.Logf("healed within %s of the databases' start", time.Since(began).Round(100*time.Millisecond))

	for _, c := range all {
		a, err := issuer.Send(t.Context(), c.request)
		if err != nil {
			t.Fatalf("asking for %s again: %v", c.id, err)
		}
		if a.ID != c.id || !bytes.Equal(a.DER, c.der) {
			t.Errorf("%s came back as %s, or with other bytes", c.id, a.ID)
		}
	}
	conflicts := 0
	for _, round := range s.recovery(t).Rounds {
		for _, n := range round.Nodes {
			conflicts += n.Detail.Conflicts
		}
	}
	if conflicts > 0 {
		t.Errorf("%d contradictions", conflicts)
	}
	cert, err := x509.ParseCertificate(revoked.der)
	if err != nil {
		t.Fatal(err)
	}
	if status := s.ocspStatus(t, cert, ca); status != ocsp.Revoked {
		t.Errorf("the revoked certificate reads %d", status)
	}
	s.fsck(t)
}

// ocspStatus asks for a certificate's status with openssl's request and x/crypto's eyes.
func (s *site) ocspStatus(t *testing.T, cert, issuer *x509.Certificate) int {
	t.Helper()
	der, err := ocsp.CreateRequest(cert, issuer, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := load.NewClient(nil, 1).Post(s.status(t).Endpoints.Public[0]+"/ocsp", "application/ocsp-request", bytes.NewReader(der))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}
	r, err := ocsp.ParseResponseForCert(body.Bytes(), cert, issuer)
	if err != nil {
		t.Fatalf("%v: %s", err, pem.EncodeToMemory(&pem.Block{Type: "OCSP RESPONSE", Bytes: body.Bytes()}))
	}
	return r.Status
}
