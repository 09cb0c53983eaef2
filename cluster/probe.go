package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"trivet/health"
	"trivet/identity"
)

// prober asks processes over mTLS, as the sre, whether they are ready.
type prober struct {
	clients map[string]*http.Client // by role of the process
}

func newProber(l Layout) (*prober, error) {
	id, err := identity.Load(l.Files("sre"))
	if err != nil {
		return nil, fmt.Errorf("loading the supervisor's identity: %w", err)
	}
	p := &prober{clients: map[string]*http.Client{}}
	for _, role := range []string{RoleHSMD, RoleCA, RoleOCSP, RoleLB} {
		p.clients[role] = &http.Client{Transport: &http.Transport{
			TLSClientConfig: id.ClientTLS(identity.Role(role)), MaxIdleConnsPerHost: 1, IdleConnTimeout: 10 * time.Second,
		}}
	}
	return p, nil
}

// ready is nil when the part answers /readyz with 200.
func (p *prober) ready(ctx context.Context, part Part) error {
	status, text, err := p.get(ctx, part, "/readyz?verbose")
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("%w: %s", errNotReady, missing(string(text)))
	}
	return nil
}

// serves is nil when the balancer says that it can have everything done that clients and relying parties ask for.
func (p *prober) serves(ctx context.Context, balancer Part) error {
	status, text, err := p.get(ctx, balancer, "/healthz")
	if err != nil {
		return err
	}
	var r health.Report
	if err := json.Unmarshal(text, &r); err != nil || status != http.StatusOK {
		return fmt.Errorf("reading the health report of %s: status %d, %w", balancer.Name, status, err)
	}
	for _, c := range []string{"issue:" + CA, "revoke", "read", "ocsp:" + Issuer, "crl:" + Issuer} {
		if !r.Can(c) {
			return fmt.Errorf("%w: %s cannot do %s: %s", errNotReady, balancer.Name, c, r.Capabilities[c].Cause)
		}
	}
	return nil
}

func (p *prober) get(ctx context.Context, part Part, path string) (status int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+part.HealthAddress()+path, http.NoBody)
	if err != nil {
		return 0, nil, err
	}
	resp, err := p.clients[part.Role].Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, body, err
}

// missing keeps the lines of a verbose readiness report that say what is not there.
func missing(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "[-]") {
			lines = append(lines, line)
		}
	}
	if lines == nil {
		return strings.TrimSpace(text)
	}
	return strings.Join(lines, "; ")
}

// Files names the identity files of a principal of this cluster.
func (l Layout) Files(name string) identity.Files {
	dir := l.Identity(name)
	return identity.Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), Trust: filepath.Join(dir, "trust.pem")}
}
