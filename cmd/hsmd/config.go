package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/goccy/go-yaml"

	"trivet/hsm/pkcs11"
	"trivet/identity"
)

// Config is hsmd's configuration file. An unknown key is an error.
type Config struct {
	// Cluster and Node are who this agent is; they must be what its identity says: trivet://{cluster}/hsmd/{node}.
	// Node is also the member's name in its group.
	Cluster string `yaml:"cluster"`
	Node    string `yaml:"node"`
	// Identity names the PEM files of the agent's own certificate. They are read again when they change, and on SIGHUP.
	Identity identity.Files `yaml:"identity"`
	// Listen is host:port of the mTLS listener.
	Listen string `yaml:"listen"`
	// Module is the path of the PKCS#11 library, Token the label of the token in it.
	Module string `yaml:"module"`
	Token  string `yaml:"token"`
	// Profile says how the library differs from others: generic, softhsm, nss. Empty: found out from the library.
	Profile string `yaml:"profile"`
	// TokenDir is the token's directory, for libraries that are told it (NSS).
	TokenDir string `yaml:"token_dir"`
	// Test admits a library that gives away keys marked as not extractable, as NSS's does: for tests, never for real keys.
	Test bool `yaml:"test"`
	// Activation says who gives the PIN. Default "auto": pin_file does. "manual": a person does, after every start (pkictl
	// hsm activate); until then the agent serves nothing but its health. The PIN stays in this process's memory alone, and
	// the agent ends itself when the token fails, so that every restart, a crash included, needs a person again: have
	// enough members that one may wait for it.
	Activation string `yaml:"activation"`
	// PINFile holds the user PIN, closed to others. A name without a directory is a systemd credential where there are any.
	// With manual activation only init-token reads it, and it need not exist afterwards.
	PINFile string `yaml:"pin_file"`
	// SOPINFile holds the security officer's PIN; only init-token reads it. It need not exist afterwards.
	SOPINFile string `yaml:"so_pin_file"`
	// StateDir holds the audit record (audit/), what the agent must not forget (state.json: destroyed keys, used approvals,
	// site epoch, whom the domain key may go to) and the mark of a refused PIN. It must exist. Keep all of it when the agent
	// moves, and never put back an older copy. Default: the configuration file's directory.
	StateDir string `yaml:"state_dir"`
	// Approvals is how many people (roles admin and ca-operator) must approve what cannot be undone: destroying a key, letting
	// the domain key go to a new member or into a backup, taking in a key, changing the site epoch. Default 2. With 1 a
	// single person can, and every start says so in the log.
	Approvals int `yaml:"approvals"`
	// Sessions is how many module calls may run at once, 1 to 256. Default 16.
	Sessions int `yaml:"sessions"`
	// Queue is how many more requests may wait before callers are turned away. Default 64.
	Queue int `yaml:"queue"`
	// CallTimeout is how long one module call may take before the process ends itself, 100ms to 1m. Default 2s.
	CallTimeout time.Duration `yaml:"call_timeout"`
	// ProbeEvery is the pause between test signatures, 50ms to 2s. Default 1s.
	ProbeEvery time.Duration `yaml:"probe_every"`
}

const (
	activationAuto   = "auto"
	activationManual = "manual"
)

// open is how to open the token; the PIN is still missing.
func (c *Config) open(log *slog.Logger) pkcs11.Config {
	return pkcs11.Config{
		Module: c.Module, TokenLabel: c.Token, Member: c.Node, Profile: c.Profile, Dir: c.TokenDir, Test: c.Test, MaxSessions: c.Sessions + 2, PoolWait: c.CallTimeout, Log: log,
	}
}

// readConfig reads and checks the file; it connects to nothing.
func readConfig(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading configuration: %w", err)
	}
	defer f.Close()
	c := &Config{StateDir: filepath.Dir(path), Activation: activationAuto, Approvals: 2, Sessions: 16, Queue: 64, CallTimeout: 2 * time.Second, ProbeEvery: time.Second}
	if err := yaml.NewDecoder(f, yaml.Strict()).Decode(c); err != nil {
		return nil, fmt.Errorf("reading configuration %s: %w", path, err)
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("checking configuration %s: %w", path, err)
	}
	return c, nil
}

func (c *Config) check() error {
	var errs []error
	for _, f := range []struct{ name, value string }{
		{"cluster", c.Cluster}, {"node", c.Node}, {"identity.cert", c.Identity.Cert}, {"identity.key", c.Identity.Key},
		{"identity.trust", c.Identity.Trust}, {"module", c.Module}, {"token", c.Token}, {"state_dir", c.StateDir},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("%s is missing", f.name))
		}
	}
	switch c.Activation {
	case activationAuto:
		if c.PINFile == "" {
			errs = append(errs, errors.New("pin_file is missing"))
		}
	case activationManual:
	default:
		errs = append(errs, fmt.Errorf("activation is %q: must be auto or manual", c.Activation))
	}
	if c.Approvals < 1 || c.Approvals > identity.MaxApprovals {
		errs = append(errs, fmt.Errorf("approvals is %d: must be 1 to %d", c.Approvals, identity.MaxApprovals))
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		errs = append(errs, fmt.Errorf("listen: %w", err))
	}
	if c.Sessions < 1 || c.Sessions > 256 {
		errs = append(errs, fmt.Errorf("sessions is %d: must be 1 to 256", c.Sessions))
	}
	if c.Queue < 1 || c.Queue > 10000 {
		errs = append(errs, fmt.Errorf("queue is %d: must be 1 to 10000", c.Queue))
	}
	if c.CallTimeout < 100*time.Millisecond || c.CallTimeout > time.Minute {
		errs = append(errs, fmt.Errorf("call_timeout is %s: must be 100ms to 1m", c.CallTimeout))
	}
	if c.ProbeEvery < 50*time.Millisecond || c.ProbeEvery > 2*time.Second {
		errs = append(errs, fmt.Errorf("probe_every is %s: must be 50ms to 2s, below the age at which a probe is stale", c.ProbeEvery))
	}
	return errors.Join(errs...)
}
