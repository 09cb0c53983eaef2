package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"time"

	"github.com/goccy/go-yaml"

	"trivet/ca/weakkey"
	"trivet/db"
	"trivet/holder"
	"trivet/identity"
)

// config is the file given by --config. Unknown keys are refused with line and column.
type config struct {
	Cluster  string         `yaml:"cluster"`  // name of the cluster, as in every identity of it
	Node     string         `yaml:"node"`     // name of this node; that of its identity
	Identity identity.Files `yaml:"identity"` // PEM files; re-read when they change and on SIGHUP

	Listen struct {
		API   string `yaml:"api"`   // host:port, mTLS: /v1, behind the balancer or direct
		Admin string `yaml:"admin"` // host:port, mTLS of persons alone, never through the balancer
	} `yaml:"listen"`

	StateDir string `yaml:"state_dir"` // directory of the journal; must exist, belongs to this node alone
	Site     string `yaml:"site"`      // name of this site; must be the writing one
	BaseURL  string `yaml:"base_url"`  // http://host[:port] of CRLs, OCSP and issuer certificates, without a trailing slash; goes into certificates
	Profiles string `yaml:"profiles"`  // directory of *.yaml profiles; empty: those that come with the program

	MACKeyFile string   `yaml:"mac_key_file"` // keys, mode 0600, that all CA nodes share: what another wrote into the database is signed only if it holds
	WeakKeys   []string `yaml:"weak_keys"`    // files of keys whose private half is known, such as Debian's; see docs/concepts/checks.md

	Database struct {
		Nodes        []string `yaml:"nodes"`         // host:port, in order of preference
		Name         string   `yaml:"name"`          // default trivet
		User         string   `yaml:"user"`          //
		PasswordFile string   `yaml:"password_file"` // re-read at every connection
		TLS          bool     `yaml:"tls"`           // with this node's identity; servers must have role db
		// KeepTBS is how long the database keeps the TBSCertificates of a day's intents, 24h or more; default 336h. One whose intent has no outcome stays longer.
		KeepTBS time.Duration `yaml:"keep_tbs"`
	} `yaml:"database"`

	Journal journalConfig `yaml:"journal"` // how the journal in state_dir is kept
	// Peers are the other CA nodes: name, and address (host:port) of listen.api. The first that answers keeps a copy of everything that this
	// node releases, and a recovery round waits for all of them.
	Peers []holder.Peer `yaml:"peers"`
	// HeldKeep is how long copies of what other CA nodes released are kept at least, below state_dir in held; default 2160h, 90 days. It must be
	// above the age of the oldest backup that the database may be put back to. They go when the record has all of it.
	HeldKeep time.Duration `yaml:"held_keep"`
	// RequireCopy has nothing released that no peer holds a copy of, however well the database is. Only then can a recovery round that has lost
	// commits end by itself while this node is away. With one peer it makes issuing depend on that peer. Default false.
	RequireCopy bool `yaml:"require_copy"`
	// AllowSingleCopy lets this node release when one database node is left and no peer answers: what that node then loses is gone. Default false.
	AllowSingleCopy bool `yaml:"allow_single_copy"`
	// AcknowledgeJournal names incarnations of this node, in hex, that the database knows and the journal does not: the journal is an older copy,
	// or new. Without them the node does not start. See docs/runbooks/database-lost-commits.md.
	AcknowledgeJournal []string `yaml:"acknowledge_journal"`

	Sync *syncConfig `yaml:"sync"` // absent: the HSM groups' keys are kept in step elsewhere
}

// journalConfig is how the journal is kept. Everything has a default; without an archive every segment stays in state_dir for ever.
type journalConfig struct {
	SegmentBytes int64         `yaml:"segment_bytes"` // after which a segment ends, 1 MiB to 1 GiB; default 64 MiB
	SegmentAge   time.Duration `yaml:"segment_age"`   // after which it ends anyway, 1m or more; default 24h
	ReserveBytes int64         `yaml:"reserve_bytes"` // of the disk, held back for finishing what was begun, 4 MiB or more; default 16 MiB
	Plain        bool          `yaml:"plain"`         // sealed segments are not compressed
	Archive      struct {
		Dir     string        `yaml:"dir"`     // an existing directory of this node's own, such as a mounted share
		Command []string      `yaml:"command"` // or a program that stores and verifies: docs/concepts/journal.md
		Timeout time.Duration `yaml:"timeout"` // for one run of the command; default 10m
		Keep    time.Duration `yaml:"keep"`    // how long a segment stays in state_dir too; default: for ever
	} `yaml:"archive"`
}

// syncConfig is who keeps the keys of every HSM group in step: one node at a time for each group, whichever holds the lease. It is not the node itself, which may
// sign: this identity may move keys and use none.
type syncConfig struct {
	Identity     identity.Files `yaml:"identity"`      // PEM files of role sync; re-read when they change
	User         string         `yaml:"user"`          // database account of role sync, in the database of this node
	PasswordFile string         `yaml:"password_file"` // re-read at every connection
	Every        time.Duration  `yaml:"every"`         // pause between two rounds, 1s to 1h; default 10s
}

var (
	nodeForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	errNoDir = errors.New("it is no directory; create it, or correct the path: a journal is never begun by mistake")
)

