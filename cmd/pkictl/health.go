package main

import (
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
	Cause   string         `json:"cause,omitempty"`  // why not
	Report  *health.Report `json:"report,omitempty"` // what the process says; databases have none
}

func (a *app) healthCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "health",
		Short: "Ask every process how it is",
		Long: `Ask every process how it is, directly and not through the balancer. Each says what it can do now (its capabilities) and why not what it
cannot. In a demo every process is asked; with --config the CA nodes under admin are, and what is listed under processes. The exit code is 1
unless all is well.`,
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
				asking.Go(func() { cl.ask(ctx, &r.Processes[i]) })
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
		}),
	}
	return a.clientFlags(c)
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
func (c *client) ask(ctx context.Context, p *processHealth) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if p.Role == cluster.RoleDB {
		err := c.demo.Ready(p.Name)
		if p.OK = err == nil; err != nil {
			p.Cause = err.Error()
		}
		return
	}
	report, err := c.healthz(ctx, p.Role, p.Address)
	if err != nil {
		p.Cause = err.Error()
		return
	}
	p.Report = &report
	p.OK = report.State == health.OK
	if !p.OK {
		p.Cause = "the process says " + report.State
	}
}

func (c *client) healthz(ctx context.Context, role, address string) (health.Report, error) {
	transport := &http.Transport{TLSClientConfig: c.id.ClientTLS(identity.Role(role)), DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/healthz", http.NoBody)
	if err != nil {
		return health.Report{}, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return health.Report{}, errors.New("no answer in time")
		}
		return health.Report{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return health.Report{}, fmt.Errorf("answered %s", resp.Status)
	}
	var r health.Report
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&r); err != nil {
		return health.Report{}, fmt.Errorf("reading its report: %w", err)
	}
	return r, nil
}
