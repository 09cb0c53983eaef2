package hsmsync_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsmsync"
	"trivet/identity"
)

// softhsm is the PKCS#11 module of the real members.
const softhsm = "/usr/lib/softhsm/libsofthsm2.so"

// build makes hsmd once for all tests.
var build = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(people.dir, "hsmd")
	out, err := exec.Command("go", "build", "-o", bin, "trivet/cmd/hsmd").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("building hsmd: %w\n%s", err, out)
	}
	return bin, err
})

// real is a member that is an hsmd process with a SoftHSM token of its own.
type real struct {
	hsmsync.Member
	dir, bin string
	cmd      *exec.Cmd
	log      *os.File
	client   *agent.Client // with the sync role
}

// newReal makes the i-th member with an empty token and launches it.
func newReal(t *testing.T, name string, i int) *real {
	t.Helper()
	if testing.Short() {
		t.Skip("needs an HSM")
	}
	for _, need := range []string{softhsm, "/usr/bin/softhsm2-util"} {
		if _, err := os.Stat(need); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%v: install softhsm2", err)
			}
			t.Skipf("%v: install softhsm2", err)
		}
	}
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	ip := fmt.Sprintf("127.91.100.%d", i)
	free, err := net.Listen("tcp", ip+":0")
	if err != nil {
		t.Fatal(err)
	}
	r := &real{Member: hsmsync.Member{Name: name, Address: free.Addr().String()}, bin: bin}
	_ = free.Close()
	r.client = agent.NewClient(name, r.Address, as(t, identity.RoleSync))
	t.Cleanup(func() { r.client.Close(); r.kill() })
	r.initialise(t)
	r.launch(t)
	return r
}

