package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"trivet/cluster"
	"trivet/ops/galera"
)

func (a *app) galeraCommand() *cobra.Command {
	return group("galera", "Run database nodes, and start them again after all were down",
		`Run database nodes, and start them again after all of them were down.

A demo does all of it by itself; status shows the nodes, and recover is for the case that something is missing. On hosts of their own
every node is run by "galera run". After an outage of all nodes: "galera inspect" on every host, "galera choose" with the results
anywhere, and "galera run --plan" on the host that it names. See docs/runbooks/database-all-down.md.

Nothing here guesses: a node that was not asked may hold what no other node does.`,
		a.galeraStatus(), a.galeraInspect(), a.galeraChoose(), a.galeraRun(), a.galeraRecover())
}

func (a *app) galeraStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what each database node of the demo is and knows", Args: cobra.NoArgs,
		Long: "Show what each database node of the demo is and knows. Running nodes are not disturbed. The exit code is 1 unless every node runs in a primary component.",
		RunE: do(a, func(ctx context.Context, _ []string) ([]galera.Inspection, error) {
			demo, err := a.demo()
			if err != nil {
				return nil, err
			}
			found, err := demo.InspectDatabase(ctx)
			for _, in := range found {
				if err == nil && !in.Primary {
					err = errQuiet
				}
			}
			return found, err
		}, printInspections),
	}
}

func printInspections(w io.Writer, found []galera.Inspection) {
	fmt.Fprintln(w, "NODE\tADDRESS\tSTATE\tHISTORY\tPOSITION\tLAST VIEW\tREMARK")
	for _, in := range found {
		state, history, position, view, remark := "stopped", "-", "-", "-", in.Problem
		switch {
		case in.Primary:
			state, remark = "primary", ""
		case in.Running:
			state, remark = "running", "not in a primary component"
		}
		if in.State != nil {
			history = in.State.UUID
		}
		if in.Position != nil {
			history, position = in.Position.UUID, fmt.Sprint(in.Position.Seqno)
		}
		if in.View != nil {
			view = fmt.Sprintf("%d members", len(in.View.Members))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", in.Node, in.Address, state, history, position, view, remark)
	}
}

func (a *app) galeraInspect() *cobra.Command {
	var config string
	c := &cobra.Command{
		Use: "inspect --config FILE", Short: "Find out what the node on this host knows",
		Long: `Find out what the node on this host knows: grastate.dat, gvwstate.dat and, if mariadbd is stopped, the position that its storage engine reached
(mariadbd --wsrep-recover). Nothing is changed. Keep the JSON form and carry it to where "galera choose" is run. FILE is the node's
configuration, one file with everything. Run it as root or as the user that mariadbd runs as.`,
		Example: "  pkictl galera inspect --config /var/lib/trivet/db1/node.cnf --output json > db1.json",
		Args:    cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (galera.Inspection, error) {
			n, err := loadNode(config)
			if err != nil {
				return galera.Inspection{}, err
			}
			return galera.Inspect(ctx, n)
		}, func(w io.Writer, in galera.Inspection) { printInspections(w, []galera.Inspection{in}) }),
	}
	c.Flags().StringVar(&config, "config", "", "the node's configuration: node.cnf")
	return c
}

func loadNode(config string) (galera.Node, error) {
	if config == "" {
		return galera.Node{}, usagef("--config FILE is needed: the node's configuration, such as /var/lib/trivet/db1/node.cnf")
	}
	return galera.Load(config)
}

func acceptFlags(c *cobra.Command, accept *galera.Accept) {
	c.Flags().StringSliceVar(&accept.Without, "without", nil, "do without this node (name or address); what only it holds is lost. Only with --i-accept-loss")
	c.Flags().BoolVar(&accept.Loss, "i-accept-loss", false, "acknowledged certificates and revocations may be lost with the nodes that --without names")
}

func (a *app) galeraChoose() *cobra.Command {
	var accept galera.Accept
	c := &cobra.Command{
		Use: "choose INSPECTION…", Short: "Choose the node to start the cluster from, or say what is missing",
		Long: `Choose the node to start the cluster from, by the inspections of all of its nodes: the one that holds everything any of them holds. It reads nothing
but the files, and changes nothing. It refuses, with exit code 1, as long as a node that may hold more is not accounted for, and says
which, and what an operator may say instead. Keep the JSON form: it is the plan for "galera run --plan".

Giving a node up with --without changes the state UUID: all other nodes then fetch everything anew, the lost past cannot come back with
the node that was given up, and CA nodes learn that commits may be missing.`,
		Example: `  pkictl galera choose db1.json db2.json db3.json
  pkictl galera choose db1.json db2.json db3.json --output json > plan.json
  pkictl galera choose db1.json db3.json --without 10.0.0.2 --i-accept-loss --output json > plan.json`,
		RunE: do(a, func(_ context.Context, args []string) (galera.Plan, error) {
			if len(args) == 0 {
				return galera.Plan{}, usagef("name the inspections of all nodes: the files that `pkictl galera inspect --output json` wrote")
			}
			var found []galera.Inspection
			for _, file := range args {
				var in galera.Inspection
				if err := readJSON(file, &in); err != nil {
					return galera.Plan{}, err
				}
				found = append(found, in)
			}
			return galera.Choose(found, accept)
		}, printPlan),
	}
	acceptFlags(c, &accept)
	return c
}

