package e2e_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"trivet/cluster"
	"trivet/load"
)

// The load of every kill scenario, open loop.
const (
	issueRate = 40.0
	ocspRate  = 100.0
	loadTime  = 8 * time.Second
)

// chaosRow is one row of the table: what clients saw while one process was killed, frozen or hung.
type chaosRow struct {
	Fault      string   `json:"fault"`
	Form       string   `json:"form"`
	Requests   int      `json:"requests"`
	Failed     int      `json:"failed"`
	Duplicates int      `json:"duplicates"`
	FalseGood  int      `json:"false_good"`
	WorstMS    float64  `json:"worst_ms"`
	DetectMS   *float64 `json:"detect_ms"` // null: not measured
	RecoverMS  *float64 `json:"recover_ms"`
	Fsck       bool     `json:"fsck"`
	GoalMS     float64  `json:"goal_ms"` // for worst_ms; 0: none
}

// fault is what is done to one process under load.
type fault struct {
	name, form string
	process    string
	goal       time.Duration // for the slowest request
	// strike does it. mend, if not nil, is called when it has lasted for long enough.
	strike func() (mend func())
	// over says when the process is itself again.
	over func() error
}

var table struct {
	sync.Mutex
	rows []chaosRow
}

// killUnderLoad is underLoad with kill -9; the supervisor starts the process again.
func killUnderLoad(t *testing.T, name, process string) {
	s := upForRow(t, name)
	pid := 0
	s.underLoad(t, fault{
		name: name, form: "kill -9", process: process, goal: goals[name],
		strike: func() func() { pid = s.kill(t, process); return nil },
		over: func() error {
			if p := s.process(t, process); p.State != cluster.Running || p.PID == pid {
				return fmt.Errorf("%s is %s with pid %d", process, p.State, p.PID)
			}
			return nil
		},
	})
}

// upForRow is up for the scenario of one row of the kill table, which is skipped when another row is asked for.
func upForRow(t *testing.T, name string) *site {
	t.Helper()
	if *chaosRowOnly != "" && *chaosRowOnly != name {
		t.Skipf("row %s alone is asked for", *chaosRowOnly)
	}
	return up(t)
}

// goals are how long the slowest request may take.
var goals = map[string]time.Duration{
	"ca_kill": 300 * time.Millisecond, "ocsp_kill": 300 * time.Millisecond, "db_kill": 1500 * time.Millisecond,
	"db_freeze": 3 * time.Second, "db_disk": 3 * time.Second,
	"hsmd_kill": 300 * time.Millisecond, "hsmd_freeze": time.Second, "hsm_hang": time.Second,
}

// lasting is how long a fault lasts that does not end by itself.
const lasting = 3 * time.Second

