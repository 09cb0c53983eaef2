package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ocsp"

	"trivet/cluster"
)

// trial is what `demo try` found.
type trial struct {
	OK          bool    `json:"ok"`
	Certificate string  `json:"certificate"` // id
	Judge       string  `json:"judge"`       // who verified: openssl, or Go's crypto/x509 and x/crypto/ocsp
	Steps       []step  `json:"steps"`
	Seconds     float64 `json:"seconds"`
}

// step is one thing that was done, and what it showed.
type step struct {
	What    string  `json:"what"`
	Command string  `json:"command,omitempty"`
	Shows   string  `json:"shows"`
	OK      bool    `json:"ok"`
	Seconds float64 `json:"seconds"`
}

// ocspWait bounds how long a fresh certificate's status may take to reach the responders.
const ocspWait = 10 * time.Second

func (a *app) demoTry() *cobra.Command {
	var csr, name string
	c := &cobra.Command{
		Use:   "try",
		Short: "Issue, check, revoke and check again: one certificate's whole life",
		Long: `Issue a certificate from a CSR, verify its chain, ask the responders, revoke it, and ask them again. Where the openssl program is
installed it makes the request and is the judge; each of its commands is printed, to be repeated.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (trial, error) {
			ctx, cancel := context.WithTimeout(ctx, trialLimit)
			defer cancel()
			cl, err := a.newClient("requester")
			if err != nil {
				return trial{}, err
			}
			st, err := cl.demo.Status()
			if err != nil {
				return trial{}, err
			}
			if len(st.CAs) == 0 {
				return trial{}, errors.New("the demo has no CA yet: see `pkictl demo status`, and `pkictl demo logs init`")
			}
			dir, err := os.MkdirTemp(st.Dir, "try-") // with the demo it goes
			if err != nil {
				return trial{}, fmt.Errorf("making a directory: %w", err)
			}
			t := &trier{app: a, client: cl, ca: st.CAs[0], dir: dir, csr: csr, name: name, flag: dirFlag(st)}
			t.judge = opensslJudge{}
			if _, err := exec.LookPath("openssl"); err != nil {
				a.sayf("openssl is not installed: judging with Go's own libraries")
				t.judge = goJudge{}
			}
			began := time.Now()
			t.result.Judge = t.judge.name()
			err = t.run(ctx)
			t.result.Seconds = time.Since(began).Seconds()
			t.result.OK = err == nil
			return t.result, err
		}, func(w io.Writer, t trial) {
			fmt.Fprintf(w, "%s was issued, found good, revoked and found revoked by %s in %.1f s\n", t.Certificate, t.Judge, t.Seconds)
		}),
	}
	c.Flags().StringVar(&csr, "csr", "", "use this request instead of making one")
	c.Flags().StringVar(&name, "dns", "www.example.org", "name to certify")
	return c
}

// trialLimit bounds a trial, and how long it waits for an installation that is still coming up.
const trialLimit = 30 * time.Second

// trier walks one certificate through its life.
type trier struct {
	app       *app
	client    *client
	ca        cluster.CAStatus
	dir       string
	csr, name string
	flag      string // what a command to repeat needs to find this demo
	judge     judge
	result    trial
}

// judge is an independent opinion. Each method returns the command to repeat it with, and what it showed.
type judge interface {
	name() string
	// verify checks the chain of certificate.
	verify(ctx context.Context, ca cluster.CAStatus, certificate string) (command, shows string, err error)
	// status asks the responder: good, revoked or something else.
	status(ctx context.Context, ca cluster.CAStatus, certificate string) (command, shows, status string, err error)
}

func (t *trier) run(ctx context.Context) error {
	csr, err := t.request(ctx)
	if err != nil {
		return err
	}
	file, request := filepath.Join(t.dir, "certificate.pem"), t.csr
	if request == "" {
		request = filepath.Join(t.dir, "request.csr")
	}
	if err := t.step("issue", func() (string, string, error) {
		cert, _, err := t.app.issue(ctx, trialLimit, t.client, issueRequest{Profile: "tls-server", CSR: string(csr)}, newKey())
		if err != nil {
			return "", "", err
		}
		t.result.Certificate = cert.ID
		return program() + " cert issue --csr " + request + " --out " + file + t.flag, cert.ID + " for " + cert.names(), os.WriteFile(file, []byte(cert.pem()), 0o644)
	}); err != nil {
		return err
	}
	if err := t.step("verify the chain", func() (string, string, error) { return t.judge.verify(ctx, t.ca, file) }); err != nil {
		return err
	}
	if err := t.expect(ctx, "ask for its status", file, "good"); err != nil {
		return err
	}
	if err := t.step("revoke", func() (string, string, error) {
		ans, err := t.app.insist(ctx, trialLimit, t.client, http.MethodPost, "/v1/certificates/"+url.PathEscape(t.result.Certificate)+"/revoke", nil, map[string]string{"reason": "superseded"})
		if err != nil {
			return "", "", err
		}
		var r revoked
		if err := json.Unmarshal(ans.Body, &r); err != nil {
			return "", "", fmt.Errorf("reading the API's answer: %w", err)
		}
		shows := fmt.Sprintf("%s, %s; %d responders show it", r.Status, r.Reason, r.Responders.Applied)
		if ans.Status == http.StatusAccepted {
			shows += "; not yet: " + strings.Join(r.Responders.Pending, ", ")
		}
		return program() + " cert revoke " + t.result.Certificate + " --reason superseded" + t.flag, shows, nil
	}); err != nil {
		return err
	}
	return t.expect(ctx, "ask for its status again", file, "revoked")
}

// request reads the CSR or makes one, as somebody who has never heard of pkictl would.
func (t *trier) request(ctx context.Context) (csr []byte, err error) {
	if t.csr != "" {
		return t.app.readFile(t.csr)
	}
	err = t.step("make a key and a request", func() (string, string, error) {
		file := filepath.Join(t.dir, "request.csr")
		if _, ok := t.judge.(goJudge); ok {
			if csr, _, err = newRequest([]string{t.name}); err == nil {
				err = writeFile(file, csr, 0o644)
			}
			return "", "a request for " + t.name, err
		}
		command, _, err := openssl(ctx, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", filepath.Join(t.dir, "key.pem"),
			"-subj", "/", "-addext", "subjectAltName=DNS:"+t.name, "-out", file)
		if err != nil {
			return command, "", err
		}
		csr, err = os.ReadFile(file)
		return command, "a request for " + t.name, err
	})
	return csr, err
}

// expect asks for the status until it is want. What the responder does not know yet it may learn within ocspWait; anything else but want is final.
func (t *trier) expect(ctx context.Context, what, file, want string) error {
	return t.step(what, func() (string, string, error) {
		for end := time.Now().Add(ocspWait); ; {
			command, shows, status, err := t.judge.status(ctx, t.ca, file)
			if err == nil && status == want {
				return command, shows, nil
			}
			if err == nil {
				err = fmt.Errorf("the responder says %s, want %s", status, want)
			}
			if status != "" || time.Now().After(end) || ctx.Err() != nil {
				return command, shows, err
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
}

// step does one thing, times it and tells.
func (t *trier) step(what string, fn func() (command, shows string, err error)) error {
	began := time.Now()
	command, shows, err := fn()
	s := step{What: what, Command: command, Shows: shows, OK: err == nil, Seconds: time.Since(began).Seconds()}
	t.result.Steps = append(t.result.Steps, s)
	mark := "✓"
	if err != nil {
		mark = "✗"
	}
	t.app.sayf("%s %s (%.2f s)", mark, what, s.Seconds)
	if command != "" {
		t.app.sayf("    $ %s", command)
	}
	for line := range strings.Lines(shows) {
		t.app.sayf("    %s", strings.TrimRight(line, "\n"))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// openssl runs the openssl program and returns its command line and what it printed.
func openssl(ctx context.Context, args ...string) (command, output string, err error) {
	cmd := exec.CommandContext(ctx, "openssl", args...)
	out, err := cmd.CombinedOutput()
	output = strings.TrimSpace(string(out))
	if err != nil {
		err = fmt.Errorf("openssl %s: %w: %s", args[0], err, output)
	}
	return "openssl " + strings.Join(args, " "), output, err
}

type opensslJudge struct{}

func (opensslJudge) name() string { return "openssl" }

func (opensslJudge) verify(ctx context.Context, ca cluster.CAStatus, certificate string) (command, shows string, err error) {
	return openssl(ctx, "verify", "-CAfile", ca.Chain, "-purpose", "sslserver", "-x509_strict", certificate)
}

func (opensslJudge) status(ctx context.Context, ca cluster.CAStatus, certificate string) (command, shows, status string, err error) {
	command, shows, err = openssl(ctx, "ocsp", "-issuer", ca.Certificate, "-cert", certificate, "-CAfile", ca.Chain, "-no_nonce", "-url", ca.OCSP)
	for line := range strings.Lines(shows) {
		if s, ok := strings.CutPrefix(strings.TrimSpace(line), certificate+": "); ok {
			status = s
		}
	}
	if err == nil && !strings.Contains(shows, "Response verify OK") {
		err = errors.New("openssl does not trust the response: " + shows)
	}
	return command, shows, status, err
}

// goJudge is the opinion of Go's libraries, where there is no openssl.
type goJudge struct{}

func (goJudge) name() string { return "Go's crypto/x509 and x/crypto/ocsp" }

func (goJudge) verify(_ context.Context, ca cluster.CAStatus, certificate string) (command, shows string, err error) {
	leaf, chain, err := readChain(ca, certificate)
	if err != nil {
		return "", "", err
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for i, c := range chain {
		if i == len(chain)-1 {
			roots.AddCert(c)
		} else {
			between.AddCert(c)
		}
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between}); err != nil {
		return "", "", err
	}
	return "", "the chain verifies up to " + chain[len(chain)-1].Subject.String(), nil
}

func (goJudge) status(ctx context.Context, ca cluster.CAStatus, certificate string) (command, shows, status string, err error) {
	leaf, chain, err := readChain(ca, certificate)
	if err != nil {
		return "", "", "", err
	}
	question, err := ocsp.CreateRequest(leaf, chain[0], nil)
	if err != nil {
		return "", "", "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, ca.OCSP, bytes.NewReader(question))
	if err != nil {
		return "", "", "", err
	}
	req.Header.Set("Content-Type", "application/ocsp-request")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", "", "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return "", "", "", err
	}
	answer, err := ocsp.ParseResponseForCert(body, leaf, chain[0])
	if err != nil {
		return "", "", "", err
	}
	status = map[int]string{ocsp.Good: "good", ocsp.Revoked: "revoked", ocsp.Unknown: "unknown"}[answer.Status]
	return "", "the responder at " + ca.OCSP + " says " + status, status, nil
}

// readChain reads a certificate and its CA's chain, up to the root.
func readChain(ca cluster.CAStatus, certificate string) (leaf *x509.Certificate, chain []*x509.Certificate, err error) {
	for _, file := range []string{certificate, ca.Chain} {
		rest, err := os.ReadFile(file)
		if err != nil {
			return nil, nil, fmt.Errorf("reading a certificate: %w", err)
		}
		for block, more := pem.Decode(rest); block != nil; block, more = pem.Decode(more) {
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, fmt.Errorf("reading %s: %w", file, err)
			}
			if file == ca.Chain {
				chain = append(chain, c)
			} else if leaf == nil {
				leaf = c
			}
		}
	}
	if leaf == nil || len(chain) == 0 {
		return nil, nil, fmt.Errorf("%s or %s holds no certificate", certificate, ca.Chain)
	}
	return leaf, chain, nil
}
