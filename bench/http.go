package main

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/cluster"
)

// The generator keeps to core 0 and what is measured to core 1, so that a figure is one core's.
const (
	generatorCore = "0"
	measuredCore  = "1"
)

// ocspKeepalive measures pre-signed OCSP answers of one responder, asked directly by GET over kept-alive connections, beside HAProxy returning the same bytes.
func ocspKeepalive(ctx context.Context, s *site) ([]Row, error) {
	path, answer, err := s.question(ctx)
	if err != nil {
		return nil, err
	}
	va, err := s.process(ctx, "ocsp1")
	if err != nil {
		return nil, err
	}
	static := filepath.Join(s.dir, "answer.der")
	if err := os.WriteFile(static, answer, 0o644); err != nil {
		return nil, err
	}
	ours, theirs, err := s.beside(ctx, va, path, "  http-request return status 200 content-type application/ocsp-response file "+static+"\n")
	if err != nil {
		return nil, err
	}
	return []Row{{Name: "ocsp_keepalive", Value: ours, Unit: "req/s", Reference: "HAProxy static return of the same bytes, one core", ReferenceValue: theirs, Ratio: ours / theirs}}, nil
}

// lbHTTP measures the balancer on plain keep-alive HTTP in front of the responders, beside HAProxy in front of one and beside asking directly.
func lbHTTP(ctx context.Context, s *site) ([]Row, error) {
	path, _, err := s.question(ctx)
	if err != nil {
		return nil, err
	}
	va, err := s.process(ctx, "ocsp1")
	if err != nil {
		return nil, err
	}
	direct, err := median(runs, func() (float64, error) { return wrk(ctx, "http://"+va.Addresses["public"]+path) })
	if err != nil {
		return nil, err
	}
	lb, err := s.process(ctx, "lb1")
	if err != nil {
		return nil, err
	}
	ours, theirs, err := s.beside(ctx, lb, path, "  default_backend va\nbackend va\n  server a "+va.Addresses["public"]+"\n")
	if err != nil {
		return nil, err
	}
	return []Row{{
		Name: "lb_http", Value: ours, Unit: "req/s", Reference: fmt.Sprintf("HAProxy http, plain to one node (direct: %.0f/s)", direct),
		ReferenceValue: theirs, Ratio: ours / theirs,
	}}, nil
}

// beside measures a process of ours on the measured core and then, on the same core, HAProxy with the given frontend.
func (s *site) beside(ctx context.Context, p cluster.Process, path, frontend string) (ours, theirs float64, err error) {
	release, err := pin(ctx, p.PID)
	if err != nil {
		return 0, 0, err
	}
	defer release()
	if ours, err = median(runs, func() (float64, error) { return wrk(ctx, "http://"+p.Addresses["public"]+path) }); err != nil {
		return 0, 0, err
	}
	at, stop, err := haproxy(ctx, s, frontend)
	if err != nil {
		return 0, 0, err
	}
	defer stop()
	theirs, err = median(runs, func() (float64, error) { return wrk(ctx, at+path) })
	return ours, theirs, err
}

// question issues a certificate and returns the path of an OCSP GET about it and the answer, once a responder has it.
func (s *site) question(ctx context.Context) (path string, answer []byte, err error) {
	st, err := s.status(ctx)
	if err != nil {
		return "", nil, err
	}
	issuer, err := s.issuer(ctx, 1)
	if err != nil {
		return "", nil, err
	}
	r, err := issuer.Request(int(time.Now().UnixNano() % 1_000_000))
	if err != nil {
		return "", nil, err
	}
	a, err := issuer.Send(ctx, r)
	if err != nil {
		return "", nil, err
	}
	cert, err := x509.ParseCertificate(a.DER)
	if err != nil {
		return "", nil, err
	}
	ca, err := readCertificate(st.CAs[0].Certificate)
	if err != nil {
		return "", nil, err
	}
	q, err := ocsp.CreateRequest(cert, ca, nil)
	if err != nil {
		return "", nil, err
	}
	path = "/ocsp/" + st.CAs[0].ID + "/" + strings.NewReplacer("+", "%2B", "/", "%2F", "=", "%3D").Replace(base64.StdEncoding.EncodeToString(q))
	for began := time.Now(); ; {
		resp, err := plain.Get(st.Endpoints.Public[0] + path)
		if err != nil {
			return "", nil, err
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil {
			_, err = ocsp.ParseResponseForCert(body, cert, ca)
		}
		if err == nil {
			return path, body, nil
		}
		if time.Since(began) > 10*time.Second {
			return "", nil, fmt.Errorf("asking %s: %w", path, err)
		}
	}
}

var perSecond = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)

// wrk asks url over 32 kept-alive connections and returns answers per second; an answer that is not 2xx or a socket error fails the row.
func wrk(ctx context.Context, url string) (float64, error) {
	out, err := exec.CommandContext(ctx, "taskset", "-c", generatorCore, "wrk", "-t1", "-c32", "-d"+seconds.String(), url).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("wrk %s: %w\n%s", url, err, out)
	}
	if strings.Contains(string(out), "Non-2xx") || strings.Contains(string(out), "Socket errors") {
		return 0, fmt.Errorf("wrk %s:\n%s", url, out)
	}
	m := perSecond.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("wrk %s said nothing of requests per second:\n%s", url, out)
	}
	return strconv.ParseFloat(string(m[1]), 64)
}

// pin puts every thread of a process on the measured core, until release.
func pin(ctx context.Context, pid int) (release func(), err error) {
	set := func(cores string) error {
		out, err := exec.CommandContext(ctx, "taskset", "-a", "-p", "-c", cores, strconv.Itoa(pid)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("pinning process %d: %w\n%s", pid, err, out)
		}
		return nil
	}
	if err := set(measuredCore); err != nil {
		return nil, err
	}
	return func() { _ = set(generatorCore + "," + measuredCore) }, nil // the cluster is taken down after the bench: a process left on one core harms nobody
}

// haproxy starts one on the measured core with the given frontend, and returns its base URL.
func haproxy(ctx context.Context, s *site, frontend string) (url string, stop func(), err error) {
	at := prefix + ".9.1:9000"
	config := filepath.Join(s.dir, "haproxy.cfg")
	text := "global\n  nbthread 1\n  maxconn 4096\ndefaults\n  mode http\n  timeout connect 1s\n  timeout client 30s\n  timeout server 30s\nfrontend f\n  bind " + at + "\n" + frontend
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return "", nil, err
	}
	var log strings.Builder
	cmd := exec.CommandContext(ctx, "taskset", "-c", measuredCore, "haproxy", "-db", "-f", config)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	}
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		resp, err := plain.Get("http://" + at + "/")
		if err == nil {
			resp.Body.Close()
			return "http://" + at, stop, nil
		}
		if time.Since(began) > 5*time.Second {
			stop()
			return "", nil, errors.Join(fmt.Errorf("haproxy does not answer: %w", err), errors.New(log.String()))
		}
	}
}