// underLoad issues and asks for status at a steady rate, has one process struck meanwhile, and demands that nobody noticed: no request
// failed, none was answered with two certificates, every answer was true; afterwards all is well again and fsck agrees.
func (s *site) underLoad(t *testing.T, f fault) {
	t.Helper()
	recorder := &load.Recorder{}
	issuer := s.issuer(t, recorder)
	ca, _ := s.authority(t)

	// Certificates to ask about: some good, one revoked before the load begins.
	var known []*x509.Certificate
	for i := range 20 {
		r, err := issuer.Request(1_000_000 + i)
		if err != nil {
			t.Fatal(err)
		}
		a, err := issuer.Send(t.Context(), r)
		if err != nil {
			t.Fatalf("issuing before the fault: %v", err)
		}
		cert, err := x509.ParseCertificate(a.DER)
		if err != nil {
			t.Fatal(err)
		}
		known = append(known, cert)
		if i == 0 {
			if _, err := issuer.Revoke(t.Context(), a.ID, "superseded"); err != nil {
				t.Fatal(err)
			}
		}
	}
	var falseGood int
	var mu sync.Mutex
	status := &load.Responder{
		URL: s.status(t).CAs[0].OCSP, Client: load.NewClient(nil, 128), Issuer: ca, History: s.history, Generation: s.generation(t),
		Pick: func(i int) *x509.Certificate { return known[i%len(known)] },
		Want: func(_ int, cert *x509.Certificate, answer *ocsp.Response) error {
			want := ocsp.Good
			if cert == known[0] {
				want = ocsp.Revoked
			}
			if answer.Status == want {
				return nil
			}
			if answer.Status == ocsp.Good {
				mu.Lock()
				falseGood++
				mu.Unlock()
			}
			return fmt.Errorf("status is %s instead of %s", load.StatusName(answer.Status), load.StatusName(want))
		},
	}

	before := recorder.Len()
	var issued, asked load.Result
	var loads sync.WaitGroup
	loads.Go(func() {
		issued = load.Run(context.Background(), load.Config{Rate: issueRate, Duration: loadTime, Timeout: 15 * time.Second}, issuer.Op)
	})
	loads.Go(func() {
		asked = load.Run(context.Background(), load.Config{Rate: ocspRate, Duration: loadTime, Timeout: 15 * time.Second}, status.Op)
	})
	eventually(t, 30*time.Second, func() error {
		if recorder.Len() < before+int(issueRate) {
			return errors.New("the load has not got going")
		}
		return nil
	})
	struck := time.Now()
	if mend := f.strike(); mend != nil {
		time.Sleep(lasting) // the fault itself, not a wait for anything
		mend()
		struck = time.Now()
	}
	eventually(t, 60*time.Second, f.over)
	s.allWell(t)
	recovered := float64(time.Since(struck).Milliseconds())
	loads.Wait()

	row := chaosRow{
		Fault: f.name, Form: f.form, GoalMS: float64(f.goal.Milliseconds()), Requests: issued.Requests + asked.Requests, Failed: issued.Failed + asked.Failed,
		Duplicates: len(recorder.Duplicates()) + s.namesTwice(t, recorder), FalseGood: falseGood,
		WorstMS: float64(max(issued.Worst, asked.Worst).Milliseconds()), RecoverMS: &recovered,
	}
	t.Logf("issuing: %v", issued)
	t.Logf("OCSP: %v", asked)
	if row.Failed > 0 || row.Duplicates > 0 || row.FalseGood > 0 {
		t.Errorf("%s %s: %d of %d requests failed, %d duplicates, %d false good", f.form, f.process, row.Failed, row.Requests, row.Duplicates, row.FalseGood)
	}
	if want := int(issueRate * loadTime.Seconds()); recorder.Len()-before < want*9/10 && issued.Failed == 0 {
		t.Errorf("only %d certificates were acknowledged; the load was to ask for %d", recorder.Len()-before, want)
	}
	t.Run("fsck", func(t *testing.T) { s.fsck(t); row.Fsck = true })
	table.Lock()
	table.rows = append(table.rows, row)
	table.Unlock()
}

// namesTwice counts names of the load that the record holds two certificates for: what a retry under another key would leave behind.
func (s *site) namesTwice(t *testing.T, recorder *load.Recorder) int {
	t.Helper()
	mine := map[string]int{}
	for _, a := range recorder.All() {
		mine[a.DNS] = 0
	}
	rows, err := s.database(t).QueryContext(t.Context(), `SELECT der FROM outcome WHERE kind = 'cert'`)
	if err != nil {
		t.Fatalf("reading certificates: %v", err)
	}
	defer rows.Close()
	for rows.Next() {
		var der []byte
		if err := rows.Scan(&der); err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range cert.DNSNames {
			if _, ok := mine[name]; ok {
				mine[name]++
			}
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	twice := 0
	for name, n := range mine {
		if n == 0 {
			t.Errorf("%s was acknowledged and is not in the record", name)
		}
		if n > 1 {
			twice++
		}
	}
	return twice
}

// writeChaos prints the table and writes build/chaos.json; it reports whether there was anything to print.
func writeChaos() bool {
	if len(table.rows) == 0 {
		fmt.Fprintln(os.Stderr, "no kill scenario ran")
		return false
	}
	fmt.Printf("\n%-12s %-8s %9s %7s %11s %11s %9s %8s %11s %5s\n", "fault", "form", "requests", "failed", "duplicates", "false good", "worst ms", "goal", "recover ms", "fsck")
	for _, r := range table.rows {
		verdict := "ok"
		if !r.Fsck {
			verdict = "BAD"
		}
		fmt.Printf("%-12s %-8s %9d %7d %11d %11d %9.0f %8.0f %11.0f %5s\n", r.Fault, r.Form, r.Requests, r.Failed, r.Duplicates, r.FalseGood, r.WorstMS, r.GoalMS, *r.RecoverMS, verdict)
	}
	out, err := json.MarshalIndent(table.rows, "", "  ")
	if err == nil {
		err = os.MkdirAll("../build", 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join("..", "build", "chaos.json"), append(out, '\n'), 0o644)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "writing build/chaos.json: %v\n", err)
		return false
	}
	return true
}
