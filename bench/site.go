package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/goccy/go-yaml"

	"trivet/cluster"
	"trivet/load"
)

// network is the bench cluster's loopback block; prefix its first two octets, for the references' own addresses.
const (
	network = "127.89.0.0/16"
	prefix  = "127.89"
)

// site is a cluster of the bench's own.
type site struct {
	dir     string
	started time.Duration // until the first certificate
}

func up(ctx context.Context) (*site, error) {
	parent, err := os.MkdirTemp("/var/tmp", "trivet-bench-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(parent, 0o755); err != nil { // the database server's user passes through
		return nil, err
	}
	s := &site{dir: filepath.Join(parent, "cluster")}
	began := time.Now()
	if _, err := s.pkictl(ctx, "demo", "up", "--network", network); err != nil {
		return nil, errors.Join(err, s.down())
	}
	issuer, err := s.issuer(ctx, 1)
	if err == nil {
		err = issuer.Op(ctx, 1_000_000_000)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("issuing a first certificate: %w", err), s.down())
	}
	s.started = time.Since(began)
	return s, nil
}

// down leaves nothing behind. It works when the bench was interrupted, too.
func (s *site) down() error {
	_, err := s.pkictl(context.Background(), "demo", "down")
	return errors.Join(err, os.RemoveAll(filepath.Dir(s.dir)))
}

func (s *site) pkictl(ctx context.Context, args ...string) ([]byte, error) {
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, "bin/pkictl", append(args, "--dir", s.dir)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("pkictl %s: %w\n%s%s", strings.Join(args, " "), err, stderr.String(), out)
	}
	return out, nil
}

func (s *site) status(ctx context.Context) (cluster.Status, error) {
	var st cluster.Status
	out, err := s.pkictl(ctx, "demo", "status", "--output", "json")
	if err == nil {
		err = json.Unmarshal(out, &st)
	}
	return st, err
}

func (s *site) process(ctx context.Context, name string) (cluster.Process, error) {
	st, err := s.status(ctx)
	if err != nil {
		return cluster.Process{}, err
	}
	for _, p := range st.Processes {
		if p.Name == name {
			return p, nil
		}
	}
	return cluster.Process{}, fmt.Errorf("no process %s", name)
}

// kill ends a process as a crash would.
func (s *site) kill(name string) error {
	p, err := s.process(context.Background(), name)
	if err != nil {
		return err
	}
	if p.PID <= 1 {
		return fmt.Errorf("%s does not run", name)
	}
	return syscall.Kill(p.PID, syscall.SIGKILL)
}

// unbalance takes a node out of the balancer's list and returns what puts it back. The node runs on.
func (s *site) unbalance(ctx context.Context, name string) (putBack func() error, err error) {
	layout, err := cluster.NewLayout(s.dir, network)
	if err != nil {
		return nil, err
	}
	path := layout.Config("lb1")
	before, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var config map[string]any
	if err := yaml.Unmarshal(before, &config); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	nodes, _ := config["nodes"].([]any)
	isNode := func(n any) bool { m, _ := n.(map[string]any); return m["name"] == name }
	if !slices.ContainsFunc(nodes, isNode) {
		return nil, fmt.Errorf("%s names no node %s", path, name)
	}
	config["nodes"] = slices.DeleteFunc(nodes, isNode)
	without, err := yaml.Marshal(config)
	if err != nil {
		return nil, err
	}
	return func() error { return s.rebalance(ctx, path, before, name, true) }, s.rebalance(ctx, path, without, name, false)
}

// rebalance gives the balancer another configuration and waits until a node is in its table, or is not.
func (s *site) rebalance(ctx context.Context, path string, config []byte, name string, in bool) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := os.WriteFile(path, config, 0o644); err != nil {
		return err
	}
	p, err := s.process(ctx, "lb1")
	if err != nil {
		return err
	}
	if err := syscall.Kill(p.PID, syscall.SIGHUP); err != nil {
		return fmt.Errorf("telling lb1: %w", err)
	}
	issuer, err := s.issuer(ctx, 1)
	if err != nil {
		return err
	}
	for {
		var state struct {
			Nodes []struct {
				Name string `json:"name"`
				In   bool   `json:"in"`
			} `json:"nodes"`
		}
		if err := get(ctx, issuer.Client, "https://"+p.Addresses["status"]+"/lb/state", func(body io.Reader) error { return json.NewDecoder(body).Decode(&state) }); err != nil {
			return err
		}
		now := false
		for _, n := range state.Nodes {
			now = now || n.Name == name && n.In
		}
		if now == in {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s in the balancer's table: %v, and not %v", name, now, in)
		}
	}
}

// get asks for a page and reads it.
func get(ctx context.Context, client *http.Client, url string, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, resp.Status)
	}
	return read(resp.Body)
}

// well waits until every part can do all it should.
func (s *site) well(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		_, err := s.pkictl(ctx, "health")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (s *site) issuer(ctx context.Context, clients int) (*load.Issuer, error) {
	st, err := s.status(ctx)
	if err != nil {
		return nil, err
	}
	cfg, err := tlsOf(st.Credentials.Trust, st.Credentials.Requester.Cert, st.Credentials.Requester.Key)
	if err != nil {
		return nil, err
	}
	return load.NewIssuer(st.Endpoints.API[0], load.NewClient(cfg, clients)), nil
}

// tlsOf is a client's configuration from the files of its identity.
func tlsOf(trustFile, cert, key string) (*tls.Config, error) {
	trust, err := os.ReadFile(trustFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}
	cfg.RootCAs.AppendCertsFromPEM(trust)
	return cfg, nil
}

func readCertificate(file string) (*x509.Certificate, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM", file)
	}
	return x509.ParseCertificate(block.Bytes)
}

var plain = &http.Client{Timeout: 10 * time.Second}
