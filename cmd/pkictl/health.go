package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"trivet/cluster"
	"trivet/health"
	"trivet/identity"
)

// healthReport is how everything is. OK means that every process was reached and lacks nothing.
type healthReport struct {
	OK        bool            `json:"ok"`
	Processes []processHealth `json:"processes"`
}

type processHealth struct {
	Name    string         `json:"name"`
	Role    string         `json:"role"`
	Address string         `json:"address"`
	OK      bool           `json:"ok"`
	Cause   string         `json:"cause,omitempty"`      // why not
	Report  *health.Report `json:"report,omitempty"`     // what the process says; databases have none
	Stages  []stageTime    `json:"stages,omitempty"`     // with --verbose, of a CA node since it started
	TBS     *storedTBS     `json:"stored_tbs,omitempty"` // with --verbose, of a CA node
}

// storedTBS is how the database keeps TBSCertificates, as a CA node found it within the last hour or two.
type storedTBS struct {
	DaysAhead   int   `json:"days_ahead"`   // that have a partition already; below 0: the node has not looked yet
	DaysOverdue int   `json:"days_overdue"` // whose partition stays because some intent has no outcome
	Bytes       int64 `json:"bytes"`        // estimated, on one database node
	OldNodes    int   `json:"old_nodes"`    // while there are any, new ones stay in the rows of intents
}

// stageTime is how long requests (or batches) took in one stage of issuing.
type stageTime struct {
	Name   string  `json:"name"`
	Count  uint64  `json:"count"`
	MeanMS float64 `json:"mean_ms"`
	P50MS  float64 `json:"p50_ms"`
	P99MS  float64 `json:"p99_ms"`
}

