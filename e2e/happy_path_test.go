package e2e_test

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/load"
)

// One certificate through every part, judged by openssl: its chain verifies, its status is good, it is revoked, its status is revoked, its serial stands on the CRL.
func TestOneCertificateThroughEveryPart(t *testing.T) {
	s := up(t)
	st := s.status(t)
	ca := st.CAs[0]
	issuer := s.issuer(t, &load.Recorder{})
	r, err := issuer.Request(0)
	if err != nil {
		t.Fatal(err)
	}
	a, err := issuer.Send(t.Context(), r)
	if err != nil {
		t.Fatalf("issuing: %v", err)
	}
	again, err := issuer.Send(t.Context(), r)
	if err != nil {
		t.Fatalf("repeating the request: %v", err)
	}
	if string(again.DER) != string(a.DER) || !again.Replayed {
		t.Errorf("the same Idempotency-Key gave another certificate, or did not say that it was a repeat")
	}

	dir := t.TempDir()
	leaf, root := filepath.Join(dir, "leaf.pem"), filepath.Join(dir, "root.pem")
	write(t, leaf, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.DER}))
	chain, err := os.ReadFile(ca.Chain)
	if err != nil {
		t.Fatal(err)
	}
	write(t, root, lastPEM(t, chain))

	judge := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("openssl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	if out := judge("verify", "-x509_strict", "-CAfile", root, "-untrusted", ca.Chain, leaf); !strings.Contains(out, ": OK") {
		t.Errorf("openssl verify: %s", out)
	}
	ask := func(want string, extra ...string) {
		t.Helper()
		args := append([]string{"ocsp", "-issuer", ca.Certificate, "-cert", leaf, "-url", ca.OCSP, "-CAfile", root, "-verify_other", ca.Chain}, extra...)
		if out := judge(args...); !strings.Contains(out, "leaf.pem: "+want) || !strings.Contains(out, "Response verify OK") {
			t.Errorf("openssl ocsp: want %s, got\n%s", want, out)
		}
	}
	ask("good")
	ask("good", "-no_nonce")

	// Every responder says so, not only the one that the balancer chose.
	s.run(t, "cert", "revoke", a.ID, "--reason", "keyCompromise")
	ask("revoked")
	ask("revoked", "-no_nonce")

	cert, err := x509.ParseCertificate(a.DER)
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.CRLDistributionPoints) != 1 || cert.CRLDistributionPoints[0] != ca.CRL {
		t.Errorf("the certificate names CRL %q; the demo serves %s", cert.CRLDistributionPoints, ca.CRL)
	}
	crl := filepath.Join(dir, "crl.der")
	eventually(t, time.Minute, func() error {
		der, err := get(ca.CRL)
		if err != nil {
			return err
		}
		write(t, crl, der)
		if out := judge("crl", "-inform", "DER", "-in", crl, "-CAfile", ca.Chain, "-noout", "-text"); !strings.Contains(out, "verify OK") {
			return fmt.Errorf("openssl crl: %s", out)
		} else if !strings.Contains(strings.ToLower(out), "serial number: "+a.Serial) {
			return fmt.Errorf("%s is not on the CRL yet", a.Serial)
		}
		return nil
	})
	// The issuer's certificate is where the certificate says.
	der, err := get(cert.IssuingCertificateURL[0])
	if err != nil {
		t.Fatal(err)
	}
	up, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.CheckSignatureFrom(up); err != nil {
		t.Errorf("the certificate does not verify under %s: %v", cert.IssuingCertificateURL[0], err)
	}
	s.fsck(t)
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func lastPEM(t *testing.T, raw []byte) []byte {
	t.Helper()
	var last []byte
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		last = pem.EncodeToMemory(block)
	}
	if last == nil {
		t.Fatal("no PEM block")
	}
	return last
}

func get(url string) ([]byte, error) {
	resp, err := http.Get(url)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return body, err
}
