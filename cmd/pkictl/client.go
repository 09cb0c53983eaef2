package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"trivet/cluster"
	"trivet/identity"
	"trivet/problem"
)

// clientConfig is what --config names: an installation, and who asks.
type clientConfig struct {
	// API is the base URL of the balancer's API.
	API string `yaml:"api"`
	// Public is the base URL for OCSP, CRLs and issuer certificates.
	Public string `yaml:"public"`
	// Admin lists the CA nodes' administrative listeners.
	Admin []string `yaml:"admin"`
	// Processes lists further mTLS listeners that answer /healthz, of balancers, responders and HSM agents, for `pkictl health`.
	Processes []struct {
		Name    string `yaml:"name"`
		Role    string `yaml:"role"`    // lb, ocsp, hsmd
		Address string `yaml:"address"` // host:port
	} `yaml:"processes"`
	// Trust is the PEM file of the infrastructure CA, Cert and Key those of the one who asks.
	Trust string `yaml:"trust"`
	Cert  string `yaml:"cert"`
	Key   string `yaml:"key"`
}

// client speaks to one installation as one principal.
type client struct {
	clientConfig
	id   *identity.Identity
	http *http.Client
	demo *cluster.Cluster // nil with --config
}

// demoPeople are the people of a demo.
var demoPeople = []string{"requester", "ra", "operator1", "operator2", "admin1", "admin2", "auditor", "sre"}

// clientFlags gives a command, and those below it, what newClient reads.
func (a *app) clientFlags(c *cobra.Command) *cobra.Command {
	f := c.PersistentFlags()
	f.StringVar(&a.config, "config", "", "client configuration; without it the running demo is used")
	f.StringVar(&a.as, "as", "", "who asks, in a demo: "+strings.Join(demoPeople, ", "))
	_ = c.RegisterFlagCompletionFunc("as", cobra.FixedCompletions(demoPeople, cobra.ShellCompDirectiveNoFileComp))
	c.MarkFlagsMutuallyExclusive("config", "as")
	return c
}

// newClient finds the installation: --config, or a demo, where as is the identity unless --as names another.
func (a *app) newClient(as string) (*client, error) {
	c := &client{}
	files := identity.Files{}
	if a.config != "" {
		text, err := os.ReadFile(a.config)
		if err != nil {
			return nil, fmt.Errorf("reading the client configuration: %w", err)
		}
		if err := yaml.UnmarshalWithOptions(text, &c.clientConfig, yaml.Strict()); err != nil {
			return nil, fmt.Errorf("reading the client configuration %s: %w", a.config, err)
		}
		if c.API == "" || c.Trust == "" || c.Cert == "" || c.Key == "" {
			return nil, fmt.Errorf("client configuration %s: api, trust, cert and key are needed", a.config)
		}
		files = identity.Files{Cert: c.Cert, Key: c.Key, Trust: c.Trust}
	} else {
		if a.as != "" {
			as = a.as
		}
		if !slices.Contains(demoPeople, as) {
			return nil, usagef("--as %s: there are %s", as, strings.Join(demoPeople, ", "))
		}
		demo, err := a.demo()
		if err != nil {
			return nil, err
		}
		st, err := demo.Status()
		if err != nil {
			return nil, err
		}
		if st.State == cluster.Stopped {
			return nil, fmt.Errorf("the demo in %s is stopped: start it with `pkictl demo up`", st.Dir)
		}
		files = demo.Layout().Files(as)
		c.demo = demo
		c.clientConfig = clientConfig{API: st.Endpoints.API[0], Public: st.Endpoints.Public[0], Admin: st.Endpoints.Admin, Trust: files.Trust, Cert: files.Cert, Key: files.Key}
	}
	var err error
	if c.id, err = identity.Load(files); err != nil {
		return nil, fmt.Errorf("loading the identity of the one who asks: %w", err)
	}
	c.http = &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig: c.id.ClientTLS(identity.RoleLB, identity.RoleCA),
			Proxy:           http.ProxyFromEnvironment,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// answer is a success of the API.
type answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// call makes one request of the API. An error of the API is a *problem.Problem.
func (c *client) call(ctx context.Context, method, path string, header http.Header, body any) (answer, error) {
	var payload []byte
	if body != nil {
		var err error
		if payload, err = json.Marshal(body); err != nil {
			return answer{}, fmt.Errorf("encoding the request: %w", err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.API, "/")+path, bytes.NewReader(payload))
	if err != nil {
		return answer{}, fmt.Errorf("making the request: %w", err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("Accept", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return answer{}, fmt.Errorf("asking the API: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return answer{}, fmt.Errorf("reading the API's answer: %w", err)
	}
	if resp.StatusCode/100 == 2 {
		return answer{Status: resp.StatusCode, Header: resp.Header, Body: text}, nil
	}
	p := &problem.Problem{}
	if json.Unmarshal(text, p) != nil || p.Type == "" {
		p = problem.New(resp.StatusCode, "unexpected-answer", strings.TrimSpace(string(text)))
	}
	p.Status = resp.StatusCode
	if p.RequestID == "" {
		p.RequestID = resp.Header.Get("X-Request-Id")
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		p.RetryAfter = s
	}
	return answer{}, p
}

// insist makes a request that may be repeated, and repeats it for as long as wait says while the installation cannot serve it, or cannot be reached: with 0
// it asks once. Whatever the earlier tries did, the answer is the same: the request carries an idempotency key, or changes nothing.
func (a *app) insist(ctx context.Context, wait time.Duration, c *client, method, path string, header http.Header, body any) (answer, error) {
	until := time.Now().Add(wait)
	for said := ""; ; {
		ans, err := c.call(ctx, method, path, header, body)
		if err == nil {
			return ans, nil
		}
		pause := time.Second
		var p *problem.Problem
		if errors.As(err, &p) {
			if p.Status != http.StatusServiceUnavailable && p.Status != http.StatusTooManyRequests && p.Status != http.StatusBadGateway {
				return answer{}, err
			}
			if p.RetryAfter > 0 {
				pause = time.Duration(p.RetryAfter) * time.Second
			}
		}
		if time.Until(until) < pause {
			return answer{}, err
		}
		if said != err.Error() {
			said = err.Error()
			a.sayf("not served (%s); asking again", said)
		}
		select {
		case <-ctx.Done():
			return answer{}, err
		case <-time.After(pause):
		}
	}
}

// get decodes the answer to a GET.
func get[T any](ctx context.Context, c *client, path string) (v T, err error) {
	ans, err := c.call(ctx, http.MethodGet, path, nil, nil)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(ans.Body, &v); err != nil {
		return v, fmt.Errorf("reading the API's answer: %w", err)
	}
	return v, nil
}

// newKey is an idempotency key that nobody else will choose.
func newKey() string { return strings.ToLower(rand.Text()) }

// readFile reads a file, or standard input for "-".
func (a *app) readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(a.in, 1<<20))
	}
	return readBounded(name, 1<<20)
}

// readBounded reads a file of at most limit octets: a wrong name, such as that of a device, must not take the machine's memory.
func readBounded(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s has more than %d octets: it is another file", name, limit)
	}
	return text, err
}

// writeFile writes a result, all of it or nothing.
func writeFile(name string, data []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	defer os.Remove(f.Name()) // gone after the rename
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	return nil
}