func (a *app) healthCommand() *cobra.Command {
	var verbose bool
	c := &cobra.Command{
		Use:   "health",
		Short: "Ask every process how it is",
		Long: `Ask every process how it is, directly and not through the balancer. Each says what it can do now (its capabilities) and why not what it
cannot, and which of its checks fail although nothing is lost by it yet, such as an HSM out of three. In a demo every process is asked; with
--config the CA nodes under admin are, and what is listed under processes. The exit code is 1 unless all can do what they should.

With --verbose each CA node also says how long requests took in each stage of issuing since it started: wait (for their turn), check, build (and
lint) and queue of a request; intent, sign, outcome and release of a batch of them. And it says how the database's partitions of TBSCertificates
are: for how many days to come there are some, how many days could not be dropped because an intent has no outcome, and their size.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (healthReport, error) {
			cl, err := a.newClient("sre")
			if err != nil {
				return healthReport{}, err
			}
			r := healthReport{OK: true, Processes: cl.processes()}
			if len(r.Processes) == 0 {
				return healthReport{}, fmt.Errorf("client configuration %s: neither admin nor processes says whom to ask", a.config)
			}
			var asking sync.WaitGroup
			for i := range r.Processes {
				asking.Go(func() { cl.ask(ctx, &r.Processes[i], verbose) })
			}
			asking.Wait()
			for _, p := range r.Processes {
				r.OK = r.OK && p.OK
			}
			if !r.OK {
				return r, errQuiet
			}
			return r, nil
		}, func(w io.Writer, r healthReport) {
			fmt.Fprintln(w, "NAME\tROLE\tADDRESS\tSTATE\tCAN\tCANNOT")
			for _, p := range r.Processes {
				state, can, cannot := health.OK, []string{}, []string{}
				if !p.OK {
					state = health.Degraded
				}
				if p.Report != nil {
					state = p.Report.State
					for name, c := range p.Report.Capabilities {
						if c.OK {
							can = append(can, name)
						} else {
							cannot = append(cannot, name+" ("+c.Cause+")")
						}
					}
				} else if !p.OK {
					state, cannot = "unreachable", []string{p.Cause}
				}
				sort.Strings(can)
				sort.Strings(cannot)
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Name, p.Role, p.Address, state, strings.Join(can, " "), strings.Join(cannot, "; "))
			}
			writeFailed(w, r.Processes)
			writeStages(w, r.Processes)
			writeTBS(w, r.Processes)
		}),
	}
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "also show how long each stage of issuing takes")
	return a.clientFlags(c)
}

// writeFailed lists checks that fail behind capabilities that are there all the same: what the next failure will meet.
func writeFailed(w io.Writer, processes []processHealth) {
	head := "\nPROCESS\tCHECK\tFAILS\n"
	for _, p := range processes {
		if p.Report == nil {
			continue
		}
		for _, c := range p.Report.Checks {
			if !c.OK {
				fmt.Fprintf(w, "%s%s\t%s\t%s\n", head, p.Name, c.Name, c.Detail)
				head = ""
			}
		}
	}
}

func writeStages(w io.Writer, processes []processHealth) {
	for _, p := range processes {
		if len(p.Stages) > 0 {
			fmt.Fprintf(w, "\n%s\tSTAGE\tCOUNT\tMEAN\tP50\tP99\n", p.Name)
		}
		for _, s := range p.Stages {
			fmt.Fprintf(w, "\t%s\t%d\t%.1f ms\t%.1f ms\t%.1f ms\n", s.Name, s.Count, s.MeanMS, s.P50MS, s.P99MS)
		}
	}
}

func writeTBS(w io.Writer, processes []processHealth) {
	head := "\nSTORED TBS\tDAYS AHEAD\tDAYS OVERDUE\tSIZE\tOLD NODES\n"
	for _, p := range processes {
		if p.TBS == nil || p.TBS.DaysAhead < 0 {
			continue
		}
		fmt.Fprint(w, head)
		fmt.Fprintf(w, "%s\t%d\t%d\t%.1f MB\t%d\n", p.Name, p.TBS.DaysAhead, p.TBS.DaysOverdue, float64(p.TBS.Bytes)/1e6, p.TBS.OldNodes)
		head = ""
	}
}

// processes lists whom to ask.
func (c *client) processes() []processHealth {
	var all []processHealth
	if c.demo != nil {
		for _, p := range c.demo.Layout().Parts() {
			address := p.HealthAddress()
			if p.Role == cluster.RoleDB {
				address = p.Addresses["mysql"]
			}
			all = append(all, processHealth{Name: p.Name, Role: p.Role, Address: address})
		}
		return all
	}
	for i, u := range c.Admin {
		all = append(all, processHealth{Name: fmt.Sprintf("ca%d", i+1), Role: cluster.RoleCA, Address: strings.TrimPrefix(u, "https://")})
	}
	for _, p := range c.Processes {
		all = append(all, processHealth{Name: p.Name, Role: p.Role, Address: p.Address})
	}
	return all
}

// ask fills in how one process is.
func (c *client) ask(ctx context.Context, p *processHealth, verbose bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if p.Role == cluster.RoleDB {
		err := c.demo.Ready(p.Name)
		if p.OK = err == nil; err != nil {
			p.Cause = err.Error()
		}
		return
	}
	var report health.Report
	if err := c.fetch(ctx, p, "/healthz", func(body io.Reader) error { return json.NewDecoder(body).Decode(&report) }); err != nil {
		p.Cause = err.Error()
		return
	}
	p.Report = &report
	if p.OK = report.State == health.OK; !p.OK {
		p.Cause = "the process says " + report.State
	}
	if !verbose || p.Role != cluster.RoleCA {
		return
	}
	err := c.fetch(ctx, p, "/metrics", func(body io.Reader) error {
		text, err := io.ReadAll(body)
		if err != nil {
			return err
		}
		g, err := health.ReadGauges(bytes.NewReader(text), "trivet_ca_tbs_days_ahead", "trivet_ca_tbs_days_overdue", "trivet_ca_tbs_bytes", "trivet_ca_tbs_old_nodes")
		if err != nil {
			return err
		}
		if _, known := g["trivet_ca_tbs_days_ahead"]; known {
			p.TBS = &storedTBS{int(g["trivet_ca_tbs_days_ahead"]), int(g["trivet_ca_tbs_days_overdue"]), int64(g["trivet_ca_tbs_bytes"]), int(g["trivet_ca_tbs_old_nodes"])}
		}
		stages, err := health.ReadStages(bytes.NewReader(text), health.CAStages)
		for _, name := range health.CAStageOrder {
			if s, known := stages[name]; known {
				ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
				p.Stages = append(p.Stages, stageTime{name, s.Count, ms(s.Mean()), ms(s.Quantile(.5)), ms(s.Quantile(.99))})
			}
		}
		return err
	})
	if err != nil {
		p.OK, p.Cause = false, err.Error()
	}
}

// fetch gets a page of a process itself.
func (c *client) fetch(ctx context.Context, p *processHealth, path string, read func(io.Reader) error) error {
	transport := &http.Transport{TLSClientConfig: c.id.ClientTLS(identity.Role(p.Role)), DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.Address+path, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return errors.New("no answer in time")
		}
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", path, resp.Status)
	}
	if err := read(io.LimitReader(resp.Body, 4<<20)); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}