func readJSON(file string, into any) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	return nil
}

func printPlan(w io.Writer, p galera.Plan) {
	fmt.Fprintf(w, "first\t%s\t%s\tfounds the cluster, from %s\n", p.Bootstrap, p.Address, p.Position)
	for _, j := range p.Join {
		what := j.Transfer + " transfer"
		if j.Behind > 0 {
			what += fmt.Sprintf(", %d behind", j.Behind)
		}
		fmt.Fprintf(w, "then\t%s\t\t%s\n", j.Node, what)
	}
	for _, r := range p.Reasons {
		fmt.Fprintf(w, "%s\n", r)
	}
	if len(p.GivenUp) > 0 {
		fmt.Fprintf(w, "GIVEN UP: whatever only %s held\n", strings.Join(p.GivenUp, ", "))
	}
}

func (a *app) galeraRun() *cobra.Command {
	var config, plan string
	c := &cobra.Command{
		Use: "run --config FILE", Short: "Run the node on this host in the foreground",
		Long: `Run the node on this host in the foreground, as systemd does: find its position, start mariadbd at it, and have it join again when it falls out of the
group. Without --plan it joins the others, and waits for them; it never founds a cluster by itself. With --plan, on the host that the plan
names, it founds the cluster: it looks once more that the node stands where the plan says, and that no other node answers. A node without a data
directory gets an empty one and fetches everything.

SIGTERM and SIGINT stop mariadbd in good order.`,
		Example: `  pkictl galera run --config /var/lib/trivet/db1/node.cnf
  pkictl galera run --config /var/lib/trivet/db2/node.cnf --plan plan.json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			a.began = true
			n, err := loadNode(config)
			if err != nil {
				return err
			}
			if plan != "" {
				var p galera.Plan
				if err := readJSON(plan, &p); err != nil {
					return err
				}
				if err := galera.Prime(c.Context(), n, p); err != nil {
					return err
				}
			}
			return a.runNode(c.Context(), n, plan != "")
		},
	}
	c.Flags().StringVar(&config, "config", "", "the node's configuration: node.cnf")
	c.Flags().StringVar(&plan, "plan", "", "what pkictl galera choose --output json wrote: found the cluster. Once, by hand; not in a unit file")
	return c
}

func (a *app) runNode(ctx context.Context, n galera.Node, bootstrap bool) error {
	if err := galera.Install(ctx, n); err != nil {
		return err
	}
	cmd, err := galera.Command(ctx, n, bootstrap)
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = a.err, a.err
	// Signals for the process group would reach mariadbd twice.
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting mariadbd: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	guard, stop := context.WithCancel(ctx)
	defer stop()
	log := slog.New(slog.NewTextHandler(a.err, nil))
	go func() { _ = galera.Guard(guard, n, log, func() { _ = cmd.Process.Kill() }) }() // ends with guard, without an error; a process that has ended already is well
	go func() {
		if galera.WaitSynced(guard, n) == nil {
			log.Info("database node is synced", "node", n.Name)
		}
	}()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for asked := ctx.Done(); ; {
		select {
		case err := <-ended:
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				return fmt.Errorf("mariadbd of %s ended: %w", n.Name, err)
			}
			return err
		case <-hup:
			if err := galera.ReloadTLS(guard, n); err != nil {
				log.Error("TLS files were not reloaded", "error", err)
			}
		case <-asked:
			asked = nil
			log.Info("stopping mariadbd", "node", n.Name)
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return fmt.Errorf("stopping mariadbd: %w", err)
			}
		}
	}
}

func (a *app) galeraRecover() *cobra.Command {
	var accept galera.Accept
	var dry bool
	c := &cobra.Command{
		Use: "recover", Short: "Start the demo's database after all of its nodes were down",
		Long: `Start the demo's database after all of its nodes were down. The supervisor does so by itself, unless a node is missing that may hold what no other
does: this command then says which, and takes an operator's word for doing without it. Elsewhere use inspect, choose and run.`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (galera.Plan, error) {
			demo, err := a.demo()
			if err != nil {
				return galera.Plan{}, err
			}
			p, err := demo.RecoverDatabase(ctx, accept, dry)
			if err != nil || dry {
				return p, err
			}
			return p, a.awaitDatabase(ctx, demo)
		}, printPlan),
	}
	acceptFlags(c, &accept)
	c.Flags().BoolVar(&dry, "dry-run", false, "say what would be done, or what is missing, and change nothing")
	return c
}

// awaitDatabase waits until every node is synced.
func (a *app) awaitDatabase(ctx context.Context, demo *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for _, p := range demo.Layout().Parts() {
		if p.Role != cluster.RoleDB {
			continue
		}
		if err := demo.AwaitReady(ctx, p.Name); err != nil {
			return err
		}
		a.sayf("%s is synced", p.Name)
	}
	return nil
}