// readConfig reads and checks the file; it connects to nothing.
func readConfig(path string) (*config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", err)
	}
	c := new(config)
	if err := yaml.NewDecoder(bytes.NewReader(text), yaml.Strict()).Decode(c); err != nil {
		return nil, fmt.Errorf("reading the configuration %s: %w", path, err)
	}
	if c.Sync != nil && c.Sync.Every == 0 {
		c.Sync.Every = 10 * time.Second
	}
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("checking the configuration %s: %w", path, err)
	}
	return c, nil
}

func (c *config) validate() error {
	var bad []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			bad = append(bad, fmt.Errorf(format, args...))
		}
	}
	check(c.Cluster != "", "cluster is missing")
	check(nodeForm.MatchString(c.Node), "node %q: want lower-case letters, digits, '.', '_' and '-'", c.Node)
	check(c.Identity.Cert != "" && c.Identity.Key != "" && c.Identity.Trust != "", "identity: cert, key and trust are all needed")
	address := func(name, value string) {
		_, _, err := net.SplitHostPort(value)
		check(err == nil, "%s %q: want host:port", name, value)
	}
	address("listen.api", c.Listen.API)
	address("listen.admin", c.Listen.Admin)
	check(c.Listen.API != c.Listen.Admin, "listen: api and admin must differ")
	check(c.Site != "", "site is missing")
	check(c.StateDir != "", "state_dir is missing")
	check(c.MACKeyFile != "", "mac_key_file is missing: pkictl init makes it, and every CA node needs a copy")
	base, err := url.Parse(c.BaseURL)
	check(err == nil && base.Scheme == "http" && base.Host != "" && base.Path == "" && base.RawQuery == "" && base.User == nil,
		"base_url %q: want http://host[:port] without a path", c.BaseURL)
	check(len(c.BaseURL) <= 60, "base_url is %d octets long: 60 are the most that leave room for an OCSP request by GET", len(c.BaseURL))
	check(len(c.Database.Nodes) > 0, "database.nodes is missing")
	for i, node := range c.Database.Nodes {
		address(fmt.Sprintf("database.nodes[%d]", i), node)
	}
	check(c.Database.User != "", "database.user is missing")
	check(c.Database.PasswordFile != "", "database.password_file is missing")
	check(c.Database.KeepTBS == 0 || c.Database.KeepTBS >= 24*time.Hour, "database.keep_tbs %s: want 24h or more", c.Database.KeepTBS)
	j := c.Journal
	check(j.SegmentBytes == 0 || j.SegmentBytes >= 1<<20 && j.SegmentBytes <= 1<<30, "journal.segment_bytes %d: want 1 MiB to 1 GiB", j.SegmentBytes)
	check(j.SegmentAge == 0 || j.SegmentAge >= time.Minute, "journal.segment_age %s: want 1m or more", j.SegmentAge)
	check(j.ReserveBytes == 0 || j.ReserveBytes >= 4<<20, "journal.reserve_bytes %d: want 4 MiB or more", j.ReserveBytes)
	check(j.Archive.Dir == "" || len(j.Archive.Command) == 0, "journal.archive: give dir or command, not both")
	check(j.Archive.Keep >= 0 && (j.Archive.Keep == 0 || j.Archive.Dir != "" || len(j.Archive.Command) > 0), "journal.archive.keep: segments are removed only if they are archived")
	for i, p := range c.Peers {
		check(nodeForm.MatchString(p.Name) && p.Name != c.Node, "peers[%d].name %q: want the name of another CA node", i, p.Name)
		address(fmt.Sprintf("peers[%d].address", i), p.Address)
	}
	check(c.HeldKeep == 0 || c.HeldKeep >= 24*time.Hour, "held_keep %s: want 24h or more", c.HeldKeep)
	check(!c.RequireCopy || len(c.Peers) > 0 && !c.AllowSingleCopy, "require_copy: it needs peers, and excludes allow_single_copy")
	for i, s := range c.AcknowledgeJournal {
		raw, err := hex.DecodeString(s)
		check(err == nil && len(raw) == 16, "acknowledge_journal[%d] %q: want an incarnation, 32 hexadecimal digits", i, s)
	}
	if s := c.Sync; s != nil {
		check(s.Identity.Cert != "" && s.Identity.Key != "" && s.Identity.Trust != "", "sync.identity: cert, key and trust are all needed")
		check(s.User != "", "sync.user is missing")
		check(s.PasswordFile != "", "sync.password_file is missing")
		check(s.Every >= time.Second && s.Every <= time.Hour, "sync.every %s: want 1s to 1h", s.Every)
	}
	return errors.Join(bad...)
}

// checkFiles looks at what the configuration points to, still without a connection.
func (c *config) checkFiles() error {
	if info, err := os.Stat(c.StateDir); err != nil {
		return fmt.Errorf("state_dir: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("state_dir %s: %w", c.StateDir, errNoDir)
	}
	if dir := c.Journal.Archive.Dir; dir != "" {
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return fmt.Errorf("journal.archive.dir %s: it is no directory; mount or create it: %w", dir, errors.Join(err, errNoDir))
		}
	}
	if _, err := os.Stat(c.Database.PasswordFile); err != nil {
		return fmt.Errorf("database.password_file: %w", err)
	}
	if _, err := db.LoadMACKeys(c.MACKeyFile); err != nil {
		return fmt.Errorf("mac_key_file: %w", err)
	}
	if _, err := weakkey.LoadList(c.WeakKeys...); err != nil {
		return fmt.Errorf("weak_keys: %w", err)
	}
	if c.Sync != nil {
		if _, err := os.Stat(c.Sync.PasswordFile); err != nil {
			return fmt.Errorf("sync.password_file: %w", err)
		}
	}
	return nil
}
