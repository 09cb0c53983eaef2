package e2e_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/load"
)

// groupsNetwork is the loopback block of this scenario's own cluster.
const groupsNetwork = "127.89.0.0/16"

// upWithGroups starts a cluster that has the root's and the responders' keys in HSM groups of their own, for this test alone.
func upWithGroups(t *testing.T) *site {
	t.Helper()
	needTools(t)
	dir, err := directory("trivet-e2e-groups-")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{dir: filepath.Join(dir, "cluster"), history: beginHistory(t)}
	t.Cleanup(func() {
		out, err := exec.Command(pkictl(), "demo", "down", "--dir", s.dir).CombinedOutput()
		if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
			t.Errorf("taking the cluster down: %v\n%s", err, out)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil { // the database server may be another user
		t.Fatal(err)
	}
	s.run(t, "demo", "up", "--network", groupsNetwork, "--groups", "root,ca,va")
	s.allWell(t)
	return s
}

// allAre waits until every member of a group is in that state.
func (s *site) allAre(t *testing.T, group, state string) {
	t.Helper()
	eventually(t, 30*time.Second, func() error {
		g, err := s.group("--group", group, "--wait", "1s")
		if err != nil {
			return err
		}
		for _, m := range g.Members {
			if m.State != state {
				return fmt.Errorf("%s of group %s is %s (%s), not %s", m.Name, group, m.State, m.Cause, state)
			}
		}
		return nil
	})
}

// issue issues a certificate.
func (s *site) issue(t *testing.T, issuer *load.Issuer, n int) *x509.Certificate {
	t.Helper()
	r, err := issuer.Request(n)
	if err != nil {
		t.Fatal(err)
	}
	a, err := issuer.Send(t.Context(), r)
	if err != nil {
		t.Fatalf("issuing: %v", err)
	}
	cert, err := x509.ParseCertificate(a.DER)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// answer is what the responder says about a certificate: good, revoked, unknown, or an error such as tryLater.
func (s *site) answer(ctx context.Context, url string, cert, ca *x509.Certificate) error {
	der, err := ocsp.CreateRequest(cert, ca, nil)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(der))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/ocsp-request")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	got, err := ocsp.ParseResponseForCert(body, cert, ca)
	if err != nil {
		return err
	}
	return isGood(0, cert, got)
}

// HSM groups fail one by one: without the root's group everything goes on, without the responders' group issuing does, and status from what is
// signed already. A group comes and goes live.
func TestHSMGroupsFailAndEndOneByOne(t *testing.T) {
	s := upWithGroups(t)
	url := s.status(t).CAs[0].OCSP
	ca, _ := s.authority(t)
	issuer := s.issuer(t, &load.Recorder{})
	good := func(cert *x509.Certificate) {
		t.Helper()
		eventually(t, 20*time.Second, func() error { return s.answer(t.Context(), url, cert, ca) })
	}

	if out, stderr, err := s.try("key", "list"); err == nil || !strings.Contains(string(stderr), "ca, root, va") {
		t.Errorf("with several groups, which one has to be said: %s%s", out, stderr)
	}
	for group, key := range map[string]string{"root": "ca:demo-root-g1", "ca": "ca:demo-g1", "va": "ocsp:demo-g1"} {
		s.run(t, "key", "show", key, "--group", group)
	}
	first := s.issue(t, issuer, 1)
	good(first)
	status := &load.Responder{URL: url, Client: load.NewClient(nil, 8), Issuer: ca, Pick: func(int) *x509.Certificate { return first }, Want: isGood}
	asking := make(chan load.Result, 1)
	ctx, stopAsking := context.WithCancel(t.Context())
	defer stopAsking()
	go func() {
		asking <- load.Run(ctx, load.Config{Rate: 20, Duration: 5 * time.Minute, Timeout: 5 * time.Second}, status.Op)
	}()
	stop := s.loading(t, 20)

	// The root's group is gone: its HSMs are locked away most of the time.
	s.run(t, "demo", "kill", "hsmd-root-a", "hsmd-root-b")
	s.allAre(t, "root", "failed")
	good(s.issue(t, issuer, 2))
	s.allAre(t, "ca", "active")
	s.allAre(t, "va", "active")

	// The responders' group, too.
	s.run(t, "demo", "kill", "hsmd-va-a", "hsmd-va-b")
	s.allAre(t, "va", "failed")
	second := s.issue(t, issuer, 3)
	if err := s.answer(t.Context(), url, first, ca); err != nil {
		t.Errorf("what was signed before is not served: %v", err)
	}
	eventually(t, 15*time.Second, func() error {
		var later ocsp.ResponseError
		if err := s.answer(t.Context(), url, second, ca); !errors.As(err, &later) || later.Status != ocsp.TryLater {
			return fmt.Errorf("nobody can sign that it is good, and the answer is %v", err)
		}
		return nil
	})
	s.run(t, "demo", "start", "hsmd-va-a", "hsmd-va-b", "hsmd-root-a", "hsmd-root-b")
	good(second)
	s.allAre(t, "root", "active")

	// A fourth group comes, is used, and ends.
	s.run(t, "demo", "add", "hsmd-d", "hsmd-e")
	create := []string{"hsm", "group", "create", "signing", "--member", "hsmd-d", "--member", "hsmd-e", "--why", "the scenario"}
	if out, stderr, err := s.try(create...); err == nil || !strings.Contains(string(stderr), "two people") {
		t.Errorf("a group was created by one: %s%s", out, stderr)
	}
	s.run(t, append(create, "--approve-as", two)...)
	key := s.key(t, "create", "release", "--purpose", "audit", "--group", "signing").Result
	s.wellKept(t, "--group", "signing")
	record := s.database(t)
	eventually(t, 40*time.Second, func() error { // a CA node has found it by itself
		var leases int
		err := record.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM group_log WHERE key_group = 'signing/lease'").Scan(&leases)
		if err == nil && leases == 0 {
			err = errors.New("nobody keeps group signing in step")
		}
		return err
	})
	if out, stderr, err := s.try("hsm", "enroll", "hsmd-d", "--group", "va", "--approve-as", two); err == nil || !strings.Contains(string(stderr), "group signing") {
		t.Errorf("an HSM joined a second group: %s%s", out, stderr)
	}
	for _, group := range []string{"signing", "va", "ca", "root"} {
		if out, stderr, err := s.try("hsm", "group", "delete", group, "--why", "a mistake", "--approve-as", two); err == nil || !strings.Contains(string(stderr), "in use") {
			t.Errorf("group %s was deleted: %s%s", group, out, stderr)
		}
	}
	s.run(t, "hsm", "policy", "--group", "signing", "--set", "destroy_after=1ms", "--approve-as", two)
	s.key(t, "retire", string(key.ID), "--why", "end of the scenario", "--group", "signing", "--approve-as", two)
	if got := s.key(t, "destroy", string(key.ID), "--approve-as", two, "--group", "signing"); got.Result.State != "destroyed" {
		t.Errorf("%s is %s", key.ID, got.Result.State)
	}
	s.run(t, "hsm", "group", "delete", "signing", "--why", "end of the scenario", "--approve-as", two)
	for _, args := range [][]string{append(create, "--approve-as", two), {"key", "create", "more", "--purpose", "audit", "--group", "signing"}} {
		if out, stderr, err := s.try(args...); err == nil || !strings.Contains(string(stderr), "deleted") {
			t.Errorf("%v in a deleted group: %s%s", args, out, stderr)
		}
	}
	var list []struct {
		Name    string
		Deleted bool
	}
	if err := json.Unmarshal(s.run(t, "hsm", "group", "list", "--output", "json"), &list); err != nil || len(list) != 4 || list[3].Name != "signing" || !list[3].Deleted {
		t.Errorf("%+v, %v", list, err)
	}
	s.run(t, "demo", "remove", "hsmd-d", "hsmd-e") // nobody misses them
	s.run(t, "hsm", "status")

	stopAsking()
	if r := <-asking; r.Failed > 0 || r.Requests == 0 {
		t.Errorf("status meanwhile: %v", r)
	}
	stop()
	for _, group := range []string{"root", "ca", "va"} {
		s.wellKept(t, "--group", group)
	}
	s.fsck(t)
}
