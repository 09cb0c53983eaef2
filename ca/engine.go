// Package ca issues certificates: profiles, the issuing pipeline, revocation and CRLs.
//
// An Engine is one CA node. Whatever it signs is journalled and in the database before the signature is asked for (I1), and whatever it
// releases was read back from another database node and journalled again: only the bytes of the unique outcome row leave it (I2).
package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trivet/ca/weakkey"
	"trivet/db"
	"trivet/journal"
)

// Signer signs with one key wherever copies of it live. It is safe for concurrent use.
type Signer interface {
	crypto.Signer
	// SignBatch signs every digest, or none: signatures are in the order of digests. A signature made but not returned is harmless,
	// so an implementation may try several copies of the key. It returns by the context's deadline.
	SignBatch(ctx context.Context, digests [][]byte) (signatures [][]byte, err error)
}

// KeyName names a key everywhere, as the generation's row does: a key group, and the key's id in it. An id alone says too little: a group
// may hold keys that were restored from another's backup.
type KeyName struct{ Group, ID string }

// String is group/id.
func (k KeyName) String() string { return k.Group + "/" + k.ID }

// LogValue is String, for logs.
func (k KeyName) LogValue() slog.Value { return slog.StringValue(k.String()) }

// KeySource finds keys by name. It returns only keys that may be used now; its error says why another may not. It must not block for longer
// than a local look-up.
type KeySource interface {
	Key(ctx context.Context, name KeyName) (Signer, error)
}

// Config is what an Engine needs. Fields without a default are mandatory.
type Config struct {
	Node     string           // this node's name
	Store    *db.Store        //
	Journal  *journal.Journal // open, and owned by this node alone; mandatory, since no record means no signature (I10)
	Lane     *db.Lane         // this incarnation's change-log lane
	Keys     KeySource        //
	MACKeys  *db.MACKeys      // shared by all CA nodes: what another wrote is signed only if one of these keys authenticates it
	Profiles *Profiles        //
	WeakKeys *weakkey.List    // subject keys that are known to be weak; may be nil
	Epoch    uint64           // site epoch read at start; never refreshed
	Rounds   *Rounds          // nil: this process takes no part in recovery rounds, as before there are any CA nodes
	BaseURL  string           // http://host[:port] for AIA, CDP and OCSP addresses, without a trailing slash

	MaxBatch int           // most certificates in one batch; default 64
	Collect  time.Duration // wait of a job for company while another batch is under way, longer where batches are slow; default 50ms
	Linger   time.Duration // wait of those who waited for a batch for those whom it has answered, longer where batches are slow; default 10ms
	InFlight int           // batches under way at once; default 2: more make smaller batches, and all of them meet at the lane

	Places      int // requests worked on at once; default 256
	Waiting     int // most requests that wait for a place; default 1024
	WaitingEach int // most requests of one caller that wait for a place; default 256

	SignTimeout  time.Duration // for one SignBatch; default 2s
	BatchTimeout time.Duration // for all database work of one batch; default 10s
	OwnerWait    time.Duration // how long another node's open intent is left to it when a repeat arrives; default 250ms
	SweepEvery   time.Duration // how often open intents are looked for; default 2s
	SweepAge     time.Duration // how old an open intent must be to be finished by the sweeper; default 10s
	RefreshEvery time.Duration // how often authorities are re-read; default 2s
	ClockEvery   time.Duration // how often clocks are compared; default 1s
	KeepTBS      time.Duration // how long the TBSCertificates of a day are kept after it; at least a day, default 14 days
	KeepTBSEvery time.Duration // how often those that may go are looked for; default 1h

	Clocks PeerClocks // whose clocks this node's must agree with to within a second, or it signs nothing; nil: it is believed

	Now     func() time.Time      // default time.Now
	Rand    io.Reader             // default crypto/rand.Reader
	Log     *slog.Logger          // default slog.Default
	Metrics prometheus.Registerer // nil: none
}