// initialise gives the member a new, empty token.
func (r *real) initialise(t *testing.T) {
	t.Helper()
	people.Lock()
	id := certify(t, identity.Principal{Cluster: "test", Role: identity.RoleHSMD, Name: r.Name})
	people.Unlock()
	r.dir = t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(r.dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if err := os.Mkdir(filepath.Join(r.dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	write("softhsm2.conf", "directories.tokendir = "+filepath.Join(r.dir, "tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n")
	write("hsmd.yaml", fmt.Sprintf(`cluster: test
node: %s
identity: {cert: %s, key: %s, trust: %s}
listen: %s
module: %s
token: %s
pin_file: %s
so_pin_file: %s
`, r.Name, id.Cert, id.Key, id.Trust, r.Address, softhsm, r.Name, write("pin", "4711-"+r.Name), write("so-pin", "0815-"+r.Name)))
	cmd := r.command("init-token", "--config", filepath.Join(r.dir, "hsmd.yaml"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("initialising %s: %v\n%s", r.Name, err, out)
	}
}

func (r *real) command(args ...string) *exec.Cmd {
	cmd := exec.Command(r.bin, args...)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(r.dir, "softhsm2.conf"))
	// It must not outlive the tests, even those ended by force.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// start runs hsmd and waits until it is well.
func (r *real) start(t *testing.T) {
	t.Helper()
	r.launch(t)
	r.wait(t)
}

func (r *real) launch(t *testing.T) {
	t.Helper()
	var err error
	if r.log, err = os.OpenFile(filepath.Join(r.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		t.Fatal(err)
	}
	r.cmd = r.command("--config", filepath.Join(r.dir, "hsmd.yaml"))
	r.cmd.Stderr, r.cmd.Stdout = r.log, r.log
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (r *real) wait(t *testing.T) {
	t.Helper()
	eventually(t, r.Name+" is well", func() (string, bool) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		info, err := r.client.Health(ctx)
		if err != nil || !info.Probe.OK {
			log, _ := os.ReadFile(filepath.Join(r.dir, "log"))
			return fmt.Sprintf("%+v %v\n%s", info, err, log), false
		}
		return "", true
	})
}

func (r *real) kill() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Kill()
	_ = r.cmd.Wait()
	_ = r.log.Close()
	r.cmd = nil
}

func (r *real) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition that says what is the case while it does not hold.
func eventually(t *testing.T, what string, condition func() (string, bool)) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		is, ok := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s; it is %s", what, is)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// newReals makes three members in one domain with one live key, and a CA node's running group over them.
func newReals(t *testing.T) ([]*real, *hsmsync.Group, *hsmsync.Key) {
	t.Helper()
	var members []*real
	cfg := hsmsync.Config{Group: "ca", Identity: as(t, identity.RoleSync), Log: logger(t)}
	for i, name := range []string{"hsmd-a", "hsmd-b", "hsmd-c"} {
		members = append(members, newReal(t, name, i+1))
		cfg.Members = append(cfg.Members, members[i].Member)
	}
	for _, m := range members {
		m.wait(t)
	}
	chain := &memory{}
	cfg.Manifest = chain
	coordinator, err := hsmsync.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := coordinator.CreateDomain(ctx); err != nil {
		t.Fatal(err)
	}
	record, err := coordinator.CreateKey(ctx, "issuing-g1", hsm.PurposeCA, hsm.P256)
	if err != nil {
		t.Fatal(err)
	}
	again, err := coordinator.CreateKey(ctx, "issuing-g1", hsm.PurposeCA, hsm.P256)
	if err != nil || again.ID != record.ID {
		t.Fatalf("created again: %+v %v", again, err)
	}
	cfg.Identity, cfg.Manifest = as(t, identity.RoleCA), manifest{chain}
	g, err := hsmsync.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(run(t, g))
	waitStates(t, g, "active active active")
	k, err := g.Key(ctx, string(record.ID))
	if err != nil {
		t.Fatal(err)
	}
	return members, g, k
}

func waitStates(t *testing.T, g *hsmsync.Group, want string) {
	t.Helper()
	eventually(t, "the members are "+want, func() (string, bool) {
		var states []string
		s := g.Status().Groups[0].Members
		for _, m := range s {
			states = append(states, m.State)
		}
		got := strings.Join(states, " ")
		return fmt.Sprintf("%s: %+v", got, s), got == want
	})
}

// pressure signs from several goroutines until stop, which returns how many signatures were made, how many requests
// failed, and the longest time one took.
func pressure(t *testing.T, k *hsmsync.Key) (stop func() (signatures, failed int64, worst time.Duration), progress func() int64) {
	var signed, failed, worst atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	ds := digests(8)
	one := func(sign func() ([][]byte, error)) {
		for ctx.Err() == nil {
			began := time.Now()
			sigs, err := sign()
			if d := int64(time.Since(began)); d > worst.Load() {
				worst.Store(d)
			}
			if err != nil {
				failed.Add(1)
				t.Logf("after %v: %v", time.Since(began), err)
				continue
			}
			for i, s := range sigs {
				if !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), ds[i], s) {
					failed.Add(1)
					t.Error("a signature was released that does not verify")
				}
			}
			signed.Add(int64(len(sigs)))
		}
	}
	for range 4 {
		all.Go(func() {
			one(func() ([][]byte, error) {
				sctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				return k.SignBatch(sctx, ds)
			})
		})
		all.Go(func() {
			one(func() ([][]byte, error) {
				sig, err := k.Sign(nil, ds[0], crypto.SHA256)
				return [][]byte{sig}, err
			})
		})
	}
	return func() (int64, int64, time.Duration) {
		cancel()
		all.Wait()
		return signed.Load(), failed.Load(), time.Duration(worst.Load())
	}, signed.Load
}

// TestRealMembers is three scenarios over the same three members: starting them takes longer than all else.
func TestRealMembers(t *testing.T) {
	t.Parallel() // with the record: both mostly wait for processes
	members, g, k := newReals(t)
	t.Run("signing goes on while each in turn is killed, restarted, frozen and thawed", func(t *testing.T) {
		eachInTurn(t, members, g, k)
	})
	t.Run("all gone and back", func(t *testing.T) {
		allGone(t, members, g, k)
	})
	t.Run("a token that came back with another key is quarantined", func(t *testing.T) {
		wrongKey(t, members[2], g, k)
	})
}

func eachInTurn(t *testing.T, members []*real, g *hsmsync.Group, k *hsmsync.Key) {
	stop, progress := pressure(t, k)
	more := func() { // some signatures happen in the present state of affairs
		t.Helper()
		from := progress()
		eventually(t, "signing goes on", func() (string, bool) { n := progress(); return fmt.Sprint(n), n > from+100 })
	}
	for i, m := range members {
		state := func(s string) string {
			states := []string{"active", "active", "active"}
			states[i] = s
			return strings.Join(states, " ")
		}
		more()
		m.kill()
		more()
		waitStates(t, g, state("failed"))
		m.start(t)
		waitStates(t, g, "active active active")
		more()
		m.signal(t, syscall.SIGSTOP)
		more()
		waitStates(t, g, state("failed"))
		m.signal(t, syscall.SIGCONT)
		waitStates(t, g, "active active active")
		m.kill() // and back at once, faster than a health question may notice
		m.start(t)
		waitStates(t, g, "active active active")
	}
	signed, failed, worst := stop()
	t.Logf("%d signatures, %d requests failed, worst %v", signed, failed, worst)
	if failed != 0 {
		t.Errorf("%d requests failed", failed)
	}
}

func wrongKey(t *testing.T, m *real, g *hsmsync.Group, k *hsmsync.Key) {
	m.kill()
	waitStates(t, g, "active active failed")
	m.initialise(t)
	m.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := m.client.GenerateDomain(ctx, string(hsm.NewKeyID())); err != nil {
		t.Fatal(err)
	}
	waitStates(t, g, "active active syncing") // it does not hold the key
	wrong, err := m.client.Generate(ctx, k.Record().KeySpec)
	if err != nil || wrong.ID != k.Record().ID {
		t.Fatalf("%+v %v", wrong, err)
	}
	stop, _ := pressure(t, k)
	waitStates(t, g, "active active quarantined")
	if signed, failed, _ := stop(); failed != 0 || signed == 0 {
		t.Errorf("%d signatures, %d failed", signed, failed)
	}
}

func allGone(t *testing.T, members []*real, g *hsmsync.Group, k *hsmsync.Key) {
	for _, m := range members {
		m.kill()
	}
	waitStates(t, g, "failed failed failed")
	if _, err := k.Sign(nil, digests(1)[0], crypto.SHA256); err == nil {
		t.Fatal("signed by nobody")
	}
	for _, m := range members {
		m.start(t)
	}
	waitStates(t, g, "active active active")
	sig, err := k.Sign(nil, digests(1)[0], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	verify(t, k, digests(1), [][]byte{sig})
}