func (c *Config) setDefaults() error {
	var missing []error
	need := func(ok bool, name string) {
		if !ok {
			missing = append(missing, fmt.Errorf("ca: Config.%s is missing", name))
		}
	}
	need(c.Node != "", "Node")
	need(c.Store != nil, "Store")
	need(c.Journal != nil, "Journal")
	need(c.Lane != nil, "Lane")
	need(c.Keys != nil, "Keys")
	need(c.MACKeys != nil, "MACKeys")
	need(c.Profiles != nil, "Profiles")
	need(c.BaseURL != "", "BaseURL")
	if missing != nil {
		return errors.Join(missing...)
	}
	setDefault(&c.MaxBatch, 64)
	setDefault(&c.Collect, 50*time.Millisecond)
	setDefault(&c.Linger, 10*time.Millisecond)
	setDefault(&c.InFlight, 2)
	setDefault(&c.Places, 256)
	setDefault(&c.Waiting, 1024)
	setDefault(&c.WaitingEach, 256)
	setDefault(&c.SignTimeout, 2*time.Second)
	setDefault(&c.BatchTimeout, 10*time.Second)
	setDefault(&c.OwnerWait, 250*time.Millisecond)
	setDefault(&c.SweepEvery, 2*time.Second)
	setDefault(&c.SweepAge, 10*time.Second)
	setDefault(&c.RefreshEvery, 2*time.Second)
	setDefault(&c.ClockEvery, time.Second)
	setDefault(&c.KeepTBS, 14*24*time.Hour)
	setDefault(&c.KeepTBSEvery, time.Hour)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Rand == nil {
		c.Rand = rand.Reader
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return nil
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Request asks for one end-entity certificate.
type Request struct {
	Principal      string // URI of the identity that asks; scopes the key below
	IdempotencyKey string // 1 to 255 octets; repeats with the same key get the same certificate
	Profile        string // profile name
	CA             string // CA id; may be empty if the profile has a single CA
	CSR            []byte // PKCS #10, PEM or DER, at most 32 KiB
	Subject        Subject
	SANs           []SAN
	NotAfter       *time.Time // default: the profile's lifetime
	Reference      string     // the caller's own mark, at most 255 octets
}

// Subject is the subject that a request asks for beside its CSR.
type Subject struct{ CommonName string }

// SAN is one subject alternative name that a request asks for beside its CSR.
type SAN struct{ Type, Value string }

// Draft asks for a certificate whose contents the caller has built: of a CA or of an OCSP responder. The engine sets the serial.
type Draft struct {
	Issuer    string            // generation that signs
	SelfKey   KeyName           // for a self-signed root whose generation is not known yet; else empty
	Template  *x509.Certificate // subject, validity, extensions
	PublicKey crypto.PublicKey  // of the certificate; for a root that of SelfKey

	Req, Body      [32]byte // request key, and hash of what it asks for: repeats with the same Req get the same certificate
	Profile        string   // name recorded, such as "root-ca"; not one of the engine's profiles
	ProfileVersion int
	ProfileHash    [32]byte
	Requester      string // principal URI
	Reference      string
}

// Issued is a certificate that may be shown: it was read back from the database and journalled.
type Issued struct {
	Issuer         string
	Serial         []byte // 20 octets
	DER            []byte
	Replayed       bool // an earlier request with the same key began it
	Profile        string
	ProfileVersion int
	Requester      string
	Reference      string
	Lane           string // where the change feed announces it
	Seq            uint64
}

// ID returns "{issuer}:{serial in lower-case hex}".
func (i *Issued) ID() string { return i.Issuer + ":" + hex.EncodeToString(i.Serial) }

// Engine is one CA node. Its methods are safe for concurrent use.
type Engine struct {
	cfg    Config
	record record        // cfg.Store; tests put faults in between
	lane   lane          // cfg.Lane; the same
	log    journalWriter // cfg.Journal; the same

	linter      *linter
	metrics     *metrics
	clock       *clockGuard
	authorities atomic.Pointer[Authorities]

	admission *admission // of requests, before anything is done for them

	queue   chan *job      // from callers to the collector; unbuffered, so that nothing is left in it at the end
	stopped chan struct{}  // closed when the collector takes nothing more
	tasks   sync.WaitGroup // adoptions, and jobs on their way back to the queue
	dead    chan error     // holds the first reason why this incarnation must end

	mu       sync.Mutex
	inflight map[[32]byte]*job // by request key, from the first request until the outcome is known
	unready  error             // why nothing is admitted: starting or stopping; nil while running
	halted   string            // the operators' reason; "" if not halted
}

// record is what the engine asks of the database, in the contract of *db.Store.
type record interface {
	InsertIntents(ctx context.Context, intents []db.Intent) (rows []db.Intent, node string, err error)
	ReadBack(ctx context.Context, except string, reqs [][]byte) (rows []db.Issued, node string, err error)
	Certificate(ctx context.Context, issuer string, serial []byte) (*db.Certificate, error)
	CertificateElsewhere(ctx context.Context, except, issuer string, serial []byte) (c *db.Certificate, node string, err error)
	OpenIntents(ctx context.Context, olderThan time.Duration, limit int) ([]db.Intent, error)
	KeepTBS(ctx context.Context, k db.TBSKeeping) (db.TBSState, error)
	Blocked(ctx context.Context, except string, spkis ...[]byte) ([]db.BlockedKey, error)
	Generations(ctx context.Context) ([]db.Generation, error)
	Ready() error
}

// lane is where the engine appends facts, in the contract of *db.Lane.
type lane interface {
	Append(ctx context.Context, facts []db.Fact) ([]db.Appended, error)
}

// journalWriter is what the engine writes to, in the contract of *journal.Journal: an error other than ErrFull is final.
type journalWriter interface {
	Append(records ...journal.Record) error
	Failed() <-chan struct{}
}

// New makes an engine; it connects to nothing and admits nothing before Run.
func New(cfg Config) (*Engine, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	admission := newAdmission(cfg.Places, cfg.Waiting, cfg.WaitingEach)
	m, err := newMetrics(cfg.Metrics, admission)
	if err != nil {
		return nil, err
	}
	e := &Engine{
		cfg: cfg, record: cfg.Store, lane: cfg.Rounds.lane(cfg.Lane), log: cfg.Journal,
		linter: newLinter(), metrics: m, clock: newClockGuard(cfg.Clocks, cfg.Now, m.clock), admission: admission,
		queue: make(chan *job), stopped: make(chan struct{}), dead: make(chan error, 1),
		inflight: make(map[[32]byte]*job), unready: errStarting,
	}
	e.authorities.Store(&Authorities{})
	if r := cfg.Rounds; r != nil {
		r.settle = e.settleOpen
	}
	return e, nil
}

// Run settles what an earlier incarnation of this node left, and then issues until ctx ends, or until the journal or the lane fails. It is called
// once. When it returns, everything that was under way has ended. After an error the process must end.
func (e *Engine) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := e.recover(ctx); err != nil {
		close(e.stopped)
		if ctx.Err() != nil {
			return nil
		}
		return err
	}

	var wg sync.WaitGroup
	wg.Go(func() { e.refreshLoop(ctx) })
	wg.Go(func() { e.sweepLoop(ctx) })
	wg.Go(func() { e.keepTBSLoop(ctx) })
	e.clock.measure(ctx) // before anything is admitted
	wg.Go(func() { e.clockLoop(ctx) })
	collected := make(chan struct{})
	go func() {
		defer close(collected)
		e.collect(ctx)
	}()
	e.setUnready(nil)

	var err error
	select {
	case <-ctx.Done():
	case <-e.log.Failed():
		err = errors.New("ca: the journal has failed: nothing can be recorded, so nothing may be signed")
	case err = <-e.dead:
	}
	// Stop admitting first, then taking from the queue, and wait for the batches last: nobody is left without an answer.
	e.setUnready(errStopped)
	close(e.stopped)
	cancel()
	<-collected
	wg.Wait()
	e.tasks.Wait()
	return err
}

// die makes Run return err: this incarnation cannot go on.
func (e *Engine) die(err error) {
	select {
	case e.dead <- err:
	default: // it is dying already
	}
}

func (e *Engine) setUnready(why error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unready = why
}

// refreshLoop keeps the snapshot of authorities young until ctx ends.
func (e *Engine) refreshLoop(ctx context.Context) {
	tick := time.NewTicker(e.cfg.RefreshEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := e.refreshOnce(ctx); err != nil && ctx.Err() == nil {
			e.cfg.Log.Warn("refreshing CA generations: the last known ones stay", "err", err)
		}
	}
}

func (e *Engine) refreshOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.BatchTimeout)
	defer cancel()
	return e.Refresh(ctx)
}

// Halt stops issuing on this node until Resume; what is under way is finished. The reason is shown to clients.
func (e *Engine) Halt(reason string) {
	if reason == "" {
		reason = "by the operators"
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.halted = reason
}

// Resume undoes Halt.
func (e *Engine) Resume() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.halted = ""
}

// Halted returns the reason given to Halt, or "".
func (e *Engine) Halted() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.halted
}

// Health returns for each capability, such as "issue:demo", why this node has it not, or nil if it has. Every CA that has issued or may issue
// end-entity certificates is listed. It is made from what is known already and asks nobody.
func (e *Engine) Health(ctx context.Context) map[string]error {
	node := e.admit()
	select {
	case <-e.log.Failed():
		node = errors.New("the journal has failed")
	default:
	}
	if node == nil {
		node = e.record.Ready()
	}
	now := e.cfg.Now()
	snapshot := e.Authorities()
	health := make(map[string]error)
	for _, a := range snapshot.all {
		name := "issue:" + a.CA
		if _, done := health[name]; done || !e.issues(a) {
			continue
		}
		health[name] = node
		if node != nil {
			continue
		}
		current, err := snapshot.Issuing(a.CA, now)
		if err == nil {
			_, err = e.cfg.Keys.Key(ctx, current.Key())
		}
		health[name] = err
	}
	return health
}

// issues tells whether some profile lets the authority issue.
func (e *Engine) issues(a *Authority) bool {
	for _, p := range e.cfg.Profiles.All() {
		if p.mayUse(a.CA) && (a.Parent != a.Issuer || len(p.CAs) > 0) {
			return true
		}
	}
	return false
}
